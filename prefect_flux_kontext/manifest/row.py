"""Rows: conversion of one line of a manifest to a request, or to a refusal with its reason."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import SplitResult, unquote, urlsplit

from pydantic import ValidationError

from prefect_flux_kontext.client.addresses import is_public_host
from prefect_flux_kontext.errors import ConfigurationError
from prefect_flux_kontext.manifest.columns import find_cell_problem, looks_like_image
from prefect_flux_kontext.manifest.output_paths import build_output_path, parse_path_template
from prefect_flux_kontext.manifest.row_key import compute_key
from prefect_flux_kontext.models import MAX_PROMPT_CHARACTERS, GenerationRequest
from prefect_flux_kontext.redaction import make_showable, redact_text, redact_url
from prefect_flux_kontext.references.location import (
    PLAIN_URL,
    LocationKind,
    classify_location,
    find_location_problem,
    normalize_reference,
)
from prefect_flux_kontext.references.rights import Rights, find_rights_problem
from prefect_flux_kontext.storage.names import (
    INVISIBLE_CHARACTERS,
    MAX_ID_CHARACTERS,
    find_text_problem,
)
from prefect_flux_kontext.styles.styles import Styles, describe_unknown_style, select_styles
from prefect_flux_kontext.styles.templates import is_missing_value, is_template, parse_template

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from prefect_flux_kontext.manifest.columns import Line
    from prefect_flux_kontext.manifest.output_paths import PathTemplate
    from prefect_flux_kontext.styles.styles import Style

# Between the references of a cell. A URL may hold commas itself.
_SEPARATOR = re.compile(r"[\s|;,]*\s[\s|;,]*|[|;,]+(?=[a-z][a-z0-9]*://)", re.IGNORECASE)

_LINK_LOCAL = ("169.254.", "fe80:")
_WEB_URL = re.compile(r"https?://", re.IGNORECASE)
_HTML_ENTITIES = ("&amp;", "&#38;", "&#x26;", "&#038;")

_SEVERAL_URLS = re.compile(r"[\s|;,]+https?://", re.IGNORECASE)
_WHITE_SPACE = re.compile(r"\s")

# Columns that the request takes unchanged.
_REQUEST_COLUMNS = ("prompt", "mode", "aspect_ratio", "output_format", "provider")


MAX_VARIANTS = 20
"""A typing error must not multiply the price of a manifest."""

_DEFAULT_ROUTE = {
    name: GenerationRequest.model_fields[name].default for name in ("mode", "provider")
}

# A single variant, as in the manifest of failed rows.
_ONLY_VARIANT = re.compile(r"only ([1-9]\d{0,3})")


@dataclass(slots=True)  # not frozen: that takes a tenth of a row's time
class Row:
    """A valid row. Its cells have the defaults filled in: prompt, style and absolute paths."""

    id: str
    line: int  # of the manifest on which the row ends, from 1, counting the header
    values: GenerationRequest | dict[str, Any] = field(repr=False, compare=False)
    key: str  # identifies the payment in the ledger
    name: str  # path of its image below the output, without extension
    cells: Mapping[str, str] = field(default_factory=dict, repr=False)
    style: str | None = None
    version: str | None = None  # ETag of the image, if the folder listing has one
    variant: int = 1  # number of the image among several of the row

    @property
    def request(self) -> GenerationRequest:
        """The request, made of its values when it is needed: most rows are only counted."""
        if isinstance(self.values, dict):
            self.values = GenerationRequest(**self.values)
        return self.values

    @property
    def image_urls(self) -> list[str]:
        """The references of the request."""
        if isinstance(self.values, dict):
            references: list[str] = self.values.get("image_urls", [])
            return references
        return self.values.image_urls

    @property
    def route(self) -> tuple[str, str]:
        """Mode and provider of the request."""
        if isinstance(self.values, dict):
            values = _DEFAULT_ROUTE | self.values
            return values["mode"], values["provider"]
        return self.values.mode, self.values.provider


@dataclass(frozen=True, slots=True)
class RefusedRow:
    """An invalid row. It is never submitted, so it costs nothing."""

    id: str
    line: int
    reason: str
    cells: Mapping[str, str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "reason", make_showable(self.reason))


class RowDefaults(NamedTuple):
    """Values that apply to all rows of a manifest. Its parameters override those of a style.

    The service at the base URL must reach references on the web; None for no check.
    """

    prompt: str | None = None
    styles: Styles = Styles({}, ())
    names: PathTemplate | None = None
    parameters: Mapping[str, str] = MappingProxyType({})
    rights: Rights = Rights()
    base_url: str | None = None


_NO_DEFAULTS = RowDefaults()


def resolve_row_defaults(
    prompt: str | None,
    styles: str | Sequence[str] | None,
    names: str | None,
    parameters: Mapping[str, str | None],
) -> RowDefaults:
    """Check and parse the values that apply to all rows.

    Raises:
        ConfigurationError: The prompt is an invalid template, a style does not exist or is
            invalid, the template of output names is invalid, or a parameter has an invalid value.
    """
    given: dict[str, Any] = {name: text for name, text in parameters.items() if text is not None}
    try:
        parse_variants(given.get("variants", "1"))
    except ValueError as error:
        raise ConfigurationError(f"For all rows: {error}.") from None
    try:
        GenerationRequest(
            prompt="any", **{name: text for name, text in given.items() if name != "variants"}
        )
    except ValidationError as error:
        problems = "; ".join(_format_error(problem) for problem in error.errors())
        raise ConfigurationError(f"For all rows: {problems}.") from None
    if prompt is not None and is_template(prompt):
        try:
            parse_template(prompt)
        except ValueError as error:
            raise ConfigurationError(f"The prompt for all rows: {error}.") from None
    template = None if names is None else parse_path_template(names)
    return RowDefaults(prompt, select_styles(styles), template, given)


def expand_line(line: Line, defaults: RowDefaults) -> Iterator[Row | RefusedRow]:
    """Yield the rows of a line: its variants, for each style in the order of the styles."""
    style_name = line.cells.get("style", "").strip()
    if not (
        style_name
        or line.problem
        or line.cells.get("variants")
        or defaults.parameters
        or defaults.styles.chosen
    ):
        # Most lines are like this one, and a manifest has a million.
        yield make_row(line.number, line.cells, defaults, version=line.version)
        return
    if defaults.parameters and not line.problem:
        # Kept as cells, so that a retry from the manifest of failed rows is the same row.
        own = {name: text for name, text in line.cells.items() if text and text.strip()}
        line = line._replace(cells={**line.cells, **defaults.parameters, **own})
    if line.problem:
        row = make_row(line.number, line.cells, defaults)
        # Keep only the id: a retry must not pay for the readable rest of an invalid line.
        yield RefusedRow(row.id, line.number, line.problem, {"id": row.id})
    elif not style_name:
        for style in defaults.styles.chosen or (None,):
            yield from _make_variants(line, defaults, style)
    elif style_name in defaults.styles.known:
        yield from _make_variants(line, defaults, defaults.styles.known[style_name])
    else:
        row = make_row(line.number, line.cells, defaults)
        reason = f"there {describe_unknown_style(style_name, defaults.styles.known)}"
        cells = row.cells if isinstance(row, RefusedRow) else line.cells
        yield RefusedRow(row.id, line.number, reason, cells)


def make_row(
    line: int,
    cells: Mapping[str, str],
    defaults: RowDefaults = _NO_DEFAULTS,
    style: Style | None = None,
    *,
    version: str | None = None,
    variant: int = 1,
) -> Row | RefusedRow:
    """Make a row from the cells of one line, which name the style if there is one."""
    prompt, rights = defaults.prompt, defaults.rights
    filled = {name: text.strip() for name, text in cells.items() if text and text.strip()}
    values: dict[str, Any] = {name: filled[name] for name in _REQUEST_COLUMNS if name in filled}
    row_cells = cells
    if prompt is not None and "prompt" not in values:
        values["prompt"] = prompt
        # Keep the prompt, so that a retry from the manifest of failed rows is the same row.
        row_cells = {**cells, "prompt": prompt}
    images, problems = _parse_references(filled)
    row_id = filled.get("id") or _make_id(images, values)
    problems += _find_id_problems(filled.get("id", ""))
    problems += _find_prompt_problems(filled.get("prompt", ""))
    problems += [
        problem
        for image in images
        for problem in find_reference_problems(image, defaults.base_url)
    ]
    denied = [problem for image in images if (problem := find_rights_problem(image, rights))]
    problems += denied
    located = [normalize_reference(image, rights.folder) for image in images]
    if located != images:
        # The manifest of failed rows is in another folder, where relative paths would break.
        row_cells = {**row_cells, **_format_references(filled, located)}
    if not (images or problems or "prompt" in filled) and (
        prompt is not None or style is not None
    ):
        # Otherwise an empty reference cell would be paid for as text to image.
        problems.append("the row has neither an image nor a prompt of its own; add one of them")
    if style is not None or is_template(values.get("prompt", "")):
        problems += _apply_style(values, style, cells)
    if images:
        values["image_urls"] = located[:1]  # that there are several is a problem already
    name, style_name = "", None if style is None else style.name
    try:
        checked = _validate_values(values)
        name = build_output_path(row_id, style_name, cells, defaults.names, checked.output_format)
    except ValidationError as error:
        problems += [_format_error(problem) for problem in error.errors()]
    except ValueError as error:
        problems.append(str(error))
    if problems:
        # Without an image, a filled-in prompt would turn the row into valid text to image.
        row_cells = row_cells if images else cells
        # The manifest of failed rows may be local, and must not give a row more rights.
        kept_cells = {"id": row_id} if denied else row_cells
        return RefusedRow(row_id, line, "; ".join(problems), kept_cells)
    if defaults.names is not None and "output" not in filled:
        row_cells = {**row_cells, "output": name}
    return Row(
        id=row_id,
        line=line,
        values=values,
        key=compute_key(checked, values["prompt"], values.get("image_urls", ()), variant=variant),
        name=name_variant(name, variant),
        cells=row_cells,
        style=style_name,
        version=version,
        variant=variant,
    )


def _validate_values(values: dict[str, Any]) -> GenerationRequest:
    """Validate the values of a request, and return one with the same parameters.

    Raises:
        ValidationError: The values are invalid.
    """
    prompt = values.get("prompt", "")
    is_plain = all(text.isascii() for text in (prompt, *values.get("image_urls", ())))
    if not is_plain or not 0 < len(prompt) <= MAX_PROMPT_CHARACTERS or "extra" in values:
        return GenerationRequest(**values)
    parameters = [item for item in values.items() if item[0] not in ("prompt", "image_urls")]
    return _validate_parameters(tuple(parameters), "image_urls" in values)


@lru_cache(1_000)
def _validate_parameters(
    parameters: tuple[tuple[str, Any], ...], has_reference: bool
) -> GenerationRequest:
    references = ["any"] if has_reference else []
    return GenerationRequest(prompt="any", image_urls=references, **dict(parameters))


def _find_prompt_problems(prompt: str) -> list[str]:
    """Return why the text of a row's own prompt cannot be meant as one."""
    if is_missing_value(prompt):
        return [f"prompt is {prompt!r}, a missing value; give the row a prompt"]
    if _WEB_URL.match(prompt) and looks_like_image("prompt", prompt):
        return ["prompt is the URL of an image; move it to a column `image`"]
    return []


