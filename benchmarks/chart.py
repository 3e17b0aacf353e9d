"""Bars as SVG, and tables between markers of a page. No plotting library."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

OURS = "this package"
WIDTH, LABEL, BAR, GAP = 760, 250, 22, 8


def bars(title: str, unit: str, values: Sequence[tuple[str, float]], *, limit: float = 0) -> str:
    """A horizontal bar for each value, ours in another colour; `limit` is a dashed line."""
    most = max([limit, *(value for _, value in values)]) or 1
    scale = (WIDTH - LABEL - 80) / most
    height = 40 + len(values) * (BAR + GAP)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}"',
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="8" y="20" font-weight="bold">{escape(title)}</text>',
    ]
    for number, (label, value) in enumerate(values):
        y = 34 + number * (BAR + GAP)
        colour = "#1f6feb" if label.startswith(OURS) else "#9aa5b1"
        lines += [
            f'<text x="{LABEL - 8}" y="{y + 15}" text-anchor="end">{escape(label)}</text>',
            f'<rect x="{LABEL}" y="{y}" width="{value * scale:.1f}" height="{BAR}"',
            f'fill="{colour}"/>',
            f'<text x="{LABEL + value * scale + 6:.1f}" y="{y + 15}">{value:.3g} {unit}</text>',
        ]
    if limit:
        x = LABEL + limit * scale
        lines.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="30" y2="{height - 4}" stroke="#d1242f" '
            'stroke-dasharray="4 3"/>'
        )
    return "\n".join([*lines, "</svg>", ""])


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its first column to the left and the others to the right."""
    head = [f"| {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) - 1)]
    return "\n".join([*head, *(f"| {' | '.join(row)} |" for row in rows)])


def write_between_markers(page: Path, name: str, text: str) -> None:
    """Put the text between the page's two markers of that name.

    Raises:
        SystemExit: The page has no such markers.
    """
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found and found_end):
        raise SystemExit(f"{page} has no {begin} … {end}")
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")
