"""The fenced blocks of the documentation, and what the comments above them say.

`<!-- file: NAME -->` above a block: the reader saves it under that name.
`<!-- not run: REASON -->`: it cannot run here.
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
    """A fenced block: its page, its first line there, its language, its text.

    `file` is the name to save it under, `not_run` the reason why it does not run; mostly neither.
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
    """The blocks of a page, in their order."""
    return blocks_in(PAGES[page].read_text(encoding="utf-8"), page)


def blocks_in(text, page):
    """The blocks of a text."""
    found, before = [], None
    for token in MarkdownIt().parse(text):
        if token.type == "fence":
            comment = _COMMENT.fullmatch(before.content) if before else None
            said = {comment[1].replace(" ", "_"): comment[2]} if comment else {}
            language = token.info.strip().split(" ")[0]
            found.append(Block(page, token.map[0] + 1, language, token.content, **said))
        before = token if token.type == "html_block" else None
    return found
