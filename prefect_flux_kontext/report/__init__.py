"""What was done, for people to look at."""
