"""A sandbox whose account is in the environment, as at a terminal."""

import pytest

from prefect_flux_kontext.sandbox.server import running_sandbox
from prefect_flux_kontext.sandbox.settings import SandboxSettings

KEY = "key-of-the-tests"


@pytest.fixture
def sandbox(monkeypatch):
    with running_sandbox(SandboxSettings(mean=0.1, long_edge=64, api_key=KEY)) as running:
        monkeypatch.setenv("FLUX_KONTEXT_API_KEY", KEY)
        monkeypatch.setenv("FLUX_KONTEXT_BASE_URL", running.url)
        monkeypatch.setenv("FLUX_KONTEXT_POLL_INITIAL_DELAY", "0")
        monkeypatch.setenv("FLUX_KONTEXT_POLL_INTERVAL", "0.05")
        yield running
