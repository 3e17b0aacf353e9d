"""The output that a command was given: a folder, a URL, or a saved Block of Prefect's."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prefect_flux_kontext.storage.filesystem import OutputFolder

_BLOCK = "block:"


def open_output_argument(text: str) -> OutputFolder:
    """The folder that is meant, with the filesystem's options from the environment or the Block.

    Raises:
        ConfigurationError: There is no such Block, or the filesystem cannot be used.
    """
    if text.startswith(_BLOCK):
        from prefect_flux_kontext.orchestration.parameters import open_output  # loads Prefect

        return asyncio.run(open_output(text))
    from prefect_flux_kontext.settings import FluxKontextSettings
    from prefect_flux_kontext.storage.filesystem import OutputFolder

    return OutputFolder(text, FluxKontextSettings().fsspec_options())
