"""Fixtures for what the pages use: a sandbox, a bucket, a Prefect server."""

import contextlib
import gc
import json
import os
import shutil
import socket
from pathlib import Path

import fsspec
import pytest
from prefect.blocks.notifications import CustomWebhookNotificationBlock

from prefect_flux_kontext import FluxKontextCredentials
from prefect_flux_kontext.sandbox.server import running_sandbox
from prefect_flux_kontext.sandbox.settings import PHOTOS, SandboxSettings
from tests.docs.blocks import ROOT
from tests.docs.reader import Reader
from tests.docs.terminal import Terminal
from tests.orchestration.conftest import (
    leave_sockets_to_prefect,
    prefect_api,  # noqa: F401 - a fixture
)
from tests.support.s3 import s3_server

BUCKET = "my-bucket"
CLOSED_ADDRESS = "http://127.0.0.1:1"
MANIFEST = "id,image,prompt\nmug,{url}/references/coffee.webp,As a poster\ndusk,,A lighthouse\n"
"""The `manifest.csv` of pages that do not show one."""


def pytest_collection_modifyitems(items):
    leave_sockets_to_prefect(items, Path(__file__).parent)


@pytest.fixture(scope="module")
def sandbox():
    with running_sandbox(SandboxSettings(mean=0.1, long_edge=64)) as running:
        yield running


@pytest.fixture(scope="module")
def s3():
    with s3_server(configured=False) as (_, client):
        yield client


@pytest.fixture
def bucket(s3):
    """Yield a client of an S3 with the pages' bucket, which is publicly readable."""
    public_read = {"Effect": "Allow", "Principal": "*", "Action": "s3:GetObject"}
    policy = {"Statement": [{**public_read, "Resource": f"arn:aws:s3:::{BUCKET}/*"}]}
    s3.create_bucket(Bucket=BUCKET)
    s3.put_bucket_policy(Bucket=BUCKET, Policy=json.dumps(policy))
    yield s3
    for page in s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET):
        for found in page.get("Contents", []):
            s3.delete_object(Bucket=BUCKET, Key=found["Key"])
    s3.delete_bucket(Bucket=BUCKET)


@pytest.fixture(scope="module")
def saved_blocks(prefect_api, sandbox):  # noqa: F811 - the fixture imported above
    """Save the Blocks that the pages use."""
    account = FluxKontextCredentials(api_key="sandbox", base_url=sandbox.url)
    account.save("my-account")
    webhook = CustomWebhookNotificationBlock(name="closed", url=CLOSED_ADDRESS)
    webhook.save("alerts")


def find_quiet_port():
    """Return a free port below the ephemeral range, so no connection takes it meanwhile."""
    for port in range(20_000 + os.getpid() % 10_000, 32_000):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("no port is free")


@pytest.fixture
def reader(tmp_path, sandbox, bucket, prefect_api, saved_blocks, monkeypatch):  # noqa: F811
    """Yield a reader in a new folder, with the account, bucket and photos that the pages use."""
    endpoint = bucket.meta.endpoint_url
    for name, text in {
        "FLUX_KONTEXT_API_KEY": "sandbox",
        "FLUX_KONTEXT_BASE_URL": sandbox.url,
        # The interval stays at its default, because plans depend on it.
        "FLUX_KONTEXT_POLL_INITIAL_DELAY": "0.3",
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        # Any request that is not to loopback goes to a proxy that does not exist, and fails.
        **dict.fromkeys(
            ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), CLOSED_ADDRESS
        ),
        **dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1,localhost"),
        **{name: text for name, text in prefect_api.environment.items() if "PREFECT" in name},
    }.items():
        monkeypatch.setenv(name, text)
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "prefect.yaml", tmp_path)
    shutil.copytree(ROOT / "flows", tmp_path / "flows")
    (tmp_path / "photos").mkdir()
    photos = sorted(path for path in PHOTOS.iterdir() if path.suffix == ".jpg")
    for photo in photos:
        shutil.copy(photo, tmp_path / "photos")
        bucket.upload_file(str(photo), BUCKET, f"in/summer/{photo.name}")
    (tmp_path / "manifest.csv").write_text(MANIFEST.format(url=sandbox.url))
    listen = f"127.0.0.1:{find_quiet_port()}"
    replacements = {
        "http://127.0.0.1:8765": sandbox.url,
        "FLUX_KONTEXT_CALLBACK_LISTEN=127.0.0.1:8780": f"FLUX_KONTEXT_CALLBACK_LISTEN={listen}",
        "https://hooks.example.com/flux": f"http://{listen}/flux",
        "https://cdn.example.com/staging": f"{endpoint}/{BUCKET}/staging",
        "https://example.com/": f"{sandbox.url}/references/",
        "slack-webhook/": "custom-webhook/",
        "FLUX_KONTEXT_POLL_INITIAL_DELAY=3": "FLUX_KONTEXT_POLL_INITIAL_DELAY=0.3",
        "FLUX_KONTEXT_API_KEY=…": "FLUX_KONTEXT_API_KEY=sandbox",
        "$(openssl rand -hex 32)": "0123456789abcdef" * 2,  # not every machine has openssl
    }
    with Terminal(tmp_path, replacements) as terminal:
        yield Reader(tmp_path, terminal)
    fsspec.filesystem("s3").clear_instance_cache()
    gc.collect()
