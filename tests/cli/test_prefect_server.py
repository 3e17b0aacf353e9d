"""The demo's Prefect server: its command, its environment, and failed starts."""

import shlex

import pytest

from prefect_flux_kontext.cli import prefect_server as module
from prefect_flux_kontext.errors import ConfigurationError


def test_start_command_quotes_a_space_in_the_path(tmp_path):
    command = module._start_command(tmp_path / "my demo", ["prefect", "server", "start"])
    # If it were quoted as a whole, a shell would take it for the name of a program.
    assert command.startswith("PREFECT_HOME='")
    assert shlex.split(command)[0] == f"PREFECT_HOME={tmp_path / 'my demo'}"


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
