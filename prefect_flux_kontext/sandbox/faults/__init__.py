"""Faults on demand for requests, tasks and callbacks, by a seeded plan.

Importing the modules that hold the faults registers them.
"""

from prefect_flux_kontext.sandbox.faults import callbacks
from prefect_flux_kontext.sandbox.faults import images as pictures
from prefect_flux_kontext.sandbox.faults import network as wire
from prefect_flux_kontext.sandbox.faults import responses as statuses

__all__ = ["callbacks", "pictures", "statuses", "wire"]
