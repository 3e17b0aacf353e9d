"""A request to which a fault applies: ways to answer it and to end its connection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.responses import Response

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from prefect_flux_kontext.sandbox.faults.plan import FaultPlan

CONNECTION = "sandbox.connection"
"""Name of the server's ASGI extension whose `reset` and `close` end a request's connection."""


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

    async def call_service(self) -> Response:
        """Pass the request to the service and return its reply without sending it."""
        head: Message = {}
        body = bytearray()

        async def keep(message: Message) -> None:
            if message["type"] == "http.response.start":
                head.update(message)
            else:
                body.extend(message.get("body", b""))

        await self.app(self.scope, self.receive, keep)
        return Response(bytes(body), head["status"], Headers(raw=head["headers"]))

    async def discard_request(self) -> None:
        """Read the request without passing it to the service."""
        while (await self.receive()).get("more_body"):
            pass

    async def answer(self, reply: Response) -> None:
        """Send a complete reply."""
        await reply(self.scope, self.receive, self.send)

    async def send_head(self, reply: Response) -> None:
        """Send status and headers of a reply. Without a Content-Length the body is chunked."""
        status, headers = reply.status_code, reply.raw_headers
        await self.send({"type": "http.response.start", "status": status, "headers": headers})

    async def send_body(self, body: bytes | memoryview, *, last: bool = False) -> None:
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
