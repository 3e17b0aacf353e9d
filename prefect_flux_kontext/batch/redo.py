"""The manifest of the images that verdicts ask to make again."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from prefect_flux_kontext.batch.spending import REQUEST_COLUMNS
from prefect_flux_kontext.errors import ManifestError
from prefect_flux_kontext.ledger.ledger import Ledger
from prefect_flux_kontext.ledger.store import open_ledger_store
from prefect_flux_kontext.manifest.columns import COLUMNS as MANIFEST_COLUMNS
from prefect_flux_kontext.manifest.reader import Manifest
from prefect_flux_kontext.references.location import non_public_references
from prefect_flux_kontext.references.rights import find_retry_rights
from prefect_flux_kontext.report.results import COLUMNS, original_column_name, read_all_lines
from prefect_flux_kontext.report.verdicts import Verdict, Verdicts

if TYPE_CHECKING:
    from prefect_flux_kontext.ledger.records import Intent
    from prefect_flux_kontext.storage.filesystem import OutputFolder


async def read_redo_manifest(
    output: OutputFolder, styles: Sequence[str], base_url: str | None = None
) -> Manifest | None:
    """Read the images to make again as a manifest; None without any.

    Its rows are those of the gallery's `redo.csv`. They may name the references that the ledger
    records for them, and have the rights of a remote manifest otherwise. Verdicts may name the
    styles of the files `styles`. The service at `base_url` must reach references on the web.

    Raises:
        LedgerError: A verdict or a record of the ledger cannot be read.
        ManifestError: A row cannot be made again without its style.
        StorageError: The results cannot be read.
    """
    asked = {
        key: verdict
        for key, verdict in (await Verdicts(output).load()).items()
        if verdict.verdict == "redo"
    }
    ledger = Ledger(open_ledger_store(output), owner="", prices={})
    entries = await asyncio.gather(*map(ledger.read, asked))
    intents = {entry.key: entry.intent for entry in entries if entry.intent is not None}
    if not intents:
        return None
    with_extra = [
        intent.row_id
        for key, intent in intents.items()
        if intent.request.extra and not asked[key].style
    ]
    if with_extra:
        raise ManifestError(
            f"{len(with_extra)} rows, such as {with_extra[0]!r:.80}, have extra input of their "
            "style, which a redo has only if its verdict names the style."
        )
    custom = await _read_custom_columns(output, set(intents))
    rows = [
        _make_cells(intent, asked[key], custom.get(key, {})) for key, intent in intents.items()
    ]
    known = {url for intent in intents.values() for url in intent.request.image_urls}
    return Manifest(
        rows,
        styles=styles,
        rights=find_retry_rights(str(output), non_public_references(sorted(known))),
        text_to_image=True,
        base_url=base_url,
        needs_style_names=True,
    )


def _make_cells(intent: Intent, verdict: Verdict, custom: Mapping[str, str]) -> dict[str, str]:
    request = intent.request
    cells = {name: str(text) for name, text in custom.items() if name not in MANIFEST_COLUMNS}
    cells |= {name: getattr(request, name) for name in REQUEST_COLUMNS}
    if request.image_urls:
        cells["images"] = json.dumps(request.image_urls)
    if verdict.style:
        return cells | {
            "id": intent.row_id,
            "style": verdict.style,
            "prompt": verdict.prompt or ("" if request.image_urls else request.prompt),
        }
    # The prompt of the request holds the style already.
    cells["id"] = f"{intent.row_id}-{intent.style}" if intent.style else intent.row_id
    cells["prompt"] = verdict.prompt or request.prompt
    if verdict.variant:
        cells["variants"] = f"only {verdict.variant}"
    return cells


async def _read_custom_columns(output: OutputFolder, keys: set[str]) -> dict[str, dict[str, str]]:
    """Return the custom columns of rows, which templates of styles may use, by row key."""
    return {
        line["key"]: {
            original_column_name(name): value
            for name, value in line.items()
            if name not in COLUMNS
        }
        async for line in read_all_lines(output)
        if line.get("key") in keys
    }
