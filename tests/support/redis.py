"""A temporary Redis on loopback."""

import shutil
import subprocess
from contextlib import contextmanager
from importlib.util import find_spec

from tests.support.postgres import find_free_port


def find_obstacle():
    """Return why Prefect cannot use Redis on this machine, or None."""
    if shutil.which("redis-server") is None:
        return "Redis is not installed (Debian's package redis-server)"
    if find_spec("prefect_redis") is None:
        return "Prefect's package for Redis is not installed (prefect-redis)"
    return None


@contextmanager
def running_redis():
    """Run Redis, which keeps nothing on the disk; yield its URL."""
    port = find_free_port()
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            for line in server.stdout:
                if "Ready to accept connections" in line:
                    break
            yield f"redis://127.0.0.1:{port}"
        finally:
            server.terminate()
