"""Faults on demand: what can befall requests, tasks and callbacks, by a seeded plan.

Importing the modules that hold the faults registers them.
"""

from prefect_flux_kontext.sandbox.faults import callbacks, pictures, statuses, wire

__all__ = ["callbacks", "pictures", "statuses", "wire"]
