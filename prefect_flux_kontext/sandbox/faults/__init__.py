"""Faults on demand: what can befall requests, tasks and callbacks, by a seeded plan."""
