"""The table in docs/reliability.md, written by the large chaos run."""

import os
import platform
import re
from decimal import Decimal
from pathlib import Path

_PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
_BEGIN, _END = "<!-- written by make chaos -->", "<!-- end -->"
SIMULATED = "simulated"
_COLUMNS = {
    "runs": "runs",
    "rows": "rows",
    "kills": "kills",
    "billed": "billed, $",
    "paid_twice": "paid twice",
    "lost": "lost",
    "missing": "missing",
    "problems": "other findings",
    "unknown_held": "unknown, held",
}


def format_table(lines, *, minutes, missing):
    """Format the totals of a run by scenario, with their sum, as Markdown.

    Args:
        lines: The totals of the scenarios.
        minutes: How long their cases took, one after the other.
        missing: Number of cases that have not run.
    """
    real = [line for name, line in lines.items() if not name.startswith(SIMULATED)]
    sums = {column: sum(getattr(line, column) for line in real) for column in _COLUMNS}
    rows = [
        ["scenario", *_COLUMNS.values()],
        ["---"] * (len(_COLUMNS) + 1),
        *(
            [name, *(_format_number(getattr(line, c)) for c in _COLUMNS)]
            for name, line in lines.items()
        ),
        [
            "**sum of what was not simulated**",
            *(f"**{_format_number(number)}**" for number in sums.values()),
        ],
    ]
    text = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    broken_off = f", interrupted: {missing} cases are missing" if missing else ""
    machine = (
        f"{os.cpu_count()} cores, which did other work too, Python {platform.python_version()}"
    )
    return f"{text}\n\nOne run of {minutes:.0f} minutes on {machine}{broken_off}."


def _format_number(number):
    return f"{number:,.2f}" if isinstance(number, Decimal) else f"{number:,}"


def write_table(text):
    """Write the table between the marks in the page."""
    page = _PAGE.read_text()
    marks = re.compile(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", re.DOTALL)
    assert marks.search(page), f"no marks in {_PAGE}"
    _PAGE.write_text(marks.sub(lambda _: f"{_BEGIN}\n{text}\n{_END}", page, count=1))
