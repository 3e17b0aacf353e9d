"""The rows of a line: one, or one for each of the chosen styles."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from prefect_flux_kontext.errors import ConfigurationError
from prefect_flux_kontext.manifest.naming import parse_names
from prefect_flux_kontext.manifest.rows import RefusedRow, make_row
from prefect_flux_kontext.styles.reading import Styles, chosen_styles, unknown_style
from prefect_flux_kontext.styles.templates import is_template, template

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from prefect_flux_kontext.manifest.lines import Line
    from prefect_flux_kontext.manifest.naming import Names
    from prefect_flux_kontext.manifest.rows import Row
    from prefect_flux_kontext.styles.style import Style


class Recipe(NamedTuple):
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


def make_recipe(
    prompt: str | None, styles: str | Sequence[str] | None, names: str | None
) -> Recipe:
    """Look at what is given for all rows, before the first is read.

    Raises:
        ConfigurationError: The prompt is a template that cannot be used, there is no such style,
            or the names are no template of names.
    """
    if prompt is not None and is_template(prompt):
        try:
            template(prompt)
        except ValueError as error:
            raise ConfigurationError(f"The prompt for all rows: {error}.") from None
    return Recipe(prompt, chosen_styles(styles), None if names is None else parse_names(names))


def rows_of_line(line: Line, recipe: Recipe) -> Iterator[Row | RefusedRow]:
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
        reason = f"there {unknown_style(own, recipe.styles.known)}"
        yield RefusedRow(row.id, line.number, reason, line.cells)


def _row(line: Line, recipe: Recipe, style: Style | None) -> Row | RefusedRow:
    return make_row(
        line.number,
        line.cells if style is None else {**line.cells, "style": style.name},
        prompt=recipe.prompt,
        style=style,
        names=recipe.names,
        version=line.version,
        folder=recipe.folder,
    )
