"""The faults by kind, and what answers a request to which one applies."""

from __future__ import annotations

import asyncio
import functools
import io
import json
import random
import struct
import zlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse, Response

from prefect_flux_kontext.sandbox.contract import success
from prefect_flux_kontext.sandbox.faults.exchange import Exchange

Handler = Callable[[Exchange], Awaitable[None]]

KINDS = {
    "submit": "a submit; an accepted task is billed even when its reply is lost",
    "status": "a status request",
    "download": "a request for a result image",
    "task": "an accepted task, in the order of acceptance; it lasts as long as the task",
    "callback": "the callback of a task that has ended",
}

FAULTS: dict[str, dict[str, str]] = {kind: {} for kind in KINDS}
"""By kind and name, the description of the fault."""

# The sandbox's `lifecycle` applies these.
FAULTS["callback"] = {
    "lost": "It is never delivered",
    "doubled": "It is delivered twice",
    "late": "It is delivered `late` seconds late",
    "overtaken": "It is delivered up to `late` seconds late, so others arrive first",
    "forged": "A forged callback with another task and result arrives first, at the right URL",
    "misdirected": "A forged callback arrives first, at a URL whose token is wrong",
}

HANDLERS: dict[tuple[str, str], Handler] = {}
"""By kind and name, what answers a request to which the fault applies."""

_ALL = ("submit", "status", "download")
_API = ("submit", "status")
_CHUNKS = 10
_ODD_DELAYS = ("soon", "-1", "", "Thu, 01 Jan 1970 00:00:00 GMT", "1.5.1")
_PAGE = b"<html><body><h1>Service fault</h1></body></html>"
_MEGABYTE_BYTES = 1 << 20
_BOMB_MEGABYTES = 256
_BOMB_EDGE = 30_000
_HOUR_MS = 3_600_000


def describe_faults() -> str:
    """Return the help text on all faults, one line for each."""
    widest = max(len(name) for faults in FAULTS.values() for name in faults)
    lines = []
    for kind, faults in FAULTS.items():
        lines += ["", f"{kind}: {KINDS[kind]}"]
        lines += [f"  {name:<{widest}}  {text}" for name, text in faults.items()]
    return "\n".join(lines[1:])


def _register(
    kinds: tuple[str, ...], name: str, description: str | None, handler: Handler
) -> None:
    for kind in kinds:
        FAULTS[kind][name] = (description or "").rstrip(".")
        HANDLERS[kind, name] = handler


def _applies(*kinds: str) -> Callable[[Handler], Handler]:
    """Register a handler under its function's name, described by its docstring."""

    def decorate(handler: Handler) -> Handler:
        _register(kinds, handler.__name__.replace("_", "-"), handler.__doc__, handler)
        return handler

    return decorate


def _changes(*kinds: str) -> Callable[[Callable[[dict[str, Any], int], None]], None]:
    """Register a function that changes the `data` of the n-th reply. Errors are sent unchanged."""

    def decorate(change: Callable[[dict[str, Any], int], None]) -> None:
        async def handler(exchange: Exchange) -> None:
            reply = await exchange.call_service()
            if reply.status_code == 200:  # noqa: PLR2004 - HTTP's word for success
                data = json.loads(bytes(reply.body))["data"]
                change(data, exchange.number)
                reply = JSONResponse(success(data))
            await exchange.answer(reply)

        _register(kinds, change.__name__.replace("_", "-"), change.__doc__, handler)

    return decorate


# Result images.


