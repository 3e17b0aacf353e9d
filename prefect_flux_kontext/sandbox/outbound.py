"""How the sandbox calls others: to fetch references and to deliver callbacks."""

from __future__ import annotations

import httpx


def outbound_client(connections: int) -> httpx.AsyncClient:
    """A client that bothers no proxy with loopback and leaves no idle connection behind.

    No connection is kept, so the client needs no closing: in process, through an ASGI
    transport, nobody would tell the sandbox when to. Whoever uses it sets the time-out.
    """
    return httpx.AsyncClient(
        limits=httpx.Limits(max_connections=connections, max_keepalive_connections=0),
        mounts={f"all://{host}": None for host in ("127.0.0.1", "localhost", "[::1]")},
        timeout=None,  # noqa: S113 - the callers bound the whole exchange, not its parts
    )