def find_reference_problems(image: str, base_url: str | None = None) -> list[str]:
    """Return the reasons why the text of a reference image makes it unusable for the service.

    Args:
        image: The reference as the manifest has it.
        base_url: The service, which must reach the reference; None for no check.
    """
    problem = _find_reference_problem(image, base_url)
    return [problem] if problem else []


def _find_reference_problem(image: str, base_url: str | None) -> str | None:
    plain = PLAIN_URL.fullmatch(image)
    if plain and _is_reachable(plain[1], base_url):
        return None
    shown = f"image {redact_url(image)[:100]!r}"
    is_own = classify_location(image) in (LocationKind.LOCAL, LocationKind.PRIVATE)
    if not is_own and INVISIBLE_CHARACTERS.search(image):
        # A URL parser would drop them silently.
        return f"{shown} contains an invisible character"
    parts = _split_url(image)
    host = parts.hostname
    if parts.scheme not in ("http", "https") or not host:
        problem = find_location_problem(image)
        if problem and _WEB_URL.search(image, 1):
            text = redact_text(image)[:100]
            problem = f"image {text!r} holds other text beside a URL; keep only the URL"
        return problem
    return _find_url_problem(image, parts, host, shown, base_url)


def _find_url_problem(
    image: str, parts: SplitResult, host: str, shown: str, base_url: str | None
) -> str | None:
    problem = None
    if parts.username is not None or parts.password is not None:
        problem = (
            f"image at {host} has a user name or password in its URL; use a signed URL instead"
        )
    elif _SEVERAL_URLS.search(image):
        problem = f"{shown} holds several URLs; use a column `images`, or a row for each of them"
    elif image[-1] in ",;|'\"":
        problem = f"{shown} ends with {image[-1]!r}; remove it"
    elif any(entity in image.partition("?")[2].lower() for entity in _HTML_ENTITIES):
        problem = f"{shown} is written as in HTML; replace &amp; by &"
    elif _WHITE_SPACE.search(image):
        problem = f"{shown} contains white space; write %20 for a blank"
    elif host.startswith(_LINK_LOCAL):
        problem = f"{shown} is at a link-local address, which the service cannot reach"
    elif not _is_reachable(host, base_url):
        problem = (
            f"{shown} is on this machine or a private network, which the service cannot reach; "
            "give a public URL, or the file itself with a staging location"
        )
    return problem