@_applies("download")
async def truncated(exchange: Exchange) -> None:
    """Half of the image without a Content-Length."""
    reply = await exchange.call_service()
    del reply.headers["content-length"]
    await exchange.send_head(reply)
    await exchange.send_body(reply.body[: len(reply.body) // 2], last=True)


@_applies("download")
async def empty(exchange: Exchange) -> None:
    """HTTP 200 with an empty body."""
    reply = await exchange.call_service()
    await exchange.answer(Response(media_type=reply.headers["content-type"]))


@_applies("download")
async def wrong_kind(exchange: Exchange) -> None:
    """The image as a WebP under the Content-Type of the requested format."""
    reply = await exchange.call_service()
    kind = reply.headers["content-type"]
    if kind.startswith("image/"):
        reply = Response(await asyncio.to_thread(_webp, bytes(reply.body)), media_type=kind)
    await exchange.answer(reply)


@_applies("download")
async def gzip_bomb(exchange: Exchange) -> None:
    """256 MB of zeros, compressed with gzip to a quarter of a megabyte."""
    await exchange.call_service()
    bomb = await asyncio.to_thread(_gzip_bomb)
    await exchange.answer(Response(bomb, 200, {"content-encoding": "gzip"}, "image/png"))


@_applies("download")
async def pixel_bomb(exchange: Exchange) -> None:
    """A PNG of under 1 kB with 30,000 x 30,000 pixels."""
    await exchange.call_service()
    await exchange.answer(Response(_pixel_bomb(), media_type="image/png"))


@_applies("download")
async def redirect_away(exchange: Exchange) -> None:
    """A redirect to a file on the client's disk."""
    await exchange.call_service()
    await exchange.answer(Response(b"", 302, {"location": "file:///etc/hostname"}))


@_applies("download")
async def redirect_round(exchange: Exchange) -> None:
    """A redirect to the image's own URL, without end."""
    await exchange.call_service()
    await exchange.answer(Response(b"", 302, {"location": "?round"}))


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


# Replies of the service, of proxies in front of it, and the network.


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
            await exchange.answer(Response(_PAGE, self.status, {"content-type": "text/html"}))
            return
        headers = {}
        if self.retry_after:
            headers["retry-after"] = self.retry_after[exchange.number % len(self.retry_after)]
        envelope = {"code": self.code, "message": self.message, "data": None}
        await exchange.answer(JSONResponse(envelope, self.status, headers))

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
    _register(_kinds, _name, str(_reply), _reply)

_register(
    ("task",),
    "lost-result",
    "The task succeeds, and its image is always 404",
    HANDLERS["download", "not-found"],
)


@_applies(*_ALL)
async def reset(exchange: Exchange) -> None:
    """The connection is reset; the service does not see the request."""
    await exchange.discard_request()
    await exchange.end_connection("reset")


@_applies(*_ALL)
async def lost_reply(exchange: Exchange) -> None:
    """The service serves the request; the connection is reset before the reply."""
    await exchange.call_service()
    await exchange.end_connection("reset")


@_applies(*_ALL)
async def closed(exchange: Exchange) -> None:
    """The service serves the request; the connection is closed before the reply."""
    await exchange.call_service()
    await exchange.end_connection("close")


@_applies(*_ALL)
async def hang(exchange: Exchange) -> None:
    """The service serves the request; the connection closes after `hang` seconds."""
    await exchange.call_service()
    try:
        async with asyncio.timeout(exchange.plan.hang):
            await exchange.wait_for_disconnect()
    except TimeoutError:
        await exchange.end_connection("close")


@_applies(*_ALL)
async def slow(exchange: Exchange) -> None:
    """The correct reply, in chunks over `slow` seconds."""
    reply = await exchange.call_service()
    await exchange.send_head(reply)
    step = -(-len(reply.body) // _CHUNKS) or 1
    for start in range(0, len(reply.body), step):
        await asyncio.sleep(exchange.plan.slow / _CHUNKS)
        await exchange.send_body(reply.body[start : start + step])
    await exchange.send_body(b"", last=True)


@_applies(*_ALL)
async def half(exchange: Exchange) -> None:
    """The connection is closed after half of the reply."""
    reply = await exchange.call_service()
    await exchange.send_head(reply)
    await exchange.send_body(reply.body[: len(reply.body) // 2])
    await exchange.end_connection("close")


@_applies(*_ALL)
async def garbage(exchange: Exchange) -> None:
    """HTTP 200 with random bytes instead of the reply."""
    reply = await exchange.call_service()
    noise = random.Random(exchange.number).randbytes(len(reply.body) or 1)
    await exchange.answer(Response(noise, media_type=reply.headers["content-type"]))


@_applies(*_ALL)
async def endless(exchange: Exchange) -> None:
    """A reply that never ends."""
    reply = await exchange.call_service()
    del reply.headers["content-length"]
    await exchange.send_head(reply)
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


@_applies(*_ALL)
async def huge_headers(exchange: Exchange) -> None:
    """A reply with a header of one megabyte."""
    reply = await exchange.call_service()
    reply.headers["x-noise"] = "x" * _MEGABYTE_BYTES
    await exchange.answer(reply)


# The content of the service's replies.


@_changes("submit")
def no_task_id(data: dict[str, Any], _number: int) -> None:
    """The task is accepted, and the reply has no task id."""
    del data["taskId"]


@_changes("submit", "status")
def wrong_task_id(data: dict[str, Any], _number: int) -> None:
    """The reply has the id of a task that does not exist."""
    data["taskId"] = "task_0000000000000000"


@_changes("status")
def other_spelling(data: dict[str, Any], _number: int) -> None:
    """The state is in capitals, and the result URLs are objects, as JSON encoded twice."""
    data["state"] = data["state"].upper()
    if "resultJson" in data:
        urls = [{"url": url} for url in json.loads(data["resultJson"])["resultUrls"]]
        data["resultJson"] = json.dumps(json.dumps({"resultUrls": urls}))


@_changes("status")
def no_state(data: dict[str, Any], _number: int) -> None:
    """The reply has no state."""
    del data["state"]


@_changes("status")
def unknown_state(data: dict[str, Any], _number: int) -> None:
    """The state is not one of the contract's."""
    data["state"] = "contemplating"


@_changes("status")
def pending_again(data: dict[str, Any], _number: int) -> None:
    """The state is pending, whatever it was before."""
    _mark_unended(data, "pending")


@_changes("task")
def never_ends(data: dict[str, Any], _number: int) -> None:
    """The task stays in processing; no callback is sent."""
    _mark_unended(data, "processing")


@_changes("status")
def no_result_urls(data: dict[str, Any], _number: int) -> None:
    """A task that succeeded has no result URL."""
    _change_urls(data, lambda _url: [])


@_changes("status")
def many_result_urls(data: dict[str, Any], _number: int) -> None:
    """A task that succeeded has 100,000 result URLs."""
    _change_urls(data, lambda url: [url] * 100_000)


@_changes("status")
def foreign_result_url(data: dict[str, Any], _number: int) -> None:
    """The result URL of a task that succeeded is a file on the client's disk."""
    _change_urls(data, lambda _url: ["file:///etc/hostname"])


@_changes("status")
def skewed_clock(data: dict[str, Any], number: int) -> None:
    """Times in the reply are alternately five hours early and five hours late."""
    for name in data.keys() & {"createTime", "completeTime"}:
        data[name] += 5 * _HOUR_MS * (-1 if number % 2 else 1)


@_applies("status")
async def no_data(exchange: Exchange) -> None:
    """A success whose data is null."""
    await exchange.call_service()
    await exchange.answer(JSONResponse(success(None)))


@_applies("status")
async def deep_json(exchange: Exchange) -> None:
    """A reply of 100,000 nested lists."""
    await exchange.call_service()
    nested = b"[" * 100_000 + b"]" * 100_000
    await exchange.answer(Response(nested, media_type="application/json"))


def _mark_unended(data: dict[str, Any], state: str) -> None:
    data["state"] = state
    for name in ("completeTime", "costTime", "resultJson", "failCode", "failMsg"):
        data.pop(name, None)


def _change_urls(data: dict[str, Any], change: Callable[[str], list[str]]) -> None:
    if "resultJson" in data:
        (url,) = json.loads(data["resultJson"])["resultUrls"]
        data["resultJson"] = json.dumps({"resultUrls": change(url)})
