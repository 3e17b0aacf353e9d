"""Safe names for images below the output."""

from __future__ import annotations

import hashlib
import re
import unicodedata

# Filesystems allow 255 bytes between slashes; suffixes and extension need some of them.
_MAX_COMPONENT_LENGTH = 200
MAX_ID_CHARACTERS = _MAX_COMPONENT_LENGTH
"""Ids name files, so the limit is that of a path segment."""
_MAX_LENGTH = 400

_RESERVED_NAMES = frozenset(
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
"""Names in the output's first folder that the batch itself uses."""

PLAIN_NAME = re.compile(
    r"(?!(?:con|prn|aux|nul|com\d|lpt\d)$)[a-z0-9][a-z0-9_-]{0,60}[a-z0-9]", re.IGNORECASE
)
"""A name that needs no further check. Most ids are such."""

# Control characters, and those that reverse or hide the text around them.
INVISIBLE_CHARACTERS = re.compile(
    "[\x00-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]"
)

# Characters of a safe name before its tilde and hash.
_MAX_SAFE_LENGTH = 80

# Names of devices on Windows, with or without an extension.
_WINDOWS_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)

IMAGE_ENDING = re.compile(r"\.(jpe?g|png|webp)$", re.IGNORECASE)


def find_text_problem(text: str) -> str | None:
    """Return why a user's text cannot name a file, even when made safe; None if it can."""
    if PLAIN_NAME.fullmatch(text):
        return None
    if sign := INVISIBLE_CHARACTERS.search(text):
        return f"contains an invisible character ({sign.group()!a})"
    if text.startswith(("/", "\\")) or re.match(r"[A-Za-z]:[/\\]", text):
        return "is an absolute path"
    if ".." in re.split(r"[/\\]", text):
        return "leads out of the output"
    return "is reserved on Windows" if is_reserved(text) else None


def make_safe_component(text: str) -> str:
    """Make a safe path component of any text; texts that look the same make the same one."""
    return make_safe_name(text if text.isascii() else unicodedata.normalize("NFC", text))


def make_safe_path(text: str) -> str:
    """Make a safe name of an id. The folders of a plain relative path are kept."""
    if PLAIN_NAME.fullmatch(text):
        return text
    parts = text.split("/")
    if len(parts) == 1 or not all(parts) or "." in parts:
        return make_safe_component(text)
    return "/".join(map(make_safe_component, parts))


def find_name_problem(name: str) -> str | None:
    """Return why a name of safe components cannot be that of an image; None if it can."""
    if PLAIN_NAME.fullmatch(name):
        return None
    parts = name.split("/")
    if parts[0].casefold() in _RESERVED_NAMES:
        return f"is reserved for the batch's own {parts[0]}"
    if len(name) > _MAX_LENGTH or max(map(len, parts)) > _MAX_COMPONENT_LENGTH:
        return (
            f"has {len(name):,} characters; a name has at most {_MAX_LENGTH}, and "
            f"{_MAX_COMPONENT_LENGTH} between slashes"
        )
    for part in parts:
        if is_reserved(part):
            return f"holds {part!r}, which is reserved on Windows"
    for folder in parts[:-1]:
        if IMAGE_ENDING.search(folder):
            return f"has a folder {folder!r} that is named like an image"
    return None


def is_reserved(name: str) -> bool:
    """Whether Windows reserves the name, with any extension."""
    return _WINDOWS_DEVICE.fullmatch(name) is not None


def make_safe_name(text: str) -> str:
    """Make a safe file name of any text: one path component of at most 93 characters.

    A plain name stays as it is. In any other text, dashes replace unsafe characters, and a tilde
    and a short hash of the text are appended. No plain name has a tilde, so two different texts
    never share a name.
    """
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip(".-")
    if _WINDOWS_DEVICE.fullmatch(plain):
        # Windows reserves device names with any suffix, so the hash alone does not help.
        plain = f"_{plain}"
    plain = plain[:_MAX_SAFE_LENGTH] or "unnamed"
    if plain == text:
        return text
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:12]
    return f"{plain}~{digest}"
