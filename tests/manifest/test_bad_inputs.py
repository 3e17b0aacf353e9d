"""Every bad input of the table gets its message, and none of them makes a paid request."""

import pytest

from prefect_flux_kontext.cli import main
from prefect_flux_kontext.sandbox.server import running_sandbox
from prefect_flux_kontext.sandbox.settings import SandboxSettings
from tests.manifest.bad_inputs import BAD_INPUTS, PAGE, get_message, manifest_path, style_option


@pytest.mark.parametrize("bad", BAD_INPUTS, ids=lambda bad: bad.title)
def test_bad_input_is_named_with_its_reason(bad, tmp_path):
    message = get_message(bad, tmp_path)
    if bad.expected is None:
        assert message is None
    else:
        assert bad.expected in message
        if bad.style is None and bad.names is None:
            assert bad.file_name.removesuffix("x.jpg").rstrip("/") in message


def test_bad_input_makes_no_paid_request(tmp_path, monkeypatch):
    key = "key-of-the-tests"
    with running_sandbox(SandboxSettings(mean=0.05, long_edge=16, api_key=key)) as sandbox:
        monkeypatch.setenv("FLUX_KONTEXT_API_KEY", key)
        monkeypatch.setenv("FLUX_KONTEXT_BASE_URL", sandbox.url)
        monkeypatch.setenv("FLUX_KONTEXT_STAGING_URL", str(tmp_path / "staged"))
        monkeypatch.setenv("FLUX_KONTEXT_STAGING_PUBLIC_URL", sandbox.url)
        for number, bad in enumerate(BAD_INPUTS):
            folder = tmp_path / str(number)
            folder.mkdir()
            get_message(bad, folder)
            if bad.expected is not None:
                options = ["--style", style_option(bad, folder)] if bad.style else []
                options += ["--names", bad.names] if bad.names else []
                run = ["run", manifest_path(bad, folder), str(folder / "out"), *options]
                assert main(run) == 2, bad.title
        assert sandbox.service.bill()["accepted"] == 0


def test_page_lists_every_bad_input():
    page = PAGE.read_text(encoding="utf-8")
    assert all(f"| {bad.title} |" in page for bad in BAD_INPUTS)
