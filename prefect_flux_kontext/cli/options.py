"""The objects that options of the command line stand for."""

from __future__ import annotations

import argparse
import asyncio

from prefect_flux_kontext.batch.policy import RowOptions
from prefect_flux_kontext.client.client import FluxKontextClient
from prefect_flux_kontext.images.checks import load_checks
from prefect_flux_kontext.manifest.reader import Manifest
from prefect_flux_kontext.references.resolver import create_references
from prefect_flux_kontext.settings import FluxKontextSettings
from prefect_flux_kontext.storage.filesystem import OutputFolder

_BLOCK_PREFIX = "block:"

_ROW_PARAMETERS = ("mode", "aspect_ratio", "output_format", "provider", "variants")
"""Columns of a manifest that are also options, for rows that leave them empty."""


def open_output(text: str) -> OutputFolder:
    """Open the folder, URL or saved Block (`block:…`) that a command was given.

    The filesystem's options come from the environment or the Block.

    Raises:
        ConfigurationError: The Block does not exist, or the filesystem cannot be used.
    """
    if text.startswith(_BLOCK_PREFIX):
        from prefect_flux_kontext.orchestration import parameters  # loads Prefect

        return asyncio.run(parameters.open_output(text))
    return OutputFolder(text, FluxKontextSettings().fsspec_options())


def create_client() -> FluxKontextClient:
    """Create a client for the account of the environment."""
    settings = FluxKontextSettings()
    return FluxKontextClient(
        settings.require_api_key(),
        base_url=settings.base_url,
        requests_per_minute=settings.requests_per_minute,
        concurrent_tasks=settings.concurrent_tasks,
    )


def manifest_from_options(options: argparse.Namespace) -> Manifest:
    """Return the manifest that the command line names."""
    return Manifest(
        options.manifest,
        options.prompt,
        options.columns,
        styles=options.styles,
        names=options.names,
        output=str(options.output),
        parameters={name: getattr(options, name) for name in _ROW_PARAMETERS},
        format=options.format,
        text_to_image=options.text_to_image,
        base_url=FluxKontextSettings().base_url,
    )


def row_options_from_options(options: argparse.Namespace) -> RowOptions:
    """Return how rows are handled, by the settings and those options that the command has."""
    settings = FluxKontextSettings()
    budget_by: dict[str, dict[str, float]] = {}
    for column, value, dollars in getattr(options, "budget_by", ()):
        budget_by.setdefault(column, {})[value] = dollars
    return RowOptions(
        cadence=settings.cadence(),
        resubmit_unknown=getattr(options, "resubmit_unknown", False),
        retry_failed=getattr(options, "retry_failed", False),
        result_days=settings.result_days,
        budget_usd=getattr(options, "budget", None),
        budget_by=budget_by,
        spend_by=getattr(options, "by", ()),
        checks=load_checks(getattr(options, "checks", ())),
        references=create_references(
            settings,
            settings.base_url,
            timeout=settings.poll_timeout,
            fit=getattr(options, "fit_references", False),
        ),
    )
