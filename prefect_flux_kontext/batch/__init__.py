"""Doing it: a whole manifest, in waves."""
