"""A service on this machine fetches local references from the process that runs the batch."""

from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from prefect_flux_kontext.cli import main
from prefect_flux_kontext.errors import ConfigurationError
from prefect_flux_kontext.references.resolver import create_references
from prefect_flux_kontext.references.staging import LoopbackStaging, is_loopback_url
from prefect_flux_kontext.sandbox.server import running_sandbox
from prefect_flux_kontext.sandbox.settings import SandboxSettings
from prefect_flux_kontext.settings import FluxKontextSettings
from tests.support.pictures import picture


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        (folder / name).write_bytes(picture())
    return folder


@pytest.fixture
def environment(monkeypatch):
    """The variables that the sandbox's greeting names, and a quick cadence."""

    def set_variables(url):
        monkeypatch.setenv("FLUX_KONTEXT_BASE_URL", url)
        monkeypatch.setenv("FLUX_KONTEXT_API_KEY", "sandbox")
        monkeypatch.setenv("FLUX_KONTEXT_POLL_INITIAL_DELAY", "0")
        monkeypatch.setenv("FLUX_KONTEXT_POLL_INTERVAL", "0.05")

    return set_variables


def test_folder_of_photos_runs_with_a_local_service(photos, environment, tmp_path, capsys):
    """Nothing else is set; the gallery shows each photo as `before`."""
    output = tmp_path / "out"
    with running_sandbox(SandboxSettings(mean=0.05, long_edge=32)) as sandbox:
        environment(sandbox.url)
        assert main(["run", str(photos), str(output), "--style", "oil"]) == 0
        assert sandbox.service.bill()["accepted"] == 3
    assert "3 of 3 rows stored" in capsys.readouterr().out
    assert sorted(path.stem for path in output.rglob("oil.jpg")) == ["oil"] * 3
    records = "".join(path.read_text() for path in output.rglob("*.json*"))
    assert "127.0.0.1" not in records, "a record holds a URL that grants access"
    thumbnails = "".join(path.read_text() for path in (output / "_gallery").rglob("*.js"))
    assert thumbnails.count("data:image/webp") >= 6 or thumbnails.count("UklGR") >= 6


def test_remote_service_refuses_local_photos_in_one_line(photos, environment, tmp_path, capsys):
    """Nothing is sent: the plan asks the service nothing."""
    environment("https://flux.example.com")
    assert main(["run", str(photos), str(tmp_path / "out"), "--style", "oil"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith(
        "3 of 3 rows of " + f"{photos} are invalid, so nothing was submitted:"
    )
    assert lines[1].startswith("  3 rows (lines 1-3), such as: image ")
    assert lines[1].count("set FLUX_KONTEXT_STAGING_URL") == 1
    assert lines[2:] == ["Fix them."]


def test_files_are_served_under_unguessable_names_until_closed():
    staging = LoopbackStaging()
    data = picture()
    url = staging.build_url(staging.put(data, "jpeg"), 60)
    parts = urlsplit(url)
    assert parts.hostname == "127.0.0.1"
    assert len(parts.path.split("/")[1]) >= 40
    with httpx.Client(trust_env=False) as http:
        assert http.get(url).content == data
        root = f"http://{parts.netloc}"
        for hidden in ("/", f"/{parts.path.split('/')[1]}/", "/..%2f..%2fetc/passwd", "/none.jpg"):
            assert http.get(root + hidden).status_code == 404
        staging.close()
        with pytest.raises(httpx.ConnectError):
            http.get(url)


def test_files_are_removed_when_closed(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    staging = LoopbackStaging()
    assert list(tmp_path.iterdir()) == [], "a server was started for nothing"
    staging.put(picture(), "jpeg")
    assert len(list(tmp_path.rglob("*.jpg"))) == 1
    staging.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://127.0.0.1:8765", True),
        ("http://127.9.9.9", True),
        ("http://[::1]:8765", True),
        ("http://localhost:8765", True),
        ("http://x.localhost:8765", True),
        ("http://[::ffff:127.0.0.1]:8765", True),
        ("http://2130706433", True),
        ("http://user@8.8.8.8", False),
        ("https://api.example.com", False),
        ("http://localhost.example.com", False),
        ("http://127.0.0.1.example.com", False),
        ("http://10.0.0.1", False),
        ("http://[", False),
    ],
)
def test_loopback_is_judged_by_the_urls_text(url, expected):
    assert is_loopback_url(url) is expected


def test_set_staging_place_is_used_instead(tmp_path, monkeypatch):
    monkeypatch.setenv("FLUX_KONTEXT_STAGING_URL", str(tmp_path))
    with pytest.raises(ConfigurationError, match="STAGING_PUBLIC_URL"):
        create_references(FluxKontextSettings(), "http://127.0.0.1:1", timeout=60)


def test_killed_run_leaves_no_open_folder(tmp_path, monkeypatch):
    """Only the owner may read the folder."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    staging = LoopbackStaging()
    staging.put(picture(), "jpeg")
    (folder,) = map(Path, tmp_path.iterdir())
    assert folder.stat().st_mode & 0o077 == 0
    staging.close()
