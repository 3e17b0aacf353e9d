"""A real Prefect server for as long as a block runs, with a home of its own."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import httpx

from prefect_flux_kontext.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

_LOOPBACK = "127.0.0.1"
_STARTS_WITHIN = 120.0
_LOOKS_PER_SECOND = 5
_STOPS_WITHIN = 20.0


@dataclass(frozen=True)
class PrefectServer:
    """A server that runs.

    Attributes:
        url: Address of its pages.
        environment: The whole environment of a process that talks to it, and to no other.
        command: What a person types to start it again, with all it has recorded.
    """

    url: str
    environment: dict[str, str]
    command: str


@contextmanager
def prefect_server(
    home: Path, port: int | None = None, settings: Mapping[str, str] | None = None
) -> Iterator[PrefectServer]:
    """Start `prefect server start` on loopback, and stop it afterwards.

    Args:
        home: Folder for its database, and for what it prints (`server.log`).
        port: Port to listen on; None takes a free one.
        settings: More of Prefect's settings, such as another database.

    Raises:
        ConfigurationError: It does not start; the message says where its log is.
    """
    home.mkdir(parents=True, exist_ok=True)
    port = port or _free_port()
    url = f"http://{_LOOPBACK}:{port}"
    environment = _environment_without_prefect() | {
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": f"{url}/api",
        # Nothing leaves this machine, nor goes through a proxy.
        "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "NO_PROXY": _LOOPBACK,
        "no_proxy": _LOOPBACK,
    }
    start = ["prefect", "server", "start", "--host", _LOOPBACK, "--port", str(port)]
    log = home / "server.log"
    with log.open("wb") as printed:
        server = subprocess.Popen(
            [sys.executable, "-m", *start],
            env=environment | dict(settings or {}),
            stdout=printed,
            stderr=subprocess.STDOUT,
            # Ctrl-C on the terminal is for us alone; we stop it.
            start_new_session=True,
        )
        try:
            if not _is_up(server, url):
                raise ConfigurationError(f"The Prefect server did not start; its log is {log}.")
            yield PrefectServer(url, environment, _command(home, start))
        finally:
            server.terminate()
            try:
                server.wait(_STOPS_WITHIN)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _environment_without_prefect() -> dict[str, str]:
    # The user's own settings may name another database, another server or a key to it.
    return {name: text for name, text in os.environ.items() if not name.startswith("PREFECT_")}


def _command(home: Path, start: list[str]) -> str:
    python = shlex.join([sys.executable, "-m", *start])
    return f"PREFECT_HOME={shlex.quote(str(home))} {python}"


def _free_port() -> int:
    with socket.create_server((_LOOPBACK, 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _is_up(server: subprocess.Popen[bytes], url: str) -> bool:
    for _ in range(int(_STARTS_WITHIN * _LOOKS_PER_SECOND)):
        try:
            if httpx.get(f"{url}/api/health", trust_env=False).is_success:
                return True
        except httpx.TransportError:
            pass
        try:
            server.wait(1 / _LOOKS_PER_SECOND)
        except subprocess.TimeoutExpired:
            continue
        return False
    return False
