"""What the examples need, on this machine, until Ctrl-C: a sandbox, an S3 and a Prefect server.

    python examples/playground.py

The folder `playground/` gets the file `environment`, to be read by the terminals in which the
examples are run. It costs nothing and talks to nobody.
"""

import logging
import signal
import sys
from pathlib import Path

import fsspec
from moto.server import ThreadedMotoServer

from prefect_flux_kontext.cli.prefect_server import prefect_server
from prefect_flux_kontext.sandbox.server import running_sandbox
from prefect_flux_kontext.sandbox.settings import PHOTOS, SandboxSettings

SERVICE = SandboxSettings(mean=2, long_edge=512)
FOUND_LAST_NIGHT = ("astronaut.jpg", "cat.png")


def s3() -> dict[str, str]:
    """Serve an S3 from this process, with the bucket `shop`, and say how it is reached."""
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # a line for each request
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    access = {
        "endpoint_url": f"http://{host}:{port}",
        "key": "playground",
        "secret": "playground",
    }
    bucket = fsspec.filesystem("s3", **access)
    bucket.mkdir("shop")
    for photo in PHOTOS.iterdir():
        bucket.put_file(str(photo), f"shop/photos/{photo.name}")
    for name in FOUND_LAST_NIGHT:
        bucket.put_file(str(PHOTOS / name), f"shop/incoming/{name}")
    return {f"FSSPEC_S3_{name.upper()}": value for name, value in access.items()}


def main(folder: Path) -> None:
    """Start all three, say where they are, and stop them when this process is asked to end."""
    with running_sandbox(SERVICE) as sandbox, prefect_server(folder / "prefect") as prefect:
        names = {
            "FLUX_KONTEXT_API_KEY": "sandbox",
            "FLUX_KONTEXT_BASE_URL": sandbox.url,
            # Half a minute is what the real service takes.
            "FLUX_KONTEXT_POLL_INITIAL_DELAY": "1",
            "FLUX_KONTEXT_POLL_INTERVAL": "0.5",
            "PREFECT_API_URL": prefect.environment["PREFECT_API_URL"],
            "PREFECT_HOME": prefect.environment["PREFECT_HOME"],
            "PREFECT_RUNNER_POLL_FREQUENCY": "1",
            **s3(),
        }
        environment = folder / "environment"
        environment.write_text("".join(f"export {name}='{names[name]}'\n" for name in names))
        print(
            f"""
In another terminal: source {environment}

Prefect              {prefect.url}
The sandbox's bill   {sandbox.url}/sandbox/bill
A bucket             s3://shop

Ctrl-C stops all of it.""",
            flush=True,
        )
        signal.pause()


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit())
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "playground").absolute())
