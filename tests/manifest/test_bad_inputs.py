"""Every bad manifest of the table gets a clear message, and no request is made for it."""

import pytest

from prefect_flux_kontext.cli import main
from prefect_flux_kontext.sandbox.server import running_sandbox
from prefect_flux_kontext.sandbox.settings import SandboxSettings
from tests.manifest.bad_inputs import BAD, PAGE, manifest_of, message, style_of


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.what)
def test_a_bad_manifest_is_told_by_name_with_its_reason(bad, tmp_path):
    told = message(bad, tmp_path)
    if bad.told is None:
        assert told is None
    else:
        assert bad.told in told
        if bad.style is None and bad.names is None:
            assert bad.name.removesuffix("x.jpg").rstrip("/") in told


def test_no_bad_manifest_makes_a_request_that_is_paid(tmp_path, monkeypatch):
    key = "key-of-the-tests"
    with running_sandbox(SandboxSettings(mean=0.05, long_edge=16, api_key=key)) as sandbox:
        monkeypatch.setenv("FLUX_KONTEXT_API_KEY", key)
        monkeypatch.setenv("FLUX_KONTEXT_BASE_URL", sandbox.url)
        monkeypatch.setenv("FLUX_KONTEXT_STAGING_URL", str(tmp_path / "staged"))
        monkeypatch.setenv("FLUX_KONTEXT_STAGING_PUBLIC_URL", sandbox.url)
        for number, bad in enumerate(BAD):
            folder = tmp_path / str(number)
            folder.mkdir()
            message(bad, folder)
            if bad.told is not None:
                options = ["--style", style_of(bad, folder)] if bad.style else []
                options += ["--names", bad.names] if bad.names else []
                run = ["run", manifest_of(bad, folder), str(folder / "out"), *options]
                assert main(run) == 2, bad.what
        assert sandbox.service.bill()["accepted"] == 0


def test_the_page_names_them_all():
    page = PAGE.read_text(encoding="utf-8")
    assert all(f"| {bad.what} |" in page for bad in BAD)
