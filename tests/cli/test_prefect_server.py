"""The demo's Prefect server: its command, its environment, and failed starts."""

import os
import shlex
import subprocess

import httpx
import pytest

from prefect_flux_kontext.cli import prefect_server as module
from prefect_flux_kontext.errors import ConfigurationError


def test_start_command_quotes_a_space_in_the_path(tmp_path):
    command = module._start_command(
        tmp_path / "my demo", "http://127.0.0.1:1", ["prefect", "server", "start"]
    )
    # If it were quoted as a whole, a shell would take it for the name of a program.
    assert command.startswith("PREFECT_HOME='")
    assert shlex.split(command)[0] == f"PREFECT_HOME={tmp_path / 'my demo'}"


def test_printed_command_starts_pages_that_ask_their_own_server(tmp_path):
    """Run in the person's shell, with settings for another server."""
    with module.prefect_server(tmp_path / "home") as server:
        pass
    home, *_ = shlex.split(server.command)
    environment = {"PATH": os.environ["PATH"], "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    environment |= {"DO_NOT_TRACK": "1", "HOME": str(tmp_path)}
    with (tmp_path / "log").open("wb") as log:
        started = subprocess.Popen(
            f"exec env {server.command}", shell=True, env=environment, stdout=log, stderr=log
        )
        try:
            assert module._wait_until_up(started, server.url), (tmp_path / "log").read_text()
            pages = httpx.get(f"{server.url}/ui-settings", trust_env=False).json()
        finally:
            started.terminate()
            started.wait()
    assert home == f"PREFECT_HOME={tmp_path / 'home'}"
    assert pages["api_url"] == f"{server.url}/api"


def test_environment_drops_settings_for_other_servers(monkeypatch):
    monkeypatch.setenv("PREFECT_API_KEY", "secret")
    monkeypatch.setenv("PREFECTLY_FINE", "kept")
    environment = module._environment_without_prefect()
    assert environment["PREFECTLY_FINE"] == "kept"
    assert not [name for name in environment if name.startswith("PREFECT_")]


def test_failed_start_names_the_log(tmp_path, monkeypatch):
    monkeypatch.setattr(module.sys, "executable", "/bin/false")
    with (
        pytest.raises(ConfigurationError, match=r"did not start; its log is .*server\.log"),
        module.prefect_server(tmp_path),
    ):
        pass