@lru_cache(1_000)
def _is_reachable(host: str, base_url: str | None) -> bool:
    """Whether the service can reach a host, judged by its text; None for no check of its own."""
    if host.startswith(_LINK_LOCAL):
        return False
    return (
        not base_url or is_public_host(host) or not is_public_host(_split_url(base_url).hostname)
    )


def list_references(cells: Mapping[str, str]) -> list[str]:
    """Return the references in the cells of a row; none if they are invalid."""
    filled = {name: text.strip() for name, text in cells.items() if text and text.strip()}
    return _parse_references(filled)[0]


def name_variant(name: str, variant: int) -> str:
    """Return the name of a variant. No id gives it: its tilde is followed by hexadecimals."""
    return name if variant == 1 else f"{name}~v{variant}"


def parse_variants(text: str) -> range:
    """Parse a number of variants such as `3`, or a single one such as `only 2`.

    Raises:
        ValueError: It is neither.
    """
    if only := _ONLY_VARIANT.fullmatch(text):
        return range(int(only[1]), int(only[1]) + 1)
    if not re.fullmatch(r"\d{1,3}", text) or not 1 <= int(text) <= MAX_VARIANTS:
        raise ValueError(f"variants {text!r:.40} is not a number from 1 to {MAX_VARIANTS}")
    return range(1, int(text) + 1)


