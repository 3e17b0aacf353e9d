"""One batch over several workers: planning, leases, the flow of a partition."""
