"""The demo's Prefect server: what it is started with, and what when it does not start."""

import shlex

import pytest

from prefect_flux_kontext.cli import prefect_server as module
from prefect_flux_kontext.errors import ConfigurationError


def test_the_command_to_start_it_again_survives_a_space_in_the_path(tmp_path):
    command = module._start_command(tmp_path / "my demo", ["prefect", "server", "start"])
    # Quoted as a whole, a shell would take it for the name of a program.
    assert command.startswith("PREFECT_HOME='")
    assert shlex.split(command)[0] == f"PREFECT_HOME={tmp_path / 'my demo'}"


def test_settings_for_another_server_are_not_handed_on(monkeypatch):
    monkeypatch.setenv("PREFECT_API_KEY", "secret")
    monkeypatch.setenv("PREFECTLY_FINE", "kept")
    environment = module._environment_without_prefect()
    assert environment["PREFECTLY_FINE"] == "kept"
    assert not [name for name in environment if name.startswith("PREFECT_")]


def test_a_server_that_ends_at_once_is_told_with_its_log(tmp_path, monkeypatch):
    monkeypatch.setattr(module.sys, "executable", "/bin/false")
    with (
        pytest.raises(ConfigurationError, match=r"did not start; its log is .*server\.log"),
        module.prefect_server(tmp_path),
    ):
        pass