def _make_variants(
    line: Line, defaults: RowDefaults, style: Style | None
) -> Iterator[Row | RefusedRow]:
    styled = line.cells if style is None else {**line.cells, "style": style.name}
    text = styled.get("variants", "").strip()
    if not text and style is not None:
        text = str(style.variants)
    try:
        numbers = parse_variants(text) if text else range(1, 2)
    except ValueError as error:
        row = make_row(line.number, styled, defaults, style)
        yield RefusedRow(row.id, row.line, str(error), row.cells)
        return
    for number in numbers:
        cells = styled
        if text and (len(numbers) > 1 or number > 1):
            # Kept as a cell, so that a retry from the manifest of failed rows is the same row.
            cells = {**cells, "variants": f"only {number}"}
        yield make_row(line.number, cells, defaults, style, version=line.version, variant=number)


def _apply_style(
    values: dict[str, Any], style: Style | None, cells: Mapping[str, str]
) -> list[str]:
    """Render the prompt, and add the style's parameters that the row does not set."""
    where, prompt = "prompt", values.get("prompt")
    try:
        if prompt is not None and is_template(prompt):
            prompt = _render_prompt(prompt, cells)
        if style is not None:
            where = f"style {style.name!r}"
            prompt = style.render_prompt(prompt, cells)
    except ValueError as error:
        # A placeholder, so that validation does not report the prompt as missing too.
        values.setdefault("prompt", "invalid template")
        return [f"{where}: {error}"]
    values["prompt"] = prompt
    if style is not None:
        values |= style.parameters | values
    return []


