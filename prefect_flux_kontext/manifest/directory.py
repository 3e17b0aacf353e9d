"""Folders, prefixes and globs of images, or of the parts of a table, read as manifests."""

from __future__ import annotations

import contextlib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import fsspec
from fsspec.core import split_protocol
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from prefect_flux_kontext.errors import ManifestError
from prefect_flux_kontext.manifest.columns import Line, find_cell_problem
from prefect_flux_kontext.manifest.formats import detect_format
from prefect_flux_kontext.references.identity import read_version
from prefect_flux_kontext.storage.names import (
    IMAGE_ENDING,
    MAX_ID_CHARACTERS,
    find_text_problem,
    make_safe_name,
)

_GLOB = re.compile(r"[*?\[]")
_LEDGER_FOLDER = "_ledger"
_TABLE_EXTENSIONS = frozenset(
    {".csv", ".tsv", ".tab", ".json", ".jsonl", ".ndjson", ".parquet", ".pq"}
)
_MAX_TABLES = 10_000
# Folders of formats whose data files are not all current, and of jobs that have not ended.
_NO_PLAIN_TABLES = {
    "_delta_log": "is a Delta table, whose files hold removed rows too",
    ".hoodie": "is a Hudi table, whose files hold removed rows too",
    "_temporary": "is being written by a job that has not ended",
}
# Bounds a tree that leads back into itself.
_MAX_DEPTH_FOLDERS = 64


@dataclass
class ImageFolder:
    """Images below a folder, recognized by their names; without any, the parts of a table."""

    url: str  # as given, for messages
    fs: Any = field(repr=False)
    root: str
    pattern: re.Pattern[str] | None  # for the paths below the folder; None for all
    max_depth: int
    output: str | None  # real path, if it is on the same filesystem
    skipped: Counter[str] = field(default_factory=Counter)  # files that are no rows, by reason
    has_images: bool = False
    tables: list[str] = field(default_factory=list, repr=False)  # paths, as last read
    folders: set[str] = field(default_factory=set, repr=False)  # names, as last read

    @property
    def is_local(self) -> bool:
        """Whether the images are files of this machine."""
        return isinstance(self.fs, LocalFileSystem)

    def read_lines(self) -> Iterator[Line]:
        """Yield the images folder by folder, sorted by name and numbered from 1.

        A folder without images yields nothing if it has tables, which `list_tables` then returns.

        The cells are `id` (path below the folder, without extension), `image` (a URL, or a
        path if the folder is local), `file` (its name) and `folder` (its subfolder).
        """
        root = _resolve_links(self.fs, self.root)
        if self.output is not None and f"{root}/".startswith(f"{self.output}/"):
            raise ManifestError(
                f"The output contains the images of {self.url}, so the next run would pay for "
                "its own results; choose another output, such as a subfolder."
            )
        self.skipped.clear()
        self.has_images = False
        self.tables.clear()
        self.folders.clear()
        number = 0
        for folder, names, versions in self._walk():
            for name, image_id in zip(names, _make_ids(names), strict=True):
                number += 1
                self.has_images = True
                path = f"{self.root}/{folder}{name}"
                row_id = f"{folder}{image_id}"
                if len(row_id) > MAX_ID_CHARACTERS or find_text_problem(row_id):
                    # Nobody can choose other ids for the files of a folder.
                    row_id = make_safe_name(row_id)
                cells = {
                    "id": row_id,
                    "image": path if self.is_local else str(self.fs.unstrip_protocol(path)),
                    "file": name,
                    "folder": folder.rstrip("/"),
                }
                yield Line(number, cells, find_cell_problem(cells), versions.get(name))
        if not number and not self.tables:
            count = self.skipped.total()
            files = "1 other file" if count == 1 else f"{count:,} other files"
            others = f" ({files})" if count else ""
            raise ManifestError(
                f"There are no images at {self.url}{others}; images are files named .jpg, .jpeg, "
                ".png or .webp."
            )

    def list_tables(self) -> list[tuple[str, dict[str, str]]]:
        """Return the parts of a table, as URLs, with the columns that their folders name.

        That is what Spark and the like write: `part-00000.csv`, `team=blue/part-00000.parquet`.

        Raises:
            ManifestError: The files are no plain table.
        """
        for name in self.folders & _NO_PLAIN_TABLES.keys():
            raise ManifestError(
                f"{self.url} {_NO_PLAIN_TABLES[name]}; write its rows to a CSV or Parquet file."
            )
        if len(self.tables) > _MAX_TABLES:
            raise ManifestError(f"{self.url} has more than {_MAX_TABLES:,} tables; merge them.")
        others = self.skipped.pop("non-image files") - len(self.tables)
        self.skipped.update({"other files": others} if others else {})
        parts = []
        for path in sorted(self.tables):
            place = f"{self.root}/{path}"
            url = place if self.is_local else str(self.fs.unstrip_protocol(place))
            pairs = (folder.split("=", 1) for folder in path.split("/")[:-1] if "=" in folder)
            parts.append((url, {name: unquote(value) for name, value in pairs}))
        return parts

    def _walk(self) -> Iterator[tuple[str, list[str], dict[str, str]]]:
        """Yield each folder with images: path below the root, names, and versions by name."""
        pending = [""]
        while pending:
            folder = pending.pop()
            names, versions, subfolders = [], {}, []
            entries = self._list_entries(folder)
            if folder and any(name == _LEDGER_FOLDER for name, _ in entries):
                # The output of another batch: its images are results, and paid for already.
                self.skipped["outputs of other batches"] += 1
                continue
            for name, entry in entries:
                if name == _LEDGER_FOLDER:
                    continue
                if entry["type"] == "directory":
                    subfolders.append(f"{folder}{name}/")
                    self.folders.add(name)
                elif self._is_image(f"{folder}{name}", entry):
                    names.append(name)
                    if version := read_version(entry):
                        versions[name] = version
            if folder.count("/") < self.max_depth:
                pending += sorted(subfolders, reverse=True)
            if names:
                yield folder, sorted(names), versions

    def _list_entries(self, folder: str) -> list[tuple[str, Mapping[str, Any]]]:
        """Return the entries of a folder, except hidden ones and the output."""
        # A cached listing may be outdated, and all of them together can be large.
        self.fs.invalidate_cache()
        entries = []
        for entry in self.fs.ls(f"{self.root}/{folder}".rstrip("/") or "/", detail=True):
            path = str(entry["name"]).rstrip("/")
            name = path.removeprefix(f"{self.root}/{folder}")
            if str(entry["name"]) == f"{self.root}/{folder}" and entry["type"] == "directory":
                # A key such as `photos//cat.jpg`, whose empty folder fsspec cannot list.
                self.skipped["files in folders without a name"] += 1
                continue
            if name.startswith("."):
                self.folders.add(name)
                self.skipped["hidden files"] += 1
                continue
            if not name or "/" in name:
                # An object store allows empty names of folders; a listing can name the folder.
                if entry["type"] == "file" and name.strip("/"):
                    self.skipped["files in folders without a name"] += 1
                continue
            if entry["type"] == "directory" and _resolve_links(self.fs, path) == self.output:
                continue
            entries.append((name, entry))
        return entries

    def _is_image(self, path: str, entry: Mapping[str, Any]) -> bool:
        """Return whether a file is an image by its name. Counts the files that are not."""
        if self.pattern is not None and not self.pattern.match(path):
            return False
        # Follow links to files only: a link to a folder can lead to a cycle.
        is_file_link = entry.get("islink") and self.fs.isfile(f"{self.root}/{path}")
        if IMAGE_ENDING.search(path) and (entry["type"] == "file" or is_file_link):
            return True
        self.skipped["non-image files"] += 1
        is_table = detect_format(path)[0] in _TABLE_EXTENSIONS and not path.startswith("_")
        if is_table and "/_" not in path and len(self.tables) <= _MAX_TABLES:
            if entry.get("size") == 0:
                self.skipped["empty files"] += 1
                self.skipped["non-image files"] -= 1
            else:
                self.tables.append(path)
        return False


