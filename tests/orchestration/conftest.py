"""A real Prefect server for all tests of this folder, and a sandbox for each test."""

import gc
from dataclasses import dataclass
from pathlib import Path

import pytest
from prefect import context
from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogWorker
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.utilities.asyncutils import run_coro_as_sync

from prefect_flux_kontext import FluxKontextCredentials, PollingCadence
from prefect_flux_kontext.cli.prefect_server import prefect_server
from prefect_flux_kontext.sandbox.server import running_sandbox
from prefect_flux_kontext.sandbox.settings import PHOTOS, SandboxSettings

KEY = "key-of-the-tests"
QUICK = PollingCadence(initial_delay=0, interval=0.05, timeout=60)


@dataclass(frozen=True)
class PrefectApi:
    """The Prefect server of the tests.

    Attributes:
        home: Its folder, which contains the database.
        environment: The variables with which a process connects to it.
    """

    home: Path
    environment: dict[str, str]


async def _drain():
    await APILogWorker.instance().drain()
    await EventsWorker.drain_all()


def flush_to_prefect():
    """Wait until all logs and events of this process have reached the server."""
    run_coro_as_sync(_drain())


@pytest.fixture(scope="session")
def prefect_api(tmp_path_factory):
    home = tmp_path_factory.mktemp("prefect")
    with (
        prefect_server(home) as server,
        temporary_settings({PREFECT_API_URL: server.environment["PREFECT_API_URL"]}),
        pytest.MonkeyPatch.context() as patch,
    ):
        # For threads that copied their context earlier, as in Prefect's own test harness.
        patch.setattr(context, "GLOBAL_SETTINGS_CONTEXT", context.get_settings_context())
        yield PrefectApi(home, server.environment)
        # Logs and events left over after the server has stopped are retried for a minute.
        flush_to_prefect()


def leave_sockets_to_prefect(items, folder):
    """Ignore the connections that Prefect's engine leaves open, in the tests of a folder.

    It leaves them to the garbage collector when a loop ends. In other folders, a leaked socket is
    still an error.
    """
    mark = pytest.mark.filterwarnings(
        # Python 3.14 writes "while finalizing socket <socket.socket …>".
        r"ignore:Exception ignored (in.|while [a-z ]+) "
        r"<(socket\.socket|function _SelectorTransport\.__del__)"
        ":pytest.PytestUnraisableExceptionWarning"
    )
    for item in items:
        if item.path.is_relative_to(folder):
            item.add_marker(mark)


def pytest_collection_modifyitems(items):
    leave_sockets_to_prefect(items, Path(__file__).parent)


@pytest.fixture(autouse=True)
def _use_the_server(prefect_api):
    """Use the server in every test, and collect garbage, of which later tests would warn."""
    yield
    gc.collect()


@pytest.fixture
def sandbox():
    with running_sandbox(SandboxSettings(mean=0.1, long_edge=64, api_key=KEY)) as running:
        yield running


@pytest.fixture
def account(sandbox):
    """The credentials Block of the sandbox's account."""
    return FluxKontextCredentials(api_key=KEY, base_url=sandbox.url)


@pytest.fixture
def account_in_environment(sandbox, monkeypatch):
    """The sandbox's account in the environment."""
    monkeypatch.setenv("FLUX_KONTEXT_API_KEY", KEY)
    monkeypatch.setenv("FLUX_KONTEXT_BASE_URL", sandbox.url)
    monkeypatch.setenv("FLUX_KONTEXT_POLL_INITIAL_DELAY", "0")
    monkeypatch.setenv("FLUX_KONTEXT_POLL_INTERVAL", "0.05")


@pytest.fixture
def reference(sandbox):
    """The URL of an image that the sandbox serves."""
    name = min(path.name for path in PHOTOS.iterdir() if path.suffix == ".jpg")
    return f"{sandbox.url}/references/{name}"
