"""A staging place for a service on this machine: a folder that this process serves on loopback."""

from __future__ import annotations

import functools
import http.server
import secrets
import tempfile
import threading
import weakref
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from prefect_flux_kontext.client.addresses import is_loopback_host
from prefect_flux_kontext.references.staging import Staging

if TYPE_CHECKING:
    from prefect_flux_kontext.images.decode import ImageFormat


class LoopbackStaging:
    """Serves staged files on loopback, below an unguessable path, until it is closed.

    The server starts with the first file.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._staging: Staging | None = None
        self._resources = ExitStack()
        weakref.finalize(self, self._resources.close)

    def put(self, data: bytes, kind: ImageFormat, *, verify_staged: bool = False) -> str:
        """Stage a file and return its name; see `Staging.put`."""
        return self._open().put(data, kind, verify_staged=verify_staged)

    def build_url(self, name: str, seconds: int) -> str:
        """Return the URL of a staged file; see `Staging.build_url`."""
        return self._open().build_url(name, seconds)

    def close(self) -> None:
        """Stop serving and remove the staged files."""
        self._resources.close()

    def _open(self) -> Staging:
        with self._lock:
            if self._staging is None:
                folder = self._resources.enter_context(
                    tempfile.TemporaryDirectory(prefix="flux-kontext-references-")
                )
                handler = functools.partial(_FileHandler, directory=folder)
                server = self._resources.enter_context(_Server(("127.0.0.1", 0), handler))
                self._resources.callback(server.shutdown)
                threading.Thread(target=server.serve_forever, daemon=True).start()
                token = secrets.token_urlsafe()
                url = f"http://127.0.0.1:{server.server_port}/{token}"
                self._staging = Staging(f"{folder}/{token}", url)
            return self._staging


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # the service may fetch many files at a time


class _FileHandler(http.server.SimpleHTTPRequestHandler):
    def list_directory(self, _path: Any) -> None:
        # A listing would tell the path.
        self.send_error(404)

    def log_message(self, *_: Any) -> None:
        """Log nothing: the URLs grant access."""


def is_loopback_url(url: str) -> bool:
    """Whether a URL leads to this machine, judged by its text."""
    try:
        return is_loopback_host(urlsplit(url).hostname)
    except ValueError:
        return False
