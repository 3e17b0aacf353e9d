"""The Prefect side of the package, except for the public tasks and flows."""
