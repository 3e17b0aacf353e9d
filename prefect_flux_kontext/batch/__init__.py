"""Running a whole manifest in waves."""
