"""Faults of the network, of proxies in front of the service, and error replies."""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prefect_flux_kontext.sandbox.faults.registry import HANDLERS, applies, register

if TYPE_CHECKING:
    from prefect_flux_kontext.sandbox.faults.exchange import Exchange

_ALL = ("submit", "status", "download")
_API = ("submit", "status")
_CHUNKS = 10
_ODD_DELAYS = ("soon", "-1", "", "Thu, 01 Jan 1970 00:00:00 GMT", "1.5.1")
_PAGE = b"<html><body><h1>Service fault</h1></body></html>"
_MEGABYTE_BYTES = 1_000_000


@dataclass(frozen=True)
class ErrorReply:
    """A fault that is one reply: an error envelope, or an HTML page if `code` is None.

    The service sees the request only if it is `served`. The values of `retry_after` take turns.
    """

    status: int
    code: int | None
    message: str = ""
    served: bool = False
    retry_after: tuple[str, ...] = ()

    async def __call__(self, exchange: Exchange) -> None:
        """Answer a request."""
        await (exchange.call_service() if self.served else exchange.discard_request())
        if self.code is None:
            await exchange.answer(self.status, _PAGE, "text/html")
            return
        headers = {}
        if self.retry_after:
            headers["retry_after"] = self.retry_after[exchange.number % len(self.retry_after)]
        envelope = {"code": self.code, "message": self.message, "data": None}
        await exchange.answer(self.status, json.dumps(envelope).encode(), **headers)

    def __str__(self) -> str:
        """Describe the fault in a line."""
        if self.code is None:
            text = f"HTTP {self.status} with an HTML page"
        elif self.code == self.status:
            text = f"HTTP {self.status}, {self.message}"
        else:
            text = f"HTTP {self.status} with code {self.code}, {self.message}, in the envelope"
        if self.retry_after:
            text += f", with Retry-After: {self.retry_after[0]}"
        return text + ("; the request is served" if self.served else "")


_BUSY, _FULL, _NOT_FOUND = "too many requests", "too many tasks", "task not found"

for _kinds, _name, _reply in (
    (_ALL, "limited", ErrorReply(429, 429, _BUSY, retry_after=("1",))),
    (_ALL, "limited-silently", ErrorReply(429, 429, _BUSY)),
    (_ALL, "limited-oddly", ErrorReply(429, 429, _BUSY, retry_after=_ODD_DELAYS)),
    (_API, "limited-in-200", ErrorReply(200, 429, _BUSY)),
    (("submit",), "too-many-tasks", ErrorReply(429, 429, _FULL)),
    (("submit",), "too-many-tasks-in-200", ErrorReply(200, 429, _FULL)),
    (("submit",), "refused", ErrorReply(400, 400, "invalid parameters")),
    (("submit",), "refused-content", ErrorReply(400, 400, "InputImageSensitiveContentDetected")),
    (("status",), "forbidden-page", ErrorReply(403, None)),
    (_API, "unauthorized", ErrorReply(401, 401, "unauthorized")),
    (("submit",), "no-balance", ErrorReply(402, 402, "insufficient balance")),
    (_ALL, "unavailable", ErrorReply(503, None)),
    (_API, "unavailable-in-200", ErrorReply(200, 500, "internal error")),
    (("submit",), "trouble-after", ErrorReply(502, None, served=True)),
    (("submit",), "trouble-after-in-200", ErrorReply(200, 500, "internal error", served=True)),
    (_ALL, "html", ErrorReply(200, None, served=True)),
    (("status",), "not-found", ErrorReply(404, 404, _NOT_FOUND, served=True)),
    (("status",), "not-found-in-200", ErrorReply(200, 422, _NOT_FOUND, served=True)),
    (("download",), "not-found", ErrorReply(404, 404, "not found", served=True)),
    (("download",), "expired", ErrorReply(403, 403, "this result has expired", served=True)),
):
    register(_kinds, _name, str(_reply), _reply)

register(
    ("task",),
    "lost-result",
    "The task succeeds, and its image is always 404",
    HANDLERS["download", "not-found"],
)


@applies(*_ALL)
async def reset(exchange: Exchange) -> None:
    """The connection is reset; the service does not see the request."""
    await exchange.discard_request()
    await exchange.end_connection("reset")


@applies(*_ALL)
async def lost_reply(exchange: Exchange) -> None:
    """The service serves the request; the connection is reset before the reply."""
    await exchange.call_service()
    await exchange.end_connection("reset")


@applies(*_ALL)
async def closed(exchange: Exchange) -> None:
    """The service serves the request; the connection is closed before the reply."""
    await exchange.call_service()
    await exchange.end_connection("close")


@applies(*_ALL)
async def hang(exchange: Exchange) -> None:
    """The service serves the request; the connection closes after `hang` seconds."""
    await exchange.call_service()
    await exchange.hang()


@applies(*_ALL)
async def slow(exchange: Exchange) -> None:
    """The correct reply, in chunks over `slow` seconds."""
    reply = await exchange.call_service()
    size = str(len(reply.body))
    await exchange.send_head(reply.status, reply.media_type, content_length=size)
    step = -(-len(reply.body) // _CHUNKS) or 1
    for start in range(0, len(reply.body), step):
        await asyncio.sleep(exchange.plan.slow / _CHUNKS)
        await exchange.send_body(reply.body[start : start + step])
    await exchange.send_body(b"", last=True)


@applies(*_ALL)
async def half(exchange: Exchange) -> None:
    """The connection is closed after half of the reply."""
    reply = await exchange.call_service()
    size = str(len(reply.body))
    await exchange.send_head(reply.status, reply.media_type, content_length=size)
    await exchange.send_body(reply.body[: len(reply.body) // 2])
    await exchange.end_connection("close")


@applies(*_ALL)
async def garbage(exchange: Exchange) -> None:
    """HTTP 200 with random bytes instead of the reply."""
    reply = await exchange.call_service()
    rng = random.Random(exchange.number)
    await exchange.answer(200, rng.randbytes(len(reply.body) or 1), reply.media_type)


@applies(*_ALL)
async def endless(exchange: Exchange) -> None:
    """A reply that never ends."""
    reply = await exchange.call_service()
    await exchange.send_head(200, reply.media_type)
    disconnect = asyncio.ensure_future(exchange.wait_for_disconnect())
    try:
        # In process no client disconnects, so the number of chunks is bounded.
        for _ in range(1_000_000):
            if disconnect.done():
                break
            await exchange.send_body(b" " * 65_536)
            await asyncio.sleep(0)
    finally:
        disconnect.cancel()


@applies(*_ALL)
async def huge_headers(exchange: Exchange) -> None:
    """A reply with a header of one megabyte."""
    reply = await exchange.call_service()
    await exchange.answer(200, reply.body, reply.media_type, x_noise="x" * _MEGABYTE_BYTES)
