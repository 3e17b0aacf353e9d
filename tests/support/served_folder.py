"""A folder on the web, as far as this machine reaches."""

import contextlib
import functools
import http.server
import threading
from pathlib import Path


class _Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_args):
        """Keep quiet."""


@contextlib.contextmanager
def served_folder(folder):
    """Serve a folder, made where it is missing, on loopback.

    Yields:
        Its URL.
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
