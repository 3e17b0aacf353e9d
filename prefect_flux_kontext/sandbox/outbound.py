"""The HTTP client that fetches references and delivers callbacks."""

from __future__ import annotations

import httpx


def outbound_client(connections: int) -> httpx.AsyncClient:
    """Create a client that uses no proxy for loopback and keeps no idle connection.

    Without idle connections the client needs no closing. In process, through an ASGI
    transport, the sandbox would not know when to close it. Callers set the time-out.
    """
    return httpx.AsyncClient(
        limits=httpx.Limits(max_connections=connections, max_keepalive_connections=0),
        mounts={f"all://{host}": None for host in ("127.0.0.1", "localhost", "[::1]")},
        timeout=None,  # noqa: S113 - callers limit the whole exchange
    )
