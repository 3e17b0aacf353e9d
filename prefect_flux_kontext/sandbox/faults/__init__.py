"""Faults on demand for requests, tasks and callbacks, by a seeded plan.

Importing the modules that hold the faults registers them.
"""

from prefect_flux_kontext.sandbox.faults import images, network, responses

__all__ = ["images", "network", "responses"]
