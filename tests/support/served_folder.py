"""A folder served over HTTP on loopback."""

import contextlib
import functools
import http.server
import threading
from pathlib import Path


class _Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_args):
        """Log nothing."""


@contextlib.contextmanager
def served_folder(folder):
    """Serve a folder on loopback; create it if it is missing.

    Yields:
        The URL of the folder.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    handler = functools.partial(_Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
