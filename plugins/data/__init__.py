"""Data modules (`data=`): what is learned."""
