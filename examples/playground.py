"""Run what the examples need on this machine: a sandbox, an S3 server and a Prefect server.

    python examples/playground.py

Writes the file `playground/environment`, for the terminals in which you run the examples. Costs
nothing and makes no connection to other machines. Ctrl-C stops all of it.
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

SANDBOX = SandboxSettings(mean=2, long_edge=512)
INCOMING = ("astronaut.jpg", "cat.png")


def start_s3() -> dict[str, str]:
    """Serve S3 from this process, with the bucket `shop`; return the variables that reach it."""
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # it logs a line for each request
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
    for name in INCOMING:
        bucket.put_file(str(PHOTOS / name), f"shop/incoming/{name}")
    return {f"FSSPEC_S3_{name.upper()}": value for name, value in access.items()}


def main(folder: Path) -> None:
    """Start all three, print their addresses, and stop them on SIGINT or SIGTERM."""
    with running_sandbox(SANDBOX) as sandbox, prefect_server(folder / "prefect") as prefect:
        variables = {
            "FLUX_KONTEXT_API_KEY": "sandbox",
            "FLUX_KONTEXT_BASE_URL": sandbox.url,
            # The sandbox takes 2 s; the defaults are for the real service, which takes 30 s.
            "FLUX_KONTEXT_POLL_INITIAL_DELAY": "1",
            "FLUX_KONTEXT_POLL_INTERVAL": "0.5",
            "PREFECT_API_URL": prefect.environment["PREFECT_API_URL"],
            "PREFECT_HOME": prefect.environment["PREFECT_HOME"],
            "PREFECT_RUNNER_POLL_FREQUENCY": "1",
            **start_s3(),
        }
        environment = folder / "environment"
        environment.write_text(
            "".join(f"export {name}='{value}'\n" for name, value in variables.items())
        )
        print(
            f"""
In another terminal: source {environment}

Prefect server   {prefect.url}
Sandbox bill     {sandbox.url}/sandbox/bill
Bucket           s3://shop

Press Ctrl-C to stop.""",
            flush=True,
        )
        signal.pause()


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit())
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "playground").absolute())
