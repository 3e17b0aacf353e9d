"""Decompression of manifests: gzip, bzip2 and xz by fsspec, and Zstandard."""

from __future__ import annotations

import io
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import fsspec.compression

from prefect_flux_kontext.errors import ManifestError

if TYPE_CHECKING:
    from collections.abc import Iterator

_ZSTD_BUFFER_BYTES = 65_536
# Four bytes can make a block of 128 kB, so this bounds what one read decompresses to 16 MB.
_ZSTD_READ_BYTES = 512
# A larger window is refused, because zstd would hold it in memory.
_ZSTD_MAX_WINDOW_BYTES = 2**27


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
