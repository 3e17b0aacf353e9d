"""One line of a manifest, made into a request, or refused with the reason."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, unquote, urlsplit

from pydantic import ValidationError

from prefect_flux_kontext.models import GenerationRequest

if TYPE_CHECKING:
    from collections.abc import Mapping

PARAMETERS = ("prompt", "mode", "aspect_ratio", "output_format", "provider")
"""The columns that go into the request as they are."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row that can be paid for.

    Attributes:
        id: Names the row and its images.
        line: Line of the manifest it ends on, from 1, with the header counted.
        request: What is to be made.
        cells: The line as it stands, so that it can be written again.
    """

    id: str
    line: int
    request: GenerationRequest
    cells: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RefusedRow:
    """A row that is wrong; it costs nothing."""

    id: str
    line: int
    reason: str
    cells: Mapping[str, str] = field(default_factory=dict)


def make_row(
    line: int, cells: Mapping[str, str], *, prompt: str | None = None
) -> Row | RefusedRow:
    """Make a row of the cells of one line.

    Args:
        line: Line of the manifest.
        cells: Column name to text; empty text counts as not given.
        prompt: The prompt for rows that have none of their own.
    """
    given = {name: text.strip() for name, text in cells.items() if text and text.strip()}
    values: dict[str, Any] = {name: given[name] for name in PARAMETERS if name in given}
    if prompt is not None:
        values.setdefault("prompt", prompt)
    image = given.get("image")
    row_id = given.get("id") or _made_id(image, values)
    problems = []
    if image is not None:
        values["image_urls"] = [image]
        problems += problems_of_reference(image)
    elif "prompt" not in given and prompt is not None:
        # Else a hole in the column of references would be paid for as text to image.
        problems.append("the row has neither an image nor a prompt of its own")
    try:
        request = GenerationRequest(**values)
    except ValidationError as error:
        problems += [_told(problem) for problem in error.errors()]
    if problems:
        return RefusedRow(id=row_id, line=line, reason="; ".join(problems), cells=cells)
    return Row(id=row_id, line=line, request=request, cells=cells)


def _made_id(image: str | None, values: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps([image, values], sort_keys=True).encode()).hexdigest()[:12]
    stem = PurePosixPath(unquote(_parts(image).path)).stem if image else ""
    return f"{stem}-{digest}" if stem else digest


def _parts(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")


def problems_of_reference(image: str) -> list[str]:
    """Why the service could not fetch a reference image, as far as its URL tells."""
    parts = _parts(image)
    if parts.scheme in ("http", "https") and parts.hostname:
        return []
    told = (
        f"image {image[:100]!r} is not an http or https URL, so the service cannot fetch it; "
        "serve the file at a URL (in rehearsals: `flux-kontext sandbox --references FOLDER`)"
    )
    return [told]


def _told(problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "missing":
        return f"{where} is missing: give the row one, or a prompt for all rows"
    return f"{where} {problem['input']!r:.60}: {problem['msg']}"
