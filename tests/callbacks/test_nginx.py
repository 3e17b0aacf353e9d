"""The nginx configuration of the documentation, run with a real nginx."""

import contextlib
import os
import re
import shutil
import socket
import ssl
import subprocess
import time
from pathlib import Path

import httpx
import pytest

from prefect_flux_kontext.batch.policy import RowOptions
from prefect_flux_kontext.batch.runner import run_batch
from prefect_flux_kontext.batch.session import open_session
from prefect_flux_kontext.callbacks.options import CallbackOptions
from prefect_flux_kontext.callbacks.receiver import create_receiver, serve_in_background
from prefect_flux_kontext.client.client import FluxKontextClient
from prefect_flux_kontext.sandbox.server import running_sandbox
from prefect_flux_kontext.sandbox.settings import SandboxSettings
from prefect_flux_kontext.settings import FluxKontextSettings
from prefect_flux_kontext.storage.filesystem import OutputFolder
from tests.callbacks.called_batch import manifest
from tests.callbacks.test_server import SECRET, envelope, stored_task_ids, token
from tests.support.batches import KEY, QUICK

NGINX = shutil.which("nginx") or "/usr/sbin/nginx"
PAGE = Path(__file__).parents[2] / "docs" / "callbacks.md"

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(not Path(NGINX).exists(), reason="nginx is not installed"),
    pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed"),
]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def certificate(folder):
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -keyout key.pem -out cert.pem "
        "-subj /CN=localhost -addext subjectAltName=DNS:localhost,IP:127.0.0.1"
    )
    subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)


def configuration(folder, port, upstream):
    documented = re.search(r"```nginx\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
    for documented_value, value in {
        "127.0.0.1:8780": f"127.0.0.1:{upstream}",
        "listen 443 ssl": f"listen 127.0.0.1:{port} ssl",
        "hooks.example.com;\n    ssl": "localhost;\n    ssl",
        "/etc/ssl/hooks.example.com.pem": f"{folder}/cert.pem",
        "/etc/ssl/hooks.example.com.key": f"{folder}/key.pem",
    }.items():
        assert documented_value in documented
        documented = documented.replace(documented_value, value)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    places = "".join(f"{kind}_temp_path {folder}/{kind};\n" for kind in kinds)
    user = "user root;\n" if os.geteuid() == 0 else ""
    return (
        f"{user}daemon off;\nworker_processes 1;\npid {folder}/nginx.pid;\n"
        f"error_log {folder}/error.log;\nevents {{}}\n"
        f"http {{\naccess_log {folder}/access.log;\n{places}{documented}}}\n"
    )


@contextlib.contextmanager
def nginx(folder, port, upstream):
    certificate(folder)
    (folder / "nginx.conf").write_text(configuration(folder, port, upstream))
    command = [NGINX, "-p", str(folder), "-c", str(folder / "nginx.conf")]
    command += ["-e", str(folder / "error.log")]
    process = subprocess.Popen(command)
    try:
        until = time.monotonic() + 30
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.02)
        yield f"https://localhost:{port}/flux"
    finally:
        process.terminate()
        process.wait()


async def test_callbacks_pass_through_tls_and_a_path_prefix(tmp_path):
    folder, kept = tmp_path / "nginx", tmp_path / "kept"
    folder.mkdir()
    async with serve_in_background(create_receiver(str(kept), SECRET), "127.0.0.1", 0) as receiver:
        with nginx(folder, free_port(), int(receiver.rpartition(":")[2])) as url:
            trusted = ssl.create_default_context(cafile=folder / "cert.pem")
            async with httpx.AsyncClient(verify=trusted, trust_env=False) as http:
                reply = await http.post(f"{url}/{token(1)}", json=envelope(1))
                assert (reply.status_code, reply.content) == (200, b"")
                assert (await http.get(f"{url}/{token(2)}")).status_code == 403
                huge = await http.post(f"{url}/{token(3)}", content=b"x" * 70_000)
                assert huge.status_code == 413
                assert (await http.post(f"{url}/wrong", json=envelope(4))).status_code == 200
    assert await stored_task_ids(kept) == {"task_1"}
    logs = "".join((folder / name).read_text() for name in ("access.log", "error.log"))
    assert token(1).rpartition(".")[2] not in logs


async def test_batch_is_called_back_through_nginx(tmp_path, monkeypatch):
    folder = tmp_path / "nginx"
    folder.mkdir()
    listen = free_port()
    with nginx(folder, free_port(), listen) as url:
        monkeypatch.setenv(
            "SSL_CERT_FILE", str(folder / "cert.pem")
        )  # for the sandbox's callbacks
        callbacks = CallbackOptions(url=url, secret=SECRET, listen=("127.0.0.1", listen))
        with running_sandbox(SandboxSettings(mean=0.5, long_edge=16)) as sandbox:
            async with open_session(
                FluxKontextClient(KEY, base_url=sandbox.url),
                OutputFolder(str(tmp_path / "out")),
                RowOptions(cadence=QUICK),
                FluxKontextSettings(),
                callbacks,
            ) as session:
                summary = await run_batch(
                    session, manifest(10), lambda wave: wave.run(), concurrent_tasks=100
                )
            bill = sandbox.service.bill()
    assert summary.stored == bill["status_requests"] == bill["callbacks"]["delivered"] == 10
