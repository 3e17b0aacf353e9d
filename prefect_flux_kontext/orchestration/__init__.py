"""Everything that talks to Prefect besides the public tasks and flows."""
