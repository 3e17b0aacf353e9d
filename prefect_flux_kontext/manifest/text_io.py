"""The text of manifests: decompressed, and split into JSON values, in bounded memory."""

from __future__ import annotations

import io
import itertools
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fsspec.compression

from prefect_flux_kontext.errors import ManifestError
from prefect_flux_kontext.manifest.columns import MAX_LINE_CHARACTERS

_ZSTD_BUFFER_BYTES = 65_536
# Four bytes can make a block of 128 kB, so this bounds what one read decompresses to 16 MB.
_ZSTD_READ_BYTES = 512
# A larger window is refused, because zstd would hold it in memory.
_ZSTD_MAX_WINDOW_BYTES = 2**27
# The text of a JSON file that is looked at together.
_PIECE_CHARACTERS = 65_536
_JSON_VALUE = re.compile(r"[^\s,]")
# Finds where values end. Their numbers are read later, so long ones cost no time here.
_JSON_DECODER = json.JSONDecoder(parse_int=str, parse_float=str)


@contextmanager
def decompress(stored: Any, compression: str | None, url: str) -> Iterator[Any]:
    """Yield a file that reads decompressed bytes: the stored one if it is not compressed."""
    if compression is None:
        yield stored
    elif compression == "zstd":
        with io.BufferedReader(_ZstandardReader(stored, url), _ZSTD_BUFFER_BYTES) as data:
            yield data
    else:
        with fsspec.compression.compr[compression](stored, mode="rb") as data:
            yield data


class _ZstandardReader(io.RawIOBase):
    """Zstandard reader that reads all frames and raises EOFError when the last one is truncated.

    The library's own reader does neither.
    """

    def __init__(self, stored: Any, url: str) -> None:
        try:
            import zstandard  # noqa: PLC0415 - an extra
        except ImportError:
            raise ManifestError(
                f"To read {url}, install `prefect-flux-kontext[zstd]`, or decompress it first."
            ) from None
        self._stored = stored
        decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_MAX_WINDOW_BYTES)
        self._new_frame = decompressor.decompressobj
        self._frame = self._new_frame()
        self._ready = memoryview(b"")
        self._is_inside_frame = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            packed = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame, self._is_inside_frame = self._new_frame(), False
            packed = packed or self._stored.read(_ZSTD_READ_BYTES)
            if not packed:
                if self._is_inside_frame:
                    raise EOFError("the compressed file is truncated")
                return 0
            self._is_inside_frame = True
            self._ready = memoryview(self._frame.decompress(packed))
        chunk, self._ready = self._ready[: len(buffer)], self._ready[len(buffer) :]
        buffer[: len(chunk)] = chunk
        return len(chunk)


def split_values(pieces: Iterator[str], url: str, line: int) -> Iterator[tuple[int, str]]:
    """Yield the values of a JSON array, or of JSON values one after another, from a text's pieces.

    The text starts on `line`. A value is numbered by the line that it ends on, or by its place if
    that is higher. Memory is bounded by the limit for a line, which each value has to keep.
    """
    text = _take(pieces, _PIECE_CHARACTERS).lstrip()
    is_array = text.startswith("[")
    at, number = int(is_array), line - 1
    while True:
        start, found = at, _JSON_VALUE.search(text, at)
        at = found.start() if found else len(text)
        line += text.count("\n", start, at)
        if is_array and text.startswith("]", at):
            if any(map(str.strip, itertools.chain([text[at + 1 :]], pieces))):
                raise ManifestError(f"The manifest {url} goes on after its JSON array.")
            return
        end, problem = _find_value_end(text, at)
        # The end of the text may be in the middle of a value.
        if end in (None, len(text)) and (
            more := _take(pieces, max(_PIECE_CHARACTERS, len(text) - at))
        ):
            if len(text) - at > MAX_LINE_CHARACTERS:
                raise ManifestError(
                    f"The value that starts on line {line} of {url} is not valid JSON, or has "
                    f"more than {MAX_LINE_CHARACTERS:,} characters."
                )
            text, at = text[at:] + more, 0
            continue
        if at == len(text) and not is_array:
            return
        if end is None:
            problem = (
                problem if at < len(text) else "the array has no end; the file may be cut off"
            )
            raise ManifestError(f"Line {line} of {url} is not valid JSON: {problem}.")
        line += text.count("\n", at, end)
        number = max(number + 1, line)
        yield number, text[at:end]
        at = end


def _find_value_end(text: str, at: int) -> tuple[int | None, str]:
    """Return where the JSON value that starts at a position ends, or None and why it does not."""
    try:
        return _JSON_DECODER.raw_decode(text, at)[1], ""
    except json.JSONDecodeError as error:
        return None, error.msg
    except RecursionError:
        return None, "it is nested too deeply"


def _take(pieces: Iterator[str], characters: int) -> str:
    """Return the next pieces of a text, with at least this many characters if there are."""
    taken, size = [], 0
    for piece in pieces:
        taken.append(piece)
        size += len(piece)
        if size >= characters:
            break
    return "".join(taken)
