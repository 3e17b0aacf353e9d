"""Faults on demand for requests, tasks and callbacks, by a seeded plan."""
