"""The name of a row's image: from its id and style, from a template, or as the row says."""

from __future__ import annotations

import re
from string import Formatter
from typing import TYPE_CHECKING

from prefect_flux_kontext.errors import ConfigurationError
from prefect_flux_kontext.storage.names import (
    IMAGE_ENDING,
    find_name_problem,
    find_text_problem,
    is_reserved,
    safe_part,
    safe_path,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

_ENDING = ".{ext}"
_LONGEST_PART = 80
_LITERAL = re.compile(r"[A-Za-z0-9._/-]*")
_SPELLED = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,79}~[0-9a-f]{12}")
"""A part that was made safe before, as it stands in the manifest of failed rows."""
_EXTENSIONS = {"jpg": "jpeg", "jpeg": "jpeg", "png": "png", "webp": "webp"}

Names = tuple[tuple[str, str | None], ...]
"""A template of names, taken apart: texts, each with the column that comes after it."""


def parse_path_template(text: str) -> Names:
    """Take a template such as `{id}/{style}.{ext}` apart.

    Raises:
        ConfigurationError: It is none; all that is wrong with it is told at once.
    """
    problems = []
    if not text.endswith(_ENDING):
        problems.append(f"it does not end in `{_ENDING}`: the kind of the image decides that")
    path = text.removesuffix(_ENDING)
    parts: list[tuple[str, str | None]] = []
    try:
        for literal, column, spec, conversion in Formatter().parse(path):
            parts.append((literal, column))
            if column is not None and (spec or conversion or not _is_plain(column)):
                told = (
                    f"{column}{f'!{conversion}' if conversion else ''}{f':{spec}' if spec else ''}"
                )
                problems.append(f"`{{{told}}}` is not a column alone")
            if column == "ext":
                problems.append("`{ext}` stands before its end")
    except ValueError as error:
        problems.append(str(error))
    shape = "".join(literal + ("x" if column is not None else "") for literal, column in parts)
    if not all(_LITERAL.fullmatch(literal) for literal, _ in parts):
        problems.append("outside of its columns it has other than letters, digits, . _ - and /")
    elif any(not part.strip(".-") or part[0] in ".-" for part in shape.split("/")):
        problems.append("a part between slashes is empty or begins with a dot or dash")
    elif problem := find_name_problem(shape):
        problems.append(problem)
    if problems:
        raise ConfigurationError(
            f"The output names {text!r:.200} cannot be used: {'; '.join(problems)}. They are like "
            "`{id}/{style}.{ext}`, with any column of the manifest."
        )
    return tuple(parts)


def _is_plain(column: str) -> bool:
    return bool(column.strip()) and not re.search(r"[.\[\]{}]", column) and not column.isdigit()


def output_path(
    row_id: str, style: str | None, cells: Mapping[str, str], names: Names | None, kind: str
) -> str:
    """The name of a row's image below the output, without extension.

    Args:
        row_id: The row's id.
        style: The row's style, where it has one.
        cells: The row's columns. `output` names the image itself.
        names: The template; None for `{id}/{style}`, or `{id}` where there is no style.
        kind: The output format.

    Raises:
        ValueError: It cannot have a name; says why.
    """
    output = cells.get("output", "").strip()
    if output:
        name, told = _given(output, kind), f"output {output!r:.80}"
    elif names is None:
        name = safe_path(row_id) if style is None else f"{safe_path(row_id)}/{safe_part(style)}"
        told = f"id {row_id!r:.80}"
    else:
        name = "".join(_inserted(part, row_id, style, cells) for part in names)
        told = f"the output name {name!r:.80}"
    if problem := find_name_problem(name):
        raise ValueError(f"{told} {problem}")
    return name


def _given(output: str, kind: str) -> str:
    problem = find_text_problem(output)
    ending = IMAGE_ENDING.search(output)
    parts = output[: ending.start()].split("/") if ending else output.split("/")
    if problem is None:
        if "://" in output:
            problem = "is a URL; it is a name below the output"
        elif "\\" in output:
            problem = "holds a backslash; folders are separated by slashes"
        elif any(not part.strip(". ") for part in parts):
            problem = "has a part that is empty"
        elif any(map(is_reserved, parts)):
            problem = "is reserved on Windows"
        elif max(map(len, parts)) > _LONGEST_PART and not all(map(_SPELLED.fullmatch, parts)):
            problem = f"has more than {_LONGEST_PART} characters between slashes"
        elif ending and _EXTENSIONS[ending[1].lower()] != kind:
            problem = f"is not {kind}, which the row's output_format is; change one of them"
    if problem:
        raise ValueError(f"output {output!r:.80} {problem}")
    return "/".join(part if _SPELLED.fullmatch(part) else safe_part(part) for part in parts)


def _inserted(
    part: tuple[str, str | None], row_id: str, style: str | None, cells: Mapping[str, str]
) -> str:
    literal, column = part
    match column:
        case None:
            return literal
        case "id":
            return literal + safe_path(row_id)
        case "style":
            if style is None:
                raise ValueError("the row has no style, which the output names need")
            return literal + safe_part(style)
        case _ if column not in cells:
            there = ", ".join(cells)[:200]
            raise ValueError(f"the output names need a column {column!r}; there are {there}")
        case _ if not cells[column].strip():
            raise ValueError(f"the column {column!r} is empty, which the output names need")
        case _:
            return literal + safe_part(cells[column].strip())
