"""Flux Kontext image generation and style transfer for Prefect.

Names load on first use, so that the client, the models and the command line start without Prefect.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if sys.platform == "win32":
    raise ImportError("prefect-flux-kontext needs Linux or macOS: on Windows, run it in WSL.")

__version__ = "0.1.0"

if TYPE_CHECKING:
    from prefect_flux_kontext.batch.policy import FailurePolicy
    from prefect_flux_kontext.batch.summary import BatchSummary
    from prefect_flux_kontext.callbacks.receiver import create_receiver
    from prefect_flux_kontext.client.client import FluxKontextClient
    from prefect_flux_kontext.client.polling import PollingCadence
    from prefect_flux_kontext.credentials import FluxKontextCredentials
    from prefect_flux_kontext.flows import (
        collect_batch,
        retry_failed,
        style_transfer,
        style_transfer_batch,
    )
    from prefect_flux_kontext.jobs import ImageGeneration
    from prefect_flux_kontext.models import (
        GenerationRequest,
        GenerationResult,
        GenerationTask,
        StoredImage,
    )
    from prefect_flux_kontext.orchestration.events import announce_manifest, emit_manifest_arrived
    from prefect_flux_kontext.orchestration.parameters import AdvancedOptions
    from prefect_flux_kontext.orchestration.suspension import resume_suspended, suspend_until_done
    from prefect_flux_kontext.tasks import (
        persist_images,
        submit_generation,
        wait_for_generation,
    )

__all__ = [
    "AdvancedOptions",
    "BatchSummary",
    "FailurePolicy",
    "FluxKontextClient",
    "FluxKontextCredentials",
    "GenerationRequest",
    "GenerationResult",
    "GenerationTask",
    "ImageGeneration",
    "PollingCadence",
    "StoredImage",
    "announce_manifest",
    "collect_batch",
    "create_receiver",
    "emit_manifest_arrived",
    "persist_images",
    "resume_suspended",
    "retry_failed",
    "style_transfer",
    "style_transfer_batch",
    "submit_generation",
    "suspend_until_done",
    "wait_for_generation",
]

# The module, below the package, that defines each name.
_MODULES = {
    "batch.policy": ("FailurePolicy",),
    "batch.summary": ("BatchSummary",),
    "callbacks.receiver": ("create_receiver",),
    "client.client": ("FluxKontextClient",),
    "client.polling": ("PollingCadence",),
    "credentials": ("FluxKontextCredentials",),
    "flows": ("collect_batch", "retry_failed", "style_transfer", "style_transfer_batch"),
    "jobs": ("ImageGeneration",),
    "models": ("GenerationRequest", "GenerationResult", "GenerationTask", "StoredImage"),
    "orchestration.events": ("announce_manifest", "emit_manifest_arrived"),
    "orchestration.parameters": ("AdvancedOptions",),
    "orchestration.suspension": ("resume_suspended", "suspend_until_done"),
    "tasks": ("persist_images", "submit_generation", "wait_for_generation"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    # `prefect block register -m` looks for Blocks among these names.
    return [*__all__, "__version__"]