def find_image_folder(url: str, output: str | None) -> ImageFolder | None:
    """Return the folder, prefix or glob at a URL, or None if the URL is a file.

    A glob is one only if no file has its name. The output is skipped.
    """
    if url.lower().startswith(("http://", "https://")) or "::" in url or not url.strip():
        return None
    has_glob = _GLOB.search(split_protocol(url)[1])
    extension, _ = detect_format(url)
    fs, path = fsspec.core.url_to_fs(url)
    path = str(path).rstrip("/")
    if not url.endswith("/") and not has_glob and extension in _TABLE_EXTENSIONS:
        # Spark writes folders with the names of files. A file is found without listing.
        with contextlib.suppress(Exception):
            if fs.info(path)["type"] == "directory":
                return ImageFolder(
                    url, fs, path, None, _MAX_DEPTH_FOLDERS, _find_output_path(fs, output)
                )
        return None
    pattern, max_depth = None, _MAX_DEPTH_FOLDERS
    if has_glob and not fs.exists(path):
        parts = path.split("/")
        first = next(number for number, part in enumerate(parts) if _GLOB.search(part))
        path, glob = "/".join(parts[:first]), "/".join(parts[first:])
        pattern = re.compile(glob_translate(glob))
        if "**" not in glob:
            max_depth = glob.count("/")
    elif not url.endswith("/") and not fs.isdir(path):
        return None
    return ImageFolder(url, fs, path, pattern, max_depth, _find_output_path(fs, output))


def _find_output_path(fs: Any, output: str | None) -> str | None:
    """Return the output's path if it is on the same filesystem."""
    if output is None:
        return None
    protocol = split_protocol(output)[0] or "file"
    known = [fs.protocol] if isinstance(fs.protocol, str) else list(fs.protocol)
    if protocol not in known:
        return None
    return _resolve_links(fs, str(fsspec.core.url_to_fs(output)[1]))


def _resolve_links(fs: Any, path: str) -> str:
    """Return a path without links, `..` and other spellings of the same place."""
    real = os.path.realpath(path) if isinstance(fs, LocalFileSystem) else path
    return real.rstrip("/")


def _make_ids(names: Sequence[str]) -> Iterator[str]:
    """Yield the names without extension, or with it if two are equal: `cat-jpg`, `cat-png`."""

    def normalize(name: str) -> str:
        return unicodedata.normalize("NFC", name).casefold()

    stems = [IMAGE_ENDING.sub("", name) for name in names]
    long_ids = [IMAGE_ENDING.sub(r"-\1", name) for name in names]
    counts = Counter(map(normalize, stems)) + Counter(map(normalize, long_ids))
    for stem, long_id in zip(stems, long_ids, strict=True):
        yield stem if stem and counts[normalize(stem)] == 1 else long_id
