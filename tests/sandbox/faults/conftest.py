"""A sandbox whose faults are reset before each test, and an HTTP client of it."""

import httpx
import pytest

from prefect_flux_kontext.sandbox.server import running_sandbox
from prefect_flux_kontext.sandbox.settings import SandboxSettings
from tests.sandbox.helpers import KEY


@pytest.fixture(scope="module")
def sandbox():
    with running_sandbox(SandboxSettings(mean=0, long_edge=64)) as running:
        yield running


@pytest.fixture
def http(sandbox):
    with httpx.Client(base_url=sandbox.url, headers=KEY, trust_env=False, timeout=20) as client:
        client.post("/sandbox/reset")
        client.delete("/sandbox/faults")
        yield client
