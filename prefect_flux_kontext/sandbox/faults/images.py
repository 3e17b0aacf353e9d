"""Faults of the result images."""

from __future__ import annotations

import asyncio
import functools
import io
import struct
import zlib
from typing import TYPE_CHECKING

from prefect_flux_kontext.sandbox.faults.registry import applies

if TYPE_CHECKING:
    from prefect_flux_kontext.sandbox.faults.exchange import Exchange

_PNG = "image/png"
_MEGABYTE_BYTES = 1 << 20
_BOMB_MEGABYTES = 256
_BOMB_EDGE = 30_000


@applies("download")
async def truncated(exchange: Exchange) -> None:
    """Half of the image without a Content-Length."""
    reply = await exchange.call_service()
    await exchange.send_head(200, reply.media_type)
    await exchange.send_body(reply.body[: len(reply.body) // 2], last=True)


@applies("download")
async def empty(exchange: Exchange) -> None:
    """HTTP 200 with an empty body."""
    reply = await exchange.call_service()
    await exchange.answer(200, b"", reply.media_type)


@applies("download")
async def wrong_kind(exchange: Exchange) -> None:
    """The image as a WebP under the Content-Type of the requested format."""
    reply = await exchange.call_service()
    if reply.media_type.startswith("image/"):
        reply.body = await asyncio.to_thread(_webp, reply.body)
    await exchange.answer(reply.status, reply.body, reply.media_type)


@applies("download")
async def gzip_bomb(exchange: Exchange) -> None:
    """256 MB of zeros, compressed with gzip to a quarter of a megabyte."""
    await exchange.call_service()
    bomb = await asyncio.to_thread(_gzip_bomb)
    await exchange.answer(200, bomb, _PNG, content_encoding="gzip")


@applies("download")
async def pixel_bomb(exchange: Exchange) -> None:
    """A PNG of under 1 kB with 30,000 x 30,000 pixels."""
    await exchange.call_service()
    await exchange.answer(200, _pixel_bomb(), _PNG)


@applies("download")
async def redirect_away(exchange: Exchange) -> None:
    """A redirect to a file on the client's disk."""
    await exchange.call_service()
    await exchange.answer(302, b"", location="file:///etc/hostname")


@applies("download")
async def redirect_round(exchange: Exchange) -> None:
    """A redirect to the image's own URL, without end."""
    await exchange.call_service()
    await exchange.answer(302, b"", location="?round")


def _webp(image: bytes) -> bytes:
    from PIL import Image  # noqa: PLC0415 - the help of the command line lists faults too

    out = io.BytesIO()
    with Image.open(io.BytesIO(image), formats=("JPEG", "PNG")) as picture:
        picture.save(out, "WEBP", lossless=True)
    return out.getvalue()


@functools.cache
def _gzip_bomb() -> bytes:
    packer = zlib.compressobj(wbits=zlib.MAX_WBITS | 16)
    zeros = bytes(_MEGABYTE_BYTES)
    return b"".join(packer.compress(zeros) for _ in range(_BOMB_MEGABYTES)) + packer.flush()


def _pixel_bomb() -> bytes:
    header = struct.pack(">IIBBBBB", _BOMB_EDGE, _BOMB_EDGE, 8, 2, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(bytes(_BOMB_EDGE))), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )
