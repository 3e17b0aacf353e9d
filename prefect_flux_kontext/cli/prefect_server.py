"""A Prefect server that runs as long as a block does, with its own home folder."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import httpx

from prefect_flux_kontext.errors import ConfigurationError

if TYPE_CHECKING:
    from pathlib import Path

_LOOPBACK = "127.0.0.1"

# The first start creates the database, which takes long on a busy machine.
_START_TIMEOUT_SECONDS = 120.0
_CHECKS_PER_SECOND = 5
_STOP_TIMEOUT_SECONDS = 20.0


@dataclass(frozen=True)
class PrefectServer:
    """A running server."""

    url: str  # of its pages
    environment: dict[str, str]  # all of it, for processes that talk to this server only
    command: str  # starts it again in a shell, with the same database


@contextmanager
def prefect_server(
    home: Path, port: int | None = None, settings: Mapping[str, str] | None = None
) -> Iterator[PrefectServer]:
    """Run `prefect server start` on loopback while the block runs.

    Its database and its log (`server.log`) are in the folder `home`. Without a port, it takes a
    free one. The settings are further ones of Prefect, such as another database.

    Raises:
        ConfigurationError: The server does not start; the message names its log.
    """
    home.mkdir(parents=True, exist_ok=True)
    if port is None:
        with socket.create_server((_LOOPBACK, 0)) as listener:
            port = listener.getsockname()[1]
    url = f"http://{_LOOPBACK}:{port}"
    environment = _environment_without_prefect() | {
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": f"{url}/api",
        # Nothing leaves this machine, and nothing goes through a proxy.
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
            # Ctrl-C on the terminal reaches only this process, which then stops the server.
            start_new_session=True,
        )
        try:
            if not _wait_until_up(server, url):
                raise ConfigurationError(f"The Prefect server did not start; its log is {log}.")
            yield PrefectServer(url, environment, _start_command(home, url, start))
        finally:
            server.terminate()
            try:
                server.wait(_STOP_TIMEOUT_SECONDS)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _environment_without_prefect() -> dict[str, str]:
    # The user's settings may name another database, another server or its API key.
    return {name: text for name, text in os.environ.items() if not name.startswith("PREFECT_")}


def _start_command(home: Path, url: str, start: list[str]) -> str:
    python = shlex.join([sys.executable, "-m", *start])
    # The pages ask the API at this URL, and by default at another port.
    return f"PREFECT_HOME={shlex.quote(str(home))} PREFECT_UI_API_URL={url}/api {python}"


def _wait_until_up(server: subprocess.Popen[bytes], url: str) -> bool:
    """Return whether the server answers in time; False also when it has exited."""
    for _ in range(int(_START_TIMEOUT_SECONDS * _CHECKS_PER_SECOND)):
        try:
            if httpx.get(f"{url}/api/health", trust_env=False).is_success:
                return True
        except httpx.TransportError:
            pass
        try:
            server.wait(1 / _CHECKS_PER_SECOND)
        except subprocess.TimeoutExpired:
            continue
        return False
    return False
