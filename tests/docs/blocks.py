"""The fenced blocks of the documentation and the comments above them.

`<!-- file: NAME -->` saves the block under that name, `<!-- not run: REASON -->` skips it.
"""

import re
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
PAGES = {
    str(path.relative_to(ROOT)): path
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}
_COMMENT = re.compile(r"<!-- (file|not run): (.+?) -->\s*", re.DOTALL)


class Block(NamedTuple):
    """A fenced block.

    Attributes:
        page: The page it is on.
        line: Its first line there.
        language: Its language, empty if not given.
        text: Its content.
        file: The name to save it under, if any.
        not_run: Why it is not run; None for a block that runs.
    """

    page: str
    line: int
    language: str
    text: str
    file: str | None = None
    not_run: str | None = None

    def __str__(self):
        return f"{self.page}:{self.line} ({self.language or 'no language'})"


def blocks_of(page):
    """Return the blocks of a page in order."""
    return blocks_in(PAGES[page].read_text(encoding="utf-8"), page)


def blocks_in(text, page):
    """Return the blocks of a Markdown text in order."""
    found, before = [], None
    for token in MarkdownIt().parse(text):
        if token.type == "fence":
            comment = _COMMENT.fullmatch(before.content) if before else None
            options = {comment[1].replace(" ", "_"): comment[2]} if comment else {}
            language = token.info.strip().split(" ")[0]
            found.append(Block(page, token.map[0] + 1, language, token.content, **options))
        before = token if token.type == "html_block" else None
    return found
