"""The account's limits, kept on this side: requests a minute and running tasks."""
