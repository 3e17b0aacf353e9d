"""What every test shares: event loops with real or virtual time, and a clean environment."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.support.virtual_time import VirtualTimeLoop

_TESTS = Path(__file__).parent

# Before anything imports Prefect: it reads its settings once. Nothing leaves this machine, no
# server is started behind a test's back, and no profile of the person who runs it is read.
for _name in [name for name in os.environ if name.startswith("PREFECT_")]:
    del os.environ[_name]
_home = tempfile.mkdtemp(prefix="prefect-home-")
atexit.register(shutil.rmtree, _home, ignore_errors=True)
os.environ |= {
    "DO_NOT_TRACK": "1",
    "PREFECT_HOME": _home,
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
    # Tasks run outside of flows too; Prefect would warn that their logs go nowhere.
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
}


# A slow machine is no failure, and the same examples are tried each time; others with
# `--hypothesis-profile=others`.
settings.register_profile("others", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("same", settings.get_profile("others"), derandomize=True, database=None)
settings.register_profile("fuzz", settings.get_profile("others"), max_examples=5_000)
settings.load_profile("same")


# Their tests take longest, so they start first and no worker is left alone with one at the end.
_SLOW_FOLDERS = ("orchestration", "examples", "chaos", "docs", "cli", "postgres")

# Their tests start servers, workers and browsers and stop processes. One that fails on a busy
# machine is run again, and the summary lists it as RERUN.
_REAL_FOLDERS = {"orchestration", "examples", "docs", "cli", "postgres", "report"}


# Measuring coverage doubles the time of tests that simulate hours of work or try many inputs, and
# other tests run the same lines.
_UNMEASURED_FOLDERS = {"chaos", "fuzz"}


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "virtual_time: run the async test on a loop whose time jumps, never waits"
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    order = {name: number for number, name in enumerate(_SLOW_FOLDERS)}
    items.sort(key=lambda item: order.get(_folder(item), len(order)))
    for item in items:
        if _folder(item) in _REAL_FOLDERS:
            item.add_marker(pytest.mark.flaky(reruns=1))
        is_simulated = item.get_closest_marker("virtual_time") and _folder(item) != "client"
        if is_simulated or _folder(item) in _UNMEASURED_FOLDERS:
            item.add_marker(pytest.mark.no_cover)


def _folder(item):
    return item.path.relative_to(_TESTS).parts[0]


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
