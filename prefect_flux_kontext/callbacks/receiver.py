"""The receiver of callbacks, as an ASGI application: durable first, then 200.

Everything that is well-formed is answered alike, an empty 200, so that nobody learns from the
answer which token is right, and nothing that was sent is ever sent back.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import Route

from prefect_flux_kontext.api.replies import read_callback
from prefect_flux_kontext.callbacks.inbox import Callback, Inbox
from prefect_flux_kontext.callbacks.tokens import checked_secret, named_by
from prefect_flux_kontext.errors import LedgerError
from prefect_flux_kontext.ledger.store import RecordStore

if TYPE_CHECKING:
    from pydantic import SecretStr
    from starlette.requests import Request

    from prefect_flux_kontext.callbacks.tokens import Attempt

logger = logging.getLogger(__name__)

_LARGEST_BODY = 64 * 2**10
_SLOWEST_BODY = 10.0
_SLOWEST_RECORD = 20.0
"""Seconds for the body and for the record: together no more than the service's 30."""

_REMEMBERED = 20_000
_BODIES_OF_ONE = 4
"""Different bodies kept for one attempt: a task has one id, so whoever sends more is playing."""

_TOLD_EVERY = 60.0


def create_receiver(inbox: Inbox | str, secret: SecretStr | str | None) -> Starlette:
    """A receiver to serve, or to mount in an application of your own under any path.

    The last part of a request's path is the token, so it works behind a proxy whether that
    takes its path prefix away or not.

    Args:
        inbox: Where callbacks are kept: a folder or prefix on any fsspec filesystem. A batch
            looks in `OUTPUT/_ledger/callbacks`, unless FLUX_KONTEXT_CALLBACK_INBOX says where.
        secret: The one that the batch makes its tokens with.

    Raises:
        ConfigurationError: There is no secret, or it is too short.
    """
    kept = inbox if isinstance(inbox, Inbox) else Inbox(RecordStore(inbox))
    receiver = _Receiver(kept, checked_secret(secret))
    return Starlette(routes=[Route("/{path:path}", receiver.take, methods=["POST"])])


class _Receiver:
    def __init__(self, inbox: Inbox, secret: bytes) -> None:
        self._inbox = inbox
        self._secret = secret
        self._seen: OrderedDict[Attempt, set[str | None]] = OrderedDict()
        self._wrong = 0
        self._tell_from = 0.0

    async def take(self, request: Request) -> Response:
        """Answer one request."""
        try:
            async with asyncio.timeout(_SLOWEST_BODY):
                body = await _body(request)
        except TimeoutError:
            return _closing(408)
        except ClientDisconnect:
            return _closing(400)
        if body is None:
            return _closing(413)
        attempt = named_by(self._secret, request.url.path.rpartition("/")[2])
        if attempt is None:
            self._count_wrong()
            return Response()
        try:
            async with asyncio.timeout(_SLOWEST_RECORD):
                await self._keep(attempt, read_callback(body))
        except (LedgerError, TimeoutError) as error:
            # The service delivers it again; asking it finds the task's end in any case.
            logger.warning("A callback could not be kept: %s", error or "it took too long")
            return Response(status_code=503)
        return Response()

    async def _keep(self, attempt: Attempt, task_id: str | None) -> None:
        known = self._seen.get(attempt, set())
        if task_id in known or len(known) >= _BODIES_OF_ONE:
            return
        owner, key, number = attempt
        await self._inbox.keep(Callback(owner=owner, key=key, number=number, task_id=task_id))
        self._seen.setdefault(attempt, set()).add(task_id)
        if len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)

    def _count_wrong(self) -> None:
        self._wrong += 1
        now = asyncio.get_running_loop().time()
        if now >= self._tell_from:
            self._tell_from = now + _TOLD_EVERY
            logger.warning(
                "%d callbacks so far came with a token that was not made with our secret. If they "
                "are the service's, receiver and batch have different secrets.",
                self._wrong,
            )


async def _body(request: Request) -> bytes | None:
    """The whole body; None where it is too large."""
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > _LARGEST_BODY:
            return None
    return bytes(body)


def _closing(status: int) -> Response:
    """An answer to a request that is not read to its end."""
    return Response(status_code=status, headers={"Connection": "close"})
