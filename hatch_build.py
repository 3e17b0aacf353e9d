"""Makes the README's relative links absolute when the package is built: an index has no files."""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_TARGET = re.compile(r"""(\]\(|\bsrc="|\bhref=")(?![a-z]+:|#)([^)"\s]+)""")
_IMAGE = re.compile(r"\.(png|jpe?g|gif|svg|webp)$")


class ReadmeHook(MetadataHookInterface):
    """Gives the metadata the README, with links to the project's repository."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set the field `readme`."""
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        if repository := metadata.get("urls", {}).get("Repository"):
            text = make_links_absolute(text, repository)
        metadata["readme"] = {"content-type": "text/markdown", "text": text}


def make_links_absolute(text: str, repository: str) -> str:
    """Return Markdown whose relative links and images lead to the repository's main branch."""

    def to_url(match: re.Match[str]) -> str:
        kind = "raw" if _IMAGE.search(match[2]) else "blob"
        return f"{match[1]}{repository}/{kind}/main/{match[2]}"

    return _TARGET.sub(to_url, text)
