"""What the tests of the core share: governors that know nothing of another test."""

import pytest

from prefect_flux_kontext.client.limits import account


@pytest.fixture(autouse=True)
def _no_limiter_from_another_test(monkeypatch):
    monkeypatch.setattr(account, "_limiters", {})


@pytest.fixture(autouse=True)
def _no_proxy_from_outside(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
