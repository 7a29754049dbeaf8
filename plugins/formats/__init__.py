"""Kinds of released weights (`format=`): each recognises, reads, digests and writes its own."""
