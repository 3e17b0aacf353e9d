"""One line of a manifest, made into a request, or refused with the reason."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import SplitResult, unquote, urlsplit

from pydantic import ValidationError

from prefect_flux_kontext.errors import ConfigurationError
from prefect_flux_kontext.manifest.output_paths import output_path, parse_path_template
from prefect_flux_kontext.manifest.row_key import compute_row_key
from prefect_flux_kontext.models import GenerationRequest
from prefect_flux_kontext.references.location import find_location_problem, locate
from prefect_flux_kontext.storage.names import INVISIBLE_CHARACTERS, find_text_problem
from prefect_flux_kontext.styles.styles import Styles, select_styles, unknown_style_error
from prefect_flux_kontext.styles.templates import is_template, parse_template

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from prefect_flux_kontext.manifest.columns import Line
    from prefect_flux_kontext.manifest.output_paths import Names
    from prefect_flux_kontext.styles.styles import Style

_LONGEST_ID = 200

PARAMETERS = ("prompt", "mode", "aspect_ratio", "output_format", "provider")
"""The columns that go into the request as they are."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row that can be paid for.

    Attributes:
        id: Names the row and its images.
        line: Line of the manifest it ends on, from 1, with the header counted.
        request: What is to be made.
        key: Names in the ledger what is paid for.
        name: Its image below the output, without extension.
        cells: The line, so written that it means the same by itself: with its prompt and style.
        style: The name of its style, where it has one.
        version: Tells what its image holds, where a listing says that (an ETag).
    """

    id: str
    line: int
    request: GenerationRequest
    key: str
    name: str
    cells: Mapping[str, str] = field(default_factory=dict, repr=False)
    style: str | None = None
    version: str | None = None


@dataclass(frozen=True, slots=True)
class RefusedRow:
    """A row that is wrong; it costs nothing."""

    id: str
    line: int
    reason: str
    cells: Mapping[str, str] = field(default_factory=dict, repr=False)


def make_row(
    line: int,
    cells: Mapping[str, str],
    *,
    prompt: str | None = None,
    style: Style | None = None,
    names: Names | None = None,
    version: str | None = None,
    folder: str | None = None,
) -> Row | RefusedRow:
    """Make a row of the cells of one line.

    Args:
        line: Line of the manifest.
        cells: Column name to text; empty text counts as not given.
        prompt: The prompt for rows that have none of their own.
        style: What the row is to be restyled to; its own cells win over the style's parameters.
        names: The template of output names.
        version: Tells what its image holds, where a listing says that.
        folder: Where relative paths of references start; None where local files are not allowed.
    """
    given = {name: text.strip() for name, text in cells.items() if text and text.strip()}
    values: dict[str, Any] = {name: given[name] for name in PARAMETERS if name in given}
    kept = cells
    if prompt is not None and "prompt" not in values:
        values["prompt"] = prompt
        # Else it would be another row when it is run again from the failed ones.
        kept = {**cells, "prompt": prompt}
    images, problems = _references(given)
    row_id = given.get("id") or _made_id(images, values)
    problems += _problems_of_id(given.get("id", ""))
    problems += [problem for image in images for problem in find_reference_problems(image, folder)]
    found = [locate(image, folder) for image in images]
    if found != images:
        kept = {**kept, **_told_anew(given, found)}
    if not (images or problems or "prompt" in given) and (prompt is not None or style is not None):
        # Else a hole in the column of references would be paid for as text to image.
        problems.append("the row has neither an image nor a prompt of its own")
    if style is not None or is_template(values.get("prompt", "")):
        problems += _restyled(values, style, cells)
    if images:
        values["image_urls"] = found
    name, style_name = "", None if style is None else style.name
    try:
        request = GenerationRequest(**values)
        name = output_path(row_id, style_name, cells, names, request.output_format)
    except ValidationError as error:
        problems += [_told(problem) for problem in error.errors()]
    except ValueError as error:
        problems.append(str(error))
    if problems:
        # Without an image, a prompt of its own would make it another kind of row.
        kept = kept if images else cells
        return RefusedRow(id=row_id, line=line, reason="; ".join(problems), cells=kept)
    if names is not None and "output" not in given:
        kept = {**kept, "output": name}
    return Row(
        id=row_id,
        line=line,
        request=request,
        key=compute_row_key(request),
        name=name,
        cells=kept,
        style=style_name,
        version=version,
    )


def _restyled(values: dict[str, Any], style: Style | None, cells: Mapping[str, str]) -> list[str]:
    """Put the prompt in its final form, and a style's parameters where the row has none.

    Returns:
        What is wrong with the templates.
    """
    where, prompt = "prompt", values.get("prompt")
    try:
        if prompt is not None and is_template(prompt):
            prompt = _own(prompt, cells)
        if style is not None:
            where = f"style {style.name!r}"
            prompt = style.text(prompt, cells)
    except ValueError as error:
        values.setdefault("prompt", "it is not missing, but wrong")
        return [f"{where}: {error}"]
    values["prompt"] = prompt
    if style is not None:
        values |= style.parameters | values
    return []


def _own(prompt: str, cells: Mapping[str, str]) -> str:
    made = parse_template(prompt)
    if "prompt" in made.columns:
        raise ValueError("a prompt cannot hold itself, `{{ prompt }}`")
    return made.render(cells)


def _references(given: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """The references of a row, and what is wrong with their column."""
    images = [given["image"]] if "image" in given else []
    several = given.get("images")
    if several is None:
        return images, []
    if images:
        return images, ["the row has both `image` and `images`; give one of them"]
    if not several.startswith("["):
        return several.split(), []
    try:
        images = json.loads(several)
    except (ValueError, RecursionError):
        return [], [f"images {several[:60]!r} is not a list in JSON"]
    if not all(isinstance(image, str) for image in images):
        return [], [f"images {several[:60]!r} is not a list of texts"]
    return images, []


def _told_anew(given: Mapping[str, str], images: list[str]) -> dict[str, str]:
    # The failed rows are written elsewhere, where a relative path would start from there.
    return {"image": images[0]} if "image" in given else {"images": json.dumps(images)}


def _made_id(images: list[str], values: dict[str, Any]) -> str:
    # As it was when a row had one reference at most, so that ids stay as they were.
    told = images[0] if len(images) == 1 else images or None
    digest = hashlib.sha256(json.dumps([told, values], sort_keys=True).encode()).hexdigest()[:12]
    stem = PurePosixPath(unquote(_parts(images[0]).path)).stem if images else ""
    return f"{stem}-{digest}" if stem else digest


def _problems_of_id(row_id: str) -> list[str]:
    if len(row_id) > _LONGEST_ID:
        return [
            f"id has {len(row_id):,} characters, and names files; it has at most {_LONGEST_ID}"
        ]
    told = find_text_problem(row_id)
    return [f"id {row_id!r:.80} {told}; ids name files"] if told else []


def _parts(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")


def find_reference_problems(image: str, folder: str | None = None) -> list[str]:
    """Why the service could not be given a reference image, as far as its text tells.

    Args:
        image: As it is written.
        folder: Where relative paths start; None where local files are not allowed.
    """
    if INVISIBLE_CHARACTERS.search(image):
        # A URL parser would leave them out without a word.
        return [f"image {image[:100]!r} holds a character that cannot be seen"]
    parts = _parts(image)
    host = parts.hostname
    if parts.scheme in ("http", "https") and host:
        if parts.username is not None or parts.password is not None:
            return [f"image at {host} has a user name or password in its URL; sign it otherwise"]
        if host.startswith(("169.254.", "fe80:")):
            return [f"image {image[:100]!r} is at a link-local address, which nobody else reaches"]
        return []
    problem = find_location_problem(image, folder)
    return [problem] if problem else []


def _told(problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "missing":
        return f"{where} is missing: give the row one, or a prompt for all rows"
    return f"{where} {problem['input']!r:.60}: {problem['msg']}"


class RowDefaults(NamedTuple):
    """What is the same for all rows of a manifest.

    Attributes:
        prompt: For rows that have none of their own.
        styles: Those that are known, and those for rows that name none.
        names: The template of output names.
        folder: Where relative paths of references start; None where local files are not allowed.
    """

    prompt: str | None
    styles: Styles
    names: Names | None
    folder: str | None = None


def resolve_row_defaults(
    prompt: str | None, styles: str | Sequence[str] | None, names: str | None
) -> RowDefaults:
    """Look at what is given for all rows, before the first is read.

    Raises:
        ConfigurationError: The prompt is a template that cannot be used, there is no such style,
            or the names are no template of names.
    """
    if prompt is not None and is_template(prompt):
        try:
            parse_template(prompt)
        except ValueError as error:
            raise ConfigurationError(f"The prompt for all rows: {error}.") from None
    return RowDefaults(
        prompt, select_styles(styles), None if names is None else parse_path_template(names)
    )


def expand_line(line: Line, recipe: RowDefaults) -> Iterator[Row | RefusedRow]:
    """Make the rows of a line, in the order of the styles."""
    own = line.cells.get("style", "").strip()
    if line.problem:
        row = _row(line, recipe, None)
        # What is left of a line that cannot be read must never be paid for as if it were all.
        yield RefusedRow(row.id, line.number, line.problem, {"id": row.id})
    elif not own:
        for style in recipe.styles.chosen or (None,):
            yield _row(line, recipe, style)
    elif own in recipe.styles.known:
        yield _row(line, recipe, recipe.styles.known[own])
    else:
        row = _row(line, recipe, None)
        reason = f"there {unknown_style_error(own, recipe.styles.known)}"
        yield RefusedRow(row.id, line.number, reason, line.cells)


def _row(line: Line, recipe: RowDefaults, style: Style | None) -> Row | RefusedRow:
    return make_row(
        line.number,
        line.cells if style is None else {**line.cells, "style": style.name},
        prompt=recipe.prompt,
        style=style,
        names=recipe.names,
        version=line.version,
        folder=recipe.folder,
    )
