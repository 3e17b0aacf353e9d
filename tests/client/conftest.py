"""Fixtures of the client tests: no limiter of another test, no proxy of the environment."""

import pytest

from prefect_flux_kontext.client.limits import account


@pytest.fixture(autouse=True)
def _no_limiter_from_another_test(monkeypatch):
    monkeypatch.setattr(account, "_limiters", {})


@pytest.fixture(autouse=True)
def _no_environment_proxy(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
