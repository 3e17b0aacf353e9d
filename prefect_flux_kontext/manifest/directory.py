"""A folder, a prefix or a glob of images as a manifest of its own."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import fsspec
from fsspec.core import split_protocol
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from prefect_flux_kontext.errors import ManifestError
from prefect_flux_kontext.manifest.columns import Line, find_cell_problem
from prefect_flux_kontext.manifest.formats import detect_format
from prefect_flux_kontext.references.identity import read_version
from prefect_flux_kontext.storage.names import IMAGE_ENDING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_GLOB = re.compile(r"[*?\[]")
_LEDGER = "_ledger"
_TABLES = frozenset({".csv", ".tsv", ".tab", ".json", ".jsonl", ".ndjson", ".parquet", ".pq"})
_DEEPEST = 64


@dataclass
class ImageFolder:
    """Images below a folder, told by their names.

    Attributes:
        url: As it was given, for messages.
        fs: The filesystem.
        root: The folder's path there.
        pattern: What the paths below it are to match; None for all of them.
        deepest: Folders below one another that are looked into.
        output: The real path of the output, where it is on the same filesystem.
        left_out: Files that were none, when the folder was last read.
    """

    url: str
    fs: Any = field(repr=False)
    root: str
    pattern: re.Pattern[str] | None
    deepest: int
    output: str | None
    left_out: int = 0

    def lines(self) -> Iterator[Line]:
        """The images, folder by folder, each sorted by name and numbered from 1.

        The cells are `id` (the path below the folder, without extension), `image` (a URL, or a
        path where the folder is local), `file` (its name) and `folder` (where it is below).

        Raises:
            ManifestError: There are no images, or the output is the folder itself.
            Exception: What the filesystem raises.
        """
        root = _real_path(self.fs, self.root)
        if self.output is not None and f"{root}/".startswith(f"{self.output}/"):
            raise ManifestError(
                f"The output holds the images of {self.url}, so that the next run would pay for "
                "its own results; choose another, such as a folder inside."
            )
        self.left_out = number = 0
        for folder, names, versions in self._folders():
            for name, told in zip(names, _ids(names), strict=True):
                number += 1
                path = f"{self.root}/{folder}{name}"
                local = isinstance(self.fs, LocalFileSystem)
                cells = {
                    "id": f"{folder}{told}",
                    "image": path if local else str(self.fs.unstrip_protocol(path)),
                    "file": name,
                    "folder": folder.rstrip("/"),
                }
                yield Line(number, cells, find_cell_problem(cells), versions.get(name))
        if not number:
            others = f", only {self.left_out:,} other files" if self.left_out else ""
            raise ManifestError(
                f"There are no images at {self.url}{others}: none is named .jpg, .jpeg, .png or "
                ".webp."
            )

    def _folders(self) -> Iterator[tuple[str, list[str], dict[str, str]]]:
        """The folders with images: path below the root, names, and versions by name."""
        waiting = [""]
        while waiting:
            folder = waiting.pop()
            names, versions, inside = [], {}, []
            entries = self._listed(folder)
            if folder and any(name == _LEDGER for name, _ in entries):
                # The output of another batch: its images are results, and paid for already.
                self.left_out += 1
                continue
            for name, entry in entries:
                if name == _LEDGER:
                    continue
                if entry["type"] == "directory":
                    inside.append(f"{folder}{name}/")
                elif self._is_image(f"{folder}{name}", entry):
                    names.append(name)
                    if version := read_version(entry):
                        versions[name] = version
            if folder.count("/") < self.deepest:
                waiting += sorted(inside, reverse=True)
            if names:
                yield folder, sorted(names), versions

    def _listed(self, folder: str) -> list[tuple[str, Mapping[str, Any]]]:
        """What is in a folder, without what is hidden and the output."""
        # A listing of before may be old by now, and all of them together large.
        self.fs.invalidate_cache()
        found = []
        for entry in self.fs.ls(f"{self.root}/{folder}".rstrip("/") or "/", detail=True):
            path = str(entry["name"]).rstrip("/")
            name = path.removeprefix(f"{self.root}/{folder}")
            if not name or "/" in name or name.startswith("."):
                continue
            if entry["type"] == "directory" and _real_path(self.fs, path) == self.output:
                continue
            found.append((name, entry))
        return found

    def _is_image(self, below: str, entry: Mapping[str, Any]) -> bool:
        """Whether a file is an image by its name; counts those that are not."""
        if self.pattern is not None and not self.pattern.match(below):
            return False
        # What leads to a folder may lead round.
        linked = entry.get("islink") and self.fs.isfile(f"{self.root}/{below}")
        if IMAGE_ENDING.search(below) and (entry["type"] == "file" or linked):
            return True
        self.left_out += 1
        return False


def find_image_folder(url: str, output: str | None) -> ImageFolder | None:
    """The folder, prefix or glob that a URL means, or None where it means a file.

    Args:
        url: A path or fsspec URL. A folder, what ends in a slash, or a glob that is no file.
        output: Where the images go, which is left out.

    Raises:
        Exception: What the filesystem raises.
    """
    if url.lower().startswith(("http://", "https://")) or "::" in url or not url.strip():
        return None
    globs = _GLOB.search(split_protocol(url)[1])
    kind, _ = detect_format(url)
    if not url.endswith("/") and not globs and kind in _TABLES:
        return None
    fs, path = fsspec.core.url_to_fs(url)
    path = str(path).rstrip("/")
    if globs and not fs.exists(path):
        root, below = _divided(path)
        deepest = _DEEPEST if "**" in below else below.count("/")
        pattern = re.compile(glob_translate(below))
        return ImageFolder(url, fs, root, pattern, deepest, _inside(fs, output))
    if url.endswith("/") or fs.isdir(path):
        return ImageFolder(url, fs, path, None, _DEEPEST, _inside(fs, output))
    return None


def _divided(path: str) -> tuple[str, str]:
    """The folder that a glob begins in, and the glob below it."""
    parts = path.split("/")
    first = next(number for number, part in enumerate(parts) if _GLOB.search(part))
    return "/".join(parts[:first]), "/".join(parts[first:])


def _inside(fs: Any, output: str | None) -> str | None:
    """The output's path, where it is on the same filesystem."""
    if output is None:
        return None
    protocol = split_protocol(output)[0] or "file"
    known = [fs.protocol] if isinstance(fs.protocol, str) else list(fs.protocol)
    if protocol not in known:
        return None
    return _real_path(fs, str(fsspec.core.url_to_fs(output)[1]))


def _real_path(fs: Any, path: str) -> str:
    """The path without links, `..` and other spellings of the same place."""
    real = os.path.realpath(path) if isinstance(fs, LocalFileSystem) else path
    return real.rstrip("/")


def _ids(names: Sequence[str]) -> Iterator[str]:
    """The names without extension; where two would be equal, with it: `cat-jpg`, `cat-png`."""

    def folded(name: str) -> str:
        return unicodedata.normalize("NFC", name).casefold()

    stems = [IMAGE_ENDING.sub("", name) for name in names]
    longer = [IMAGE_ENDING.sub(r"-\1", name) for name in names]
    taken = Counter(map(folded, stems)) + Counter(map(folded, longer))
    for stem, long in zip(stems, longer, strict=True):
        yield stem if stem and taken[folded(stem)] == 1 else long