def _render_prompt(prompt: str, cells: Mapping[str, str]) -> str:
    template = parse_template(prompt)
    if "prompt" in template.columns:
        raise ValueError("a prompt cannot contain itself, `{{ prompt }}`")
    return template.render(cells)


def _parse_references(filled: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Return the references of a row, and the problems of their column."""
    images = [filled["image"]] if "image" in filled else []
    text = filled.get("images")
    if text is None:
        return images, []
    if images:
        return images, ["the row has both `image` and `images`; remove one of them"]
    problem = None
    if text.startswith("["):
        images, problem = _parse_list(text)
    else:
        # A comma separates URLs only where the next one begins: paths and queries hold commas.
        images = [part for part in _SEPARATOR.split(text.rstrip("|;, ")) if part]
    if len(images) > 1:
        problem = (
            f"the row has {len(images)} reference images and the service takes one; give each "
            "image a row of its own"
        )
    return images, [problem] if problem else []


def _parse_list(text: str) -> tuple[list[str], str | None]:
    """Return the references in a JSON list, or why there are none."""
    try:
        images = json.loads(text)
    except (ValueError, RecursionError):
        return [], f"images {redact_text(text)[:60]!r} is not a valid JSON list"
    if not all(isinstance(image, str) for image in images):
        return [], f"images {redact_text(text)[:60]!r} must be a JSON list of strings"
    problem = find_cell_problem({"images": " ".join(images)})
    return [] if problem else images, problem


def _format_references(filled: Mapping[str, str], images: list[str]) -> dict[str, str]:
    return {"image": images[0]} if "image" in filled else {"images": json.dumps(images)}


def _make_id(images: list[str], values: dict[str, Any]) -> str:
    # A single reference is hashed as text, not as a list, to keep the ids of existing outputs.
    hashed = images[0] if len(images) == 1 else images or None
    digest = hashlib.sha256(json.dumps([hashed, values], sort_keys=True).encode()).hexdigest()[:12]
    stem = PurePosixPath(unquote(_split_url(images[0]).path)).stem if images else ""
    return f"{stem}-{digest}" if stem else digest


def _find_id_problems(row_id: str) -> list[str]:
    if len(row_id) > MAX_ID_CHARACTERS:
        return [f"id has {len(row_id):,} characters; the limit is {MAX_ID_CHARACTERS}"]
    problem = find_text_problem(row_id)
    return [f"id {row_id!r:.80} {problem}; ids name files"] if problem else []


def _split_url(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")


def _format_error(problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    if not where:
        return str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "missing":
        return f"{where} is missing; give the row one, or set a prompt for all rows"
    return f"{where} {problem['input']!r:.60}: {problem['msg']}"
