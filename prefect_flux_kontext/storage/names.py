"""What may name an image below the output, and what may not."""

from __future__ import annotations

import hashlib
import re
import unicodedata

_LONGEST_PART = 200
_LONGEST = 400
_OURS = frozenset(
    {
        "_ledger",
        "_results",
        "_gallery",
        "failed.csv",
        "gallery.html",
        "results.jsonl",
        "results.parquet",
    }
)
"""The batch's own, in the output's first folder."""

# Most ids are so plain that nothing more needs to be asked of them.
_PLAIN = re.compile(
    r"(?!(?:con|prn|aux|nul|com\d|lpt\d)$)[a-z0-9][a-z0-9_-]{0,60}[a-z0-9]", re.IGNORECASE
)
# Control characters, and those that turn or hide the text around them.
INVISIBLE_CHARACTERS = re.compile(
    "[\x00-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]"
)
IMAGE_ENDING = re.compile(r"\.(jpe?g|png|webp)$", re.IGNORECASE)


def find_text_problem(text: str) -> str | None:
    """Why a person's text cannot name a file, even when it is made safe."""
    if _PLAIN.fullmatch(text):
        return None
    if sign := INVISIBLE_CHARACTERS.search(text):
        return f"holds a character that cannot be seen ({sign.group()!a})"
    if text.startswith(("/", "\\")) or re.match(r"[A-Za-z]:[/\\]", text):
        return "is an absolute path"
    if ".." in re.split(r"[/\\]", text):
        return "leads out of the output"
    return "is reserved on Windows" if is_reserved(text) else None


def safe_part(text: str) -> str:
    """One part of a name, made of any text; texts that look the same make the same."""
    return safe_name(text if text.isascii() else unicodedata.normalize("NFC", text))


def safe_path(text: str) -> str:
    """A name made of an id, which keeps its folders where it is a plain relative path."""
    if _PLAIN.fullmatch(text):
        return text
    parts = text.split("/")
    if len(parts) == 1 or not all(parts) or "." in parts:
        return safe_part(text)
    return "/".join(map(safe_part, parts))


def find_name_problem(name: str) -> str | None:
    """Why a name, each part of it safe, cannot be that of an image."""
    if _PLAIN.fullmatch(name):
        return None
    parts = name.split("/")
    if parts[0].casefold() in _OURS:
        return f"is that of the batch's own {parts[0]}"
    if len(name) > _LONGEST or max(map(len, parts)) > _LONGEST_PART:
        return (
            f"has {len(name):,} characters; a name has at most {_LONGEST}, and {_LONGEST_PART} "
            "between slashes"
        )
    for part in parts:
        if is_reserved(part):
            return f"holds {part!r}, which is reserved on Windows"
    for folder in parts[:-1]:
        if IMAGE_ENDING.search(folder):
            return f"has a folder {folder!r} that is named like an image"
    return None


_LONGEST_NAME = 80


_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


def is_reserved(name: str) -> bool:
    """Whether Windows keeps the name for itself, whatever its extension."""
    return _RESERVED.fullmatch(name) is not None


def safe_name(text: str) -> str:
    """A file name made from any text: no folders, no surprises, at most 93 characters.

    Text that is no plain name is spelled with dashes and gets a tilde and a short hash of itself.
    No plain name has a tilde, so two different texts never share a name.
    """
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip(".-")
    if _RESERVED.fullmatch(plain):
        # Windows reserves them with any extension, so a hash behind does not help.
        plain = f"_{plain}"
    plain = plain[:_LONGEST_NAME] or "unnamed"
    if plain == text:
        return text
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:12]
    return f"{plain}~{digest}"
