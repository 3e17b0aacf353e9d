"""A request to which a fault applies: ways to answer it and to end its connection."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from prefect_flux_kontext.sandbox.faults.plan import FaultPlan

CONNECTION = "sandbox.connection"
"""Name of the server's ASGI extension whose `reset` and `close` end a request's connection."""

JSON = "application/json"
HTML = "text/html"


@dataclass
class Reply:
    """The service's reply."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes

    @property
    def media_type(self) -> str:
        """The Content-Type header."""
        return dict(self.headers).get(b"content-type", b"").decode()


class Exchange:
    """A request on its way to the service.

    In process there is no connection. Ending it raises ConnectionResetError instead.

    Args:
        app: The service.
        scope: The ASGI scope of the request.
        receive: Returns the request's body, then the disconnect.
        send: Accepts the response.
        plan: Durations of slow, hanging and late faults.
        number: Number of the request among its kind, from 1.
    """

    def __init__(
        self,
        app: ASGIApp,
        scope: Scope,
        receive: Receive,
        send: Send,
        *,
        plan: FaultPlan,
        number: int,
    ) -> None:
        self.plan = plan
        self.number = number
        self._app = app
        self._scope = scope
        self._receive = receive
        self._send = send

    async def call_service(self) -> Reply:
        """Pass the request to the service and return its reply without sending it."""
        reply = Reply(500, [], b"")

        async def keep(message: Message) -> None:
            if message["type"] == "http.response.start":
                reply.status, reply.headers = message["status"], list(message["headers"])
            else:
                reply.body += message.get("body", b"")

        await self._app(self._scope, self._receive, keep)
        return reply

    async def discard_request(self) -> None:
        """Read the request without passing it to the service."""
        while (await self._receive()).get("more_body"):
            pass

    async def answer(
        self, status: int, body: bytes, media_type: str = JSON, **headers: str
    ) -> None:
        """Send a complete response."""
        await self.send_head(status, media_type, content_length=str(len(body)), **headers)
        await self.send_body(body, last=True)

    async def answer_error(
        self, code: int, message: str, *, status: int | None = None, **headers: str
    ) -> None:
        """Send an error envelope, as HTTP status `code` unless `status` is given."""
        envelope = {"code": code, "message": message, "data": None}
        await self.answer(status or code, json.dumps(envelope).encode(), **headers)

    async def answer_success(self, data: Any) -> None:
        """Send the envelope of a success."""
        envelope = {"code": 200, "message": "success", "data": data}
        await self.answer(200, json.dumps(envelope).encode())

    async def pass_on(self, reply: Reply) -> None:
        """Send the service's reply unchanged."""
        await self._start(reply.status, reply.headers)
        await self.send_body(reply.body, last=True)

    async def send_head(self, status: int, media_type: str, **headers: str) -> None:
        """Send status and headers. Without a Content-Length the body is chunked."""
        named = {"content-type": media_type, **headers}
        pairs = [(k.replace("_", "-").encode(), v.encode()) for k, v in named.items()]
        await self._start(status, pairs)

    async def send_body(self, body: bytes, *, last: bool = False) -> None:
        """Send a chunk of the body."""
        await self._send({"type": "http.response.body", "body": body, "more_body": not last})

    async def wait_for_disconnect(self) -> None:
        """Wait until the client disconnects."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def reset(self) -> None:
        """Reset the connection."""
        await self._end_connection("reset")

    async def close(self) -> None:
        """Close the connection after what was sent is flushed."""
        await self._end_connection("close")

    async def wait_for_disconnect_within(self, seconds: float) -> bool:
        """Return whether the client disconnects within the time."""
        try:
            async with asyncio.timeout(seconds):
                await self.wait_for_disconnect()
        except TimeoutError:
            return False
        return True

    async def _start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def _end_connection(self, how: str) -> None:
        control = self._scope.get("extensions", {}).get(CONNECTION)
        if control is None:
            raise ConnectionResetError("The sandbox broke the connection.")
        control[how]()
        await self.wait_for_disconnect()
