"""What every test shares: event loops with real or virtual time, and a clean environment."""

import os

import pytest

from tests.support.virtual_time import VirtualTimeLoop


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "virtual_time: run the async test on a loop whose time jumps, never waits"
    )


@pytest.fixture
def anyio_backend(request):
    """Async tests run on asyncio; with the marker `virtual_time` its clock jumps."""
    if request.node.get_closest_marker("virtual_time"):
        return "asyncio", {"loop_factory": VirtualTimeLoop}
    return "asyncio"


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch):
    """No test reads the settings of the person who runs it."""
    for name in list(os.environ):
        if name.startswith("FLUX_KONTEXT_"):
            monkeypatch.delenv(name)
