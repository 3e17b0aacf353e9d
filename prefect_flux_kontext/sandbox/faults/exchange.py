"""A request to which a fault applies: ways to answer it and to end its connection."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prefect_flux_kontext.sandbox.contract import success

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from prefect_flux_kontext.sandbox.faults.plan import FaultPlan

CONNECTION = "sandbox.connection"
"""Name of the server's ASGI extension whose `reset` and `close` end a request's connection."""

JSON = "application/json"


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


@dataclass(frozen=True)
class Exchange:
    """A request on its way to the service: the n-th of its kind, under a plan of faults.

    In process there is no connection. Ending it raises ConnectionResetError instead.
    """

    app: ASGIApp
    scope: Scope
    receive: Receive
    send: Send
    plan: FaultPlan
    number: int

    async def call_service(self) -> Reply:
        """Pass the request to the service and return its reply without sending it."""
        reply = Reply(500, [], b"")

        async def keep(message: Message) -> None:
            if message["type"] == "http.response.start":
                reply.status, reply.headers = message["status"], list(message["headers"])
            else:
                reply.body += message.get("body", b"")

        await self.app(self.scope, self.receive, keep)
        return reply

    async def discard_request(self) -> None:
        """Read the request without passing it to the service."""
        while (await self.receive()).get("more_body"):
            pass

    async def answer(
        self, status: int, body: bytes, media_type: str = JSON, **headers: str
    ) -> None:
        """Send a complete response."""
        await self.send_head(status, media_type, content_length=str(len(body)), **headers)
        await self.send_body(body, last=True)

    async def answer_success(self, data: Any) -> None:
        """Send the envelope of a success."""
        await self.answer(200, json.dumps(success(data)).encode())

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
        await self.send({"type": "http.response.body", "body": body, "more_body": not last})

    async def wait_for_disconnect(self) -> None:
        """Wait until the client disconnects."""
        while (await self.receive())["type"] != "http.disconnect":
            pass

    async def end_connection(self, how: str) -> None:
        """End the connection: `reset` it, or `close` it after what was sent is flushed."""
        control = self.scope.get("extensions", {}).get(CONNECTION)
        if control is None:
            raise ConnectionResetError("The sandbox broke the connection.")
        control[how]()
        await self.wait_for_disconnect()

    async def hang(self) -> None:
        """Close the connection after the plan's seconds, unless the client disconnects first."""
        try:
            async with asyncio.timeout(self.plan.hang):
                await self.wait_for_disconnect()
        except TimeoutError:
            await self.end_connection("close")

    async def _start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
