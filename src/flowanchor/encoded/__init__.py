"""Encoded data sets: their files, what is recorded about them, and how their values are normalised."""
