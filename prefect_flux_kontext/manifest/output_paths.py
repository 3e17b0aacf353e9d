"""Output paths of images: from the row's id and style, from a template, or from the row itself."""

from __future__ import annotations

import re
from collections.abc import Mapping
from string import Formatter

from prefect_flux_kontext.errors import ConfigurationError
from prefect_flux_kontext.storage.names import (
    IMAGE_ENDING,
    PLAIN_NAME,
    find_name_problem,
    find_text_problem,
    is_reserved,
    make_safe_component,
    make_safe_path,
)

PathTemplate = tuple[tuple[str, str | None], ...]
"""A parsed template: literal texts, each with the column that follows it or None."""

_SUFFIX = ".{ext}"
# Leaves room for the tilde and hash that `make_safe_component` adds to a name.
_MAX_SEGMENT_CHARACTERS = 80
_LITERAL = re.compile(r"[A-Za-z0-9._/-]*")
# A segment that `make_safe_component` returned before, as in the manifest of failed rows.
_SAFE_SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,79}~[0-9a-f]{12}")
_FORMATS = {"jpg": "jpeg", "jpeg": "jpeg", "png": "png", "webp": "webp"}


def parse_path_template(text: str) -> PathTemplate:
    """Parse a template of output names such as `{id}/{style}.{ext}`.

    Raises:
        ConfigurationError: The template is invalid. The message lists every problem.
    """
    problems = []
    if not text.endswith(_SUFFIX):
        problems.append(f"it must end in `{_SUFFIX}`, which becomes the extension of the image")
    path = text.removesuffix(_SUFFIX)
    fields: list[tuple[str, str | None]] = []
    try:
        for literal, column, spec, conversion in Formatter().parse(path):
            fields.append((literal, column))
            if column is not None and (spec or conversion or not _is_column_name(column)):
                field = (
                    f"{column}{f'!{conversion}' if conversion else ''}{f':{spec}' if spec else ''}"
                )
                problems.append(f"`{{{field}}}` is not a plain column name")
            if column == "ext":
                problems.append("`{ext}` may appear only at the end")
    except ValueError as error:
        problems.append(str(error))
    shape = "".join(literal + ("x" if column is not None else "") for literal, column in fields)
    if not all(_LITERAL.fullmatch(literal) for literal, _ in fields):
        problems.append("text outside columns may contain only letters, digits, . _ - and /")
    elif any(not segment.strip(".-") or segment[0] in ".-" for segment in shape.split("/")):
        problems.append("a path segment is empty or starts with a dot or dash")
    elif problem := find_name_problem(shape):
        problems.append(problem)
    if problems:
        raise ConfigurationError(
            f"The output names {text!r:.200} cannot be used: {'; '.join(problems)}. Use a "
            "template like `{id}/{style}.{ext}`, with any column of the manifest."
        )
    return tuple(fields)


def _is_column_name(column: str) -> bool:
    return bool(column.strip()) and not re.search(r"[.\[\]{}]", column) and not column.isdigit()


def build_output_path(
    row_id: str,
    style: str | None,
    cells: Mapping[str, str],
    template: PathTemplate | None,
    output_format: str,
) -> str:
    """Build the path of a row's image below the output, without extension.

    A value in the column `output` takes precedence over the template, whose default is
    `{id}/{style}`, or `{id}` without a style. A ValueError says why there is no valid path.
    """
    output = cells.get("output", "").strip()
    if output:
        path, subject = _clean_output(output, output_format), f"output {output!r:.80}"
    elif template is None:
        if style is None and PLAIN_NAME.fullmatch(row_id):
            return row_id
        path = make_safe_path(row_id)
        if style is not None:
            path = f"{path}/{make_safe_component(style)}"
        subject = f"id {row_id!r:.80}"
    else:
        path = "".join(_render_field(field, row_id, style, cells) for field in template)
        subject = f"the output name {path!r:.80}"
    if problem := find_name_problem(path):
        raise ValueError(f"{subject} {problem}")
    return path


def _clean_output(output: str, output_format: str) -> str:
    """Check a row's own output path, make its segments safe, or raise a ValueError."""
    problem = find_text_problem(output)
    ending = IMAGE_ENDING.search(output)
    segments = output[: ending.start()].split("/") if ending else output.split("/")
    is_too_long = max(map(len, segments)) > _MAX_SEGMENT_CHARACTERS
    if problem is None:
        if "://" in output:
            problem = "is a URL; use a path below the output"
        elif "\\" in output:
            problem = "contains a backslash; separate folders with slashes"
        elif any(not segment.strip(". ") for segment in segments):
            problem = "has an empty path segment"
        elif any(map(is_reserved, segments)):
            problem = "is reserved on Windows"
        elif is_too_long and not all(map(_SAFE_SEGMENT.fullmatch, segments)):
            problem = f"has more than {_MAX_SEGMENT_CHARACTERS} characters between slashes"
        elif ending and _FORMATS[ending[1].lower()] != output_format:
            problem = (
                f"has the extension {ending[1]}, but the row's output_format is {output_format}; "
                "change one of them"
            )
    if problem:
        raise ValueError(f"output {output!r:.80} {problem}")
    return "/".join(
        segment if _SAFE_SEGMENT.fullmatch(segment) else make_safe_component(segment)
        for segment in segments
    )


def _render_field(
    field: tuple[str, str | None], row_id: str, style: str | None, cells: Mapping[str, str]
) -> str:
    literal, column = field
    match column:
        case None:
            return literal
        case "id":
            return literal + make_safe_path(row_id)
        case "style":
            if style is None:
                raise ValueError("the output names use {style}, but the row has no style")
            return literal + make_safe_component(style)
        case _ if column not in cells:
            raise ValueError(
                f"the output names use a column {column!r} that the manifest does not have; its "
                f"columns are {', '.join(cells)[:200]}"
            )
        case _ if not cells[column].strip():
            raise ValueError(f"the output names use the column {column!r}, which is empty")
        case _:
            return literal + make_safe_component(cells[column].strip())
