"""One request that a fault befalls, and what can be done with its reply and its connection."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from prefect_flux_kontext.sandbox.faults.plan import FaultPlan

CONNECTION = "sandbox.connection"
"""ASGI extension of our server: `reset` and `close` end the connection of a request."""

JSON = "application/json"
HTML = "text/html"


@dataclass
class Reply:
    """What the service would answer."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes

    @property
    def media_type(self) -> str:
        """Its Content-Type."""
        return dict(self.headers).get(b"content-type", b"").decode()


class Exchange:
    """A request on its way to the service.

    In process, where there is no connection to break, breaking it raises ConnectionResetError.

    Args:
        app: The service.
        scope: The request, as ASGI has it.
        receive: Gives the request's body, then the disconnect.
        send: Takes the response.
        plan: Says how long things take.
        number: Of the request among its kind.
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

    async def served(self) -> Reply:
        """Let the service see the request, and keep its reply back."""
        reply = Reply(500, [], b"")

        async def keep(message: Message) -> None:
            if message["type"] == "http.response.start":
                reply.status, reply.headers = message["status"], list(message["headers"])
            else:
                reply.body += message.get("body", b"")

        await self._app(self._scope, self._receive, keep)
        return reply

    async def unseen(self) -> None:
        """Take the request, so that the service never sees it."""
        while (await self._receive()).get("more_body"):
            pass

    async def answer(
        self, status: int, body: bytes, media_type: str = JSON, **headers: str
    ) -> None:
        """Answer with a whole body."""
        await self.begin(status, media_type, content_length=str(len(body)), **headers)
        await self.more(body, last=True)

    async def envelope(
        self, code: int, message: str, *, status: int | None = None, **headers: str
    ) -> None:
        """Answer with an error envelope, as HTTP status `code` unless another is given."""
        told = {"code": code, "message": message, "data": None}
        await self.answer(status or code, json.dumps(told).encode(), **headers)

    async def data(self, data: Any) -> None:
        """Answer with the envelope of a success."""
        told = {"code": 200, "message": "success", "data": data}
        await self.answer(200, json.dumps(told).encode())

    async def pass_on(self, reply: Reply) -> None:
        """Answer as the service does."""
        await self._start(reply.status, reply.headers)
        await self.more(reply.body, last=True)

    async def begin(self, status: int, media_type: str, **headers: str) -> None:
        """Send the head of a response; without a Content-Length its body comes in chunks."""
        named = {"content-type": media_type, **headers}
        pairs = [(k.replace("_", "-").encode(), v.encode()) for k, v in named.items()]
        await self._start(status, pairs)

    async def more(self, body: bytes, *, last: bool = False) -> None:
        """Send a piece of the body."""
        await self._send({"type": "http.response.body", "body": body, "more_body": not last})

    async def gone(self) -> None:
        """Wait until the client has gone."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def reset(self) -> None:
        """Reset the connection."""
        await self._end_connection("reset")

    async def close(self) -> None:
        """Close the connection, when what was sent has left."""
        await self._end_connection("close")

    async def left_within(self, seconds: float) -> bool:
        """Wait so long at most for the client to leave; whether it has."""
        try:
            async with asyncio.timeout(seconds):
                await self.gone()
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
        await self.gone()
