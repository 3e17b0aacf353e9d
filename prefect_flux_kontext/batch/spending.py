"""What was spent, by the values that rows have in columns of the manifest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from pydantic import BaseModel, Field

from prefect_flux_kontext.redaction import make_showable, redact_text

if TYPE_CHECKING:
    from prefect_flux_kontext.manifest.row import Row

OTHER = "other"
"""The value of rows that have none, or whose payment recorded none."""

REQUEST_COLUMNS = ("prompt", "mode", "aspect_ratio", "output_format", "provider")
"""Columns whose value is the one that was sent to the service."""

STANDARD_COLUMNS = frozenset({"id", "style", *REQUEST_COLUMNS})
"""Columns by which money can be counted whatever the manifest has."""

_MAX_VALUE_CHARACTERS = 200
_MAX_GROUPS = 100
MAX_GROUPS_SHOWN = 20


class GroupSpend(BaseModel):
    """What the rows with the same values in some columns have cost."""

    columns: dict[str, str] = Field(description="Column name to value.")
    rows: int = Field(default=0, description="Rows that were, or may have been, paid for.")
    spent: float = Field(default=0.0, description="Dollars for what was accepted.")
    doubtful: float = Field(default=0.0, description="Dollars more that may have been billed.")

    def __str__(self) -> str:
        values = ", ".join(f"{name}={value}" for name, value in self.columns.items())
        more = f", ${self.doubtful:,.2f} more may have been billed" if self.doubtful else ""
        rows = "1 row" if self.rows == 1 else f"{self.rows:,} rows"
        return f"{f'${self.spent:,.2f}':>9}  {make_showable(values)}: {rows}{more}"


class Spending:
    """Dollars and rows by the values of the named columns."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self.names = tuple(names)
        self._groups: dict[tuple[str, ...], tuple[int, float, float]] = {}

    def add(
        self, columns: Mapping[str, str], spent: float, doubtful: float = 0.0, rows: int = 1
    ) -> None:
        """Count the money of rows with these values; a missing value counts as `other`."""
        group = tuple(columns.get(name) or OTHER for name in self.names)
        before = self._groups.get(group, (0, 0.0, 0.0))
        self._groups[group] = (before[0] + rows, before[1] + spent, before[2] + doubtful)

    def add_difference(self, new: Spending, old: Spending) -> None:
        """Count what `new` has more than `old`, which have the same columns."""
        for sign, spending in ((1, new), (-1, old)):
            for group, (rows, spent, doubtful) in spending._groups.items():  # noqa: SLF001
                columns = dict(zip(spending.names, group, strict=True))
                self.add(columns, sign * spent, sign * doubtful, sign * rows)

    def sum_dollars(self, column: str, value: str) -> float:
        """Return the dollars that were, or may have been, spent on rows with a value."""
        at = self.names.index(column)
        return sum(
            spent + doubtful
            for group, (_, spent, doubtful) in self._groups.items()
            if group[at] == value
        )

    def list_groups(self) -> list[GroupSpend]:
        """Return the hundred dearest groups, and the others as one. None without columns."""
        if not self.names:
            return []
        groups = [
            GroupSpend(
                columns=dict(zip(self.names, group, strict=True)),
                rows=rows,
                spent=round(spent, 6),
                doubtful=round(doubtful, 6),
            )
            for group, (rows, spent, doubtful) in self._groups.items()
            if rows or round(spent + doubtful, 6)
        ]
        groups.sort(key=lambda group: (-group.spent, -group.doubtful, *group.columns.values()))
        return shorten_groups(groups, _MAX_GROUPS)


def label_row(row: Row, names: Sequence[str]) -> dict[str, str]:
    """Return the values of a row in some columns, as they are recorded with its payment."""
    if not names:
        return {}
    sent = {name: getattr(row.request, name) for name in REQUEST_COLUMNS}
    values = {**row.cells, **sent, "id": row.id, "style": row.style}
    return {name: clean_value(values.get(name)) for name in names}


def clean_value(value: object) -> str:
    """Return a value as groups have it: short, without secrets, `other` where empty."""
    return redact_text(str(value or "")).strip()[:_MAX_VALUE_CHARACTERS] or OTHER


def describe_groups(groups: Sequence[GroupSpend]) -> list[str]:
    """Return a line for each of the dearest groups, and one for the others."""
    return [str(group) for group in shorten_groups(groups)]


def shorten_groups(groups: Sequence[GroupSpend], most: int = MAX_GROUPS_SHOWN) -> list[GroupSpend]:
    """Return the first groups, and the others as one."""
    if len(groups) <= most + 1:
        return list(groups)
    rest = groups[most:]
    return [
        *groups[:most],
        GroupSpend(
            columns=dict.fromkeys(groups[0].columns, f"… {len(rest):,} more"),
            rows=sum(group.rows for group in rest),
            spent=round(sum(group.spent for group in rest), 6),
            doubtful=round(sum(group.doubtful for group in rest), 6),
        ),
    ]
