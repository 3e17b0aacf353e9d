"""Opening a manifest's file on any fsspec filesystem, and its lines, never longer than allowed."""

from __future__ import annotations

import io
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import fsspec
import fsspec.compression

from prefect_flux_kontext.errors import ManifestError

if TYPE_CHECKING:
    from collections.abc import Iterator

_LONGEST_LINE = 1_000_000
_CHUNK = 65_536
_COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
_BOMB_FROM = 2**30
_BOMB_RATIO = 200
"""A gigabyte, and two hundred times what the file has: no table that people write is like that."""


def kind_of(url: str) -> tuple[str, str | None]:
    """The file's name extension in small letters, and how it is compressed.

    `m.csv.gz` is `(".csv", "gzip")`. A web address is judged by its path alone.
    """
    path = urlsplit(url).path if url.lower().startswith(("http://", "https://")) else url
    name = path.replace("\\", "/").rsplit("/", 1)[-1].lower()
    compression = None
    for ending, known in _COMPRESSED.items():
        if name.endswith(ending):
            name, compression = name.removesuffix(ending), known
    dot = name.rfind(".")
    return (name[dot:] if dot > 0 else ""), compression


@contextmanager
def told_as_manifest_error(url: str) -> Iterator[None]:
    """Turn whatever a filesystem or decoder raises into an error that names the manifest.

    Raises:
        ManifestError: Instead of every other error.
    """
    try:
        yield
    except ManifestError:
        raise
    except FileNotFoundError:
        raise ManifestError(f"There is no manifest at {url}.") from None
    except PermissionError as error:
        raise ManifestError(f"The manifest {url} may not be read: {error}") from None
    except Exception as error:  # noqa: BLE001 - each filesystem has errors of its own
        told = str(error) or type(error).__name__
        raise ManifestError(f"The manifest {url} cannot be read: {told}") from None


def text_lines(url: str, *, line_ends_at_cr: bool) -> Iterator[str]:
    """The lines of a file, with their ends.

    What is not UTF-8 becomes surrogates, so that the line it is on can be told.

    Raises:
        ManifestError: A line is too long, or so much comes out of little that it is a trap.
        Exception: What the filesystem or the decoder raises.
    """
    _, compression = kind_of(url)
    with fsspec.open(url, "rb") as stored:
        size = _size(stored)
        with (
            _decompressed(stored, compression, url) as data,
            io.TextIOWrapper(
                data,
                encoding="utf-8-sig",
                errors="surrogateescape",
                newline="" if line_ends_at_cr else "\n",
            ) as text,
        ):
            number = read = 0
            while line := text.readline(_LONGEST_LINE + 1):
                number += 1
                read += len(line)
                if len(line) > _LONGEST_LINE:
                    raise ManifestError(
                        f"Line {number} of {url} has more than {_LONGEST_LINE:,} characters."
                    )
                if compression and read > _BOMB_FROM and read > _BOMB_RATIO * size:
                    raise ManifestError(
                        f"The manifest {url} has {size:,} bytes and unpacks to more than "
                        f"{_BOMB_RATIO} times that and a gigabyte; give it unpacked."
                    )
                yield line


def _size(stored: Any) -> int:
    at = stored.seek(0, io.SEEK_END)
    stored.seek(0)
    return int(at)


@contextmanager
def _decompressed(stored: Any, compression: str | None, url: str) -> Iterator[Any]:
    if compression is None:
        yield stored
    elif compression == "zstd":
        with io.BufferedReader(_Zstandard(stored, url), _CHUNK) as data:
            yield data
    else:
        with fsspec.compression.compr[compression](stored, mode="rb") as data:
            yield data


class _Zstandard(io.RawIOBase):
    """Unlike the library's own reader it reads all frames, and says when the last is cut off."""

    def __init__(self, stored: Any, url: str) -> None:
        try:
            import zstandard  # noqa: PLC0415 - an extra
        except ImportError:
            raise ManifestError(
                f"To read {url}, install `prefect-flux-kontext[zstd]`, or give it unpacked."
            ) from None
        self._stored = stored
        # More than this much window is refused: it would be held in memory.
        self._new = zstandard.ZstdDecompressor(max_window_size=2**27).decompressobj
        self._frame = self._new()
        self._ready = b""
        self._begun = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            packed = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame, self._begun = self._new(), False
            packed = packed or self._stored.read(4_096)
            if not packed:
                if self._begun:
                    raise EOFError("the compressed file is cut off")
                return 0
            self._begun = True
            self._ready = self._frame.decompress(packed)
        part, self._ready = self._ready[: len(buffer)], self._ready[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)
