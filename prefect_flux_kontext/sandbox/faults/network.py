"""Faults of the network and of proxies in front of the service."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

from prefect_flux_kontext.sandbox.faults.exchange import HTML
from prefect_flux_kontext.sandbox.faults.registry import applies

if TYPE_CHECKING:
    from prefect_flux_kontext.sandbox.faults.exchange import Exchange

_ALL = ("submit", "status", "download")
_API = ("submit", "status")
_CHUNKS = 10
_ODD_DELAYS = ("soon", "-1", "", "Thu, 01 Jan 1970 00:00:00 GMT", "1.5.1")
_PAGE = b"<html><body><h1>Service fault</h1></body></html>"
_MEGABYTE_BYTES = 1_000_000


@applies(*_ALL)
async def limited(exchange: Exchange) -> None:
    """429, too many requests, with Retry-After: 1."""
    await exchange.discard_request()
    await exchange.answer_error(429, "too many requests", retry_after="1")


@applies(*_ALL)
async def limited_silently(exchange: Exchange) -> None:
    """429, too many requests, without Retry-After."""
    await exchange.discard_request()
    await exchange.answer_error(429, "too many requests")


@applies(*_ALL)
async def limited_oddly(exchange: Exchange) -> None:
    """429, too many requests, with an invalid Retry-After."""
    await exchange.discard_request()
    odd = _ODD_DELAYS[exchange.number % len(_ODD_DELAYS)]
    await exchange.answer_error(429, "too many requests", retry_after=odd)


@applies(*_API)
async def limited_in_200(exchange: Exchange) -> None:
    """HTTP 200 with code 429, too many requests, in the envelope."""
    await exchange.discard_request()
    await exchange.answer_error(429, "too many requests", status=200)


@applies("submit")
async def too_many_tasks(exchange: Exchange) -> None:
    """429, too many tasks running."""
    await exchange.discard_request()
    await exchange.answer_error(429, "too many tasks")


@applies("submit")
async def too_many_tasks_in_200(exchange: Exchange) -> None:
    """HTTP 200 with code 429, too many tasks running, in the envelope."""
    await exchange.discard_request()
    await exchange.answer_error(429, "too many tasks", status=200)


@applies("submit")
async def refused(exchange: Exchange) -> None:
    """400, invalid parameters."""
    await exchange.discard_request()
    await exchange.answer_error(400, "invalid parameters")


@applies("submit")
async def refused_content(exchange: Exchange) -> None:
    """400 with a fail code of the content rules."""
    await exchange.discard_request()
    await exchange.answer_error(400, "InputImageSensitiveContentDetected")


@applies("status")
async def forbidden_page(exchange: Exchange) -> None:
    """403 with an HTML page of a gateway; the service does not see the request."""
    await exchange.discard_request()
    await exchange.answer(403, _PAGE, HTML)


@applies(*_API)
async def unauthorized(exchange: Exchange) -> None:
    """401, the key is no longer known."""
    await exchange.discard_request()
    await exchange.answer_error(401, "unauthorized")


@applies("submit")
async def no_balance(exchange: Exchange) -> None:
    """402, the balance is too low."""
    await exchange.discard_request()
    await exchange.answer_error(402, "insufficient balance")


@applies(*_ALL)
async def unavailable(exchange: Exchange) -> None:
    """503 with an HTML page; the service does not see the request."""
    await exchange.discard_request()
    await exchange.answer(503, _PAGE, HTML)


@applies(*_API)
async def unavailable_in_200(exchange: Exchange) -> None:
    """HTTP 200 with code 500 in the envelope; the service does not see the request."""
    await exchange.discard_request()
    await exchange.answer_error(500, "internal error", status=200)


@applies("submit")
async def trouble_after(exchange: Exchange) -> None:
    """502 with an HTML page, after the task was accepted."""
    await exchange.call_service()
    await exchange.answer(502, _PAGE, HTML)


@applies("submit")
async def trouble_after_in_200(exchange: Exchange) -> None:
    """HTTP 200 with code 500 in the envelope, after the task was accepted."""
    await exchange.call_service()
    await exchange.answer_error(500, "internal error", status=200)


@applies(*_ALL)
async def reset(exchange: Exchange) -> None:
    """The connection is reset; the service does not see the request."""
    await exchange.discard_request()
    await exchange.reset()


@applies(*_ALL)
async def lost_reply(exchange: Exchange) -> None:
    """The service serves the request; the connection is reset before the reply."""
    await exchange.call_service()
    await exchange.reset()


@applies(*_ALL)
async def closed(exchange: Exchange) -> None:
    """The service serves the request; the connection is closed before the reply."""
    await exchange.call_service()
    await exchange.close()


@applies(*_ALL)
async def hang(exchange: Exchange) -> None:
    """The service serves the request; the connection closes after `hang` seconds."""
    await exchange.call_service()
    if not await exchange.wait_for_disconnect_within(exchange.plan.hang):
        await exchange.close()


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
    await exchange.close()


@applies(*_ALL)
async def html(exchange: Exchange) -> None:
    """HTTP 200 with an HTML page instead of the reply."""
    await exchange.call_service()
    await exchange.answer(200, _PAGE, HTML)


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
