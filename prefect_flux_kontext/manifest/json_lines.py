"""JSON Lines: an object on each line."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from prefect_flux_kontext.errors import ManifestError
from prefect_flux_kontext.manifest.lines import Columns, Line, as_cells
from prefect_flux_kontext.manifest.opening import text_lines

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_SHAPES = 1_000


def json_lines(url: str, renamed: Mapping[str, str]) -> Iterator[Line]:
    """The objects of a JSON Lines file in UTF-8, read as they are asked for.

    A line that is no object is a row that is refused: the others can be told from it.

    Raises:
        ManifestError: It is no JSON Lines file.
        Exception: What the filesystem or the decoder raises.
    """
    names: dict[tuple[str, ...], list[str]] = {}
    unseen = set(renamed.values())
    for number, line in enumerate(text_lines(url, line_ends_at_cr=False), start=1):
        text = line.strip()
        if not text:
            continue
        if number == 1 and text in ("[", "{", "[{"):
            raise ManifestError(
                f"The manifest {url} is JSON over several lines; write one object on each line."
            )
        if number == 1 and text.startswith(("<", "\udcff", "\udcfe")):
            raise ManifestError(
                f"The manifest {url} is not JSON Lines in UTF-8; it starts with {text[:30]!r}."
            )
        try:
            values = _object(text)
        except (ValueError, RecursionError) as error:
            yield Line(number, {}, _told(error))
            continue
        shape = tuple(values)
        if shape not in names:
            unseen.difference_update(shape)
            if len(names) == _SHAPES:
                names.clear()
            try:
                names[shape] = columns_of_object(url, shape, renamed)
            except ManifestError as error:
                yield Line(number, {}, error.message.rstrip("."))
                continue
        cells, problem = as_cells(dict(zip(names[shape], values.values(), strict=True)))
        yield Line(number, cells, problem)
    check_seen(url, unseen)


def columns_of_object(url: str, names: Sequence[str], renamed: Mapping[str, str]) -> list[str]:
    """The columns of one object, which may leave out what it will.

    Raises:
        ManifestError: They are no manifest's.
    """
    present = {meant: name for meant, name in renamed.items() if name in names}
    return Columns(url, names, present).names


def check_seen(url: str, unseen: set[str]) -> None:
    """After the last row: a column to be taken as another that stood nowhere is a mistake.

    Raises:
        ManifestError: There is such a column.
    """
    if unseen:
        raise ManifestError(f"No row of {url} has {sorted(unseen)}, which --columns names.")


def _object(text: str) -> dict[str, Any]:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("it is not in UTF-8") from None
    values = json.loads(text, object_pairs_hook=_without_twins, parse_constant=_no_constant)
    if not isinstance(values, dict):
        raise ValueError(f"it is not an object but {type(values).__name__} {text[:40]!r}")  # noqa: TRY004
    return values


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"it names {', '.join(twice)[:100]} twice")
    return made


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _told(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "the line is nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        return f"the line is not JSON: {error.msg} at character {error.colno}"
    if "integer string conversion" in str(error):
        return "the line holds a number of thousands of digits"
    return f"the line cannot be taken: {str(error)[:200]}"
