"""Callback options from the environment and from arguments; wrong ones pay nothing."""

import pytest

from prefect_flux_kontext.callbacks.options import resolve_callback_options
from prefect_flux_kontext.cli import main
from prefect_flux_kontext.errors import ConfigurationError
from prefect_flux_kontext.sandbox.server import running_sandbox
from prefect_flux_kontext.sandbox.settings import SandboxSettings
from prefect_flux_kontext.settings import FluxKontextSettings

SECRET = "a-secret-of-the-tests-0123456789"


def options(**given):
    return resolve_callback_options(FluxKontextSettings(callback_secret=SECRET), **given)


def test_polling_without_url_needs_no_secret():
    assert resolve_callback_options(FluxKontextSettings()).url is None


def test_argument_overrides_environment(monkeypatch):
    monkeypatch.setenv("FLUX_KONTEXT_CALLBACK_URL", "https://example.com/a")
    assert options().url == "https://example.com/a"
    assert options(url="https://example.com/b/").url == "https://example.com/b"


@pytest.mark.parametrize(
    "url",
    [
        "example.com/hooks",
        "http://example.com/hooks",
        "ftp://example.com",
        "https://",
        "https://user:word@example.com",
        "https://example.com/hooks?a=b",
        "https://example.com/hooks#a",
        "https://[::1",
    ],
)
def test_url_that_cannot_be_called_is_refused(url):
    with pytest.raises(ConfigurationError, match="FLUX_KONTEXT_CALLBACK_URL") as error:
        options(url=url)
    assert "word" not in str(error.value)


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/a", "http://localhost:1", "http://[::1]:1"])
def test_http_is_allowed_on_this_machine(url):
    assert options(url=url).url == url


def test_url_without_secret_is_refused():
    with pytest.raises(ConfigurationError, match="FLUX_KONTEXT_CALLBACK_SECRET"):
        resolve_callback_options(FluxKontextSettings(), url="https://example.com")


@pytest.mark.parametrize("address", ["8780", "localhost", "localhost:", ":8780", "a:b", "a:-1"])
def test_listen_address_needs_host_and_port(address, monkeypatch):
    monkeypatch.setenv("FLUX_KONTEXT_CALLBACK_LISTEN", address)
    with pytest.raises(ConfigurationError, match="host:port"):
        options(url="https://example.com")


def test_listen_address_may_be_ipv6(monkeypatch):
    monkeypatch.setenv("FLUX_KONTEXT_CALLBACK_LISTEN", "[::1]:8780")
    assert options(url="https://example.com").listen == ("::1", 8780)
    assert options(url="https://example.com", listens=False).listen is None


def test_repr_hides_the_secret():
    assert SECRET not in repr(options(url="https://example.com"))


@pytest.fixture
def rehearsal(tmp_path, monkeypatch):
    (tmp_path / "manifest.csv").write_text("id,prompt\na,a lighthouse\nb,a harbour\n")
    with running_sandbox(SandboxSettings(mean=0.1, long_edge=64)) as sandbox:
        monkeypatch.setenv("FLUX_KONTEXT_API_KEY", "key-of-the-tests")
        monkeypatch.setenv("FLUX_KONTEXT_BASE_URL", sandbox.url)
        monkeypatch.setenv("FLUX_KONTEXT_POLL_INITIAL_DELAY", "0")
        monkeypatch.setenv("FLUX_KONTEXT_POLL_INTERVAL", "0.05")
        yield sandbox, str(tmp_path / "manifest.csv"), str(tmp_path / "out")


def test_run_refuses_callbacks_without_secret(rehearsal, capsys):
    sandbox, manifest, output = rehearsal
    assert main(["run", manifest, output, "--callback-url", "https://example.com"]) == 2
    assert "FLUX_KONTEXT_CALLBACK_SECRET" in capsys.readouterr().err
    assert sandbox.service.bill()["accepted"] == 0


def test_run_ends_without_any_callback(rehearsal, monkeypatch):
    sandbox, manifest, output = rehearsal
    monkeypatch.setenv("FLUX_KONTEXT_CALLBACK_SECRET", SECRET)
    monkeypatch.setenv("FLUX_KONTEXT_CALLBACK_SWEEP", "0.3")
    assert main(["run", manifest, output, "--callback-url", "http://127.0.0.1:1"]) == 0
    urls = {record["callback_url"] for record in sandbox.service.records()}
    assert len(urls) == 2
    assert all(url.startswith("http://127.0.0.1:1/") for url in urls)


def test_receive_needs_a_secret_and_one_inbox(tmp_path, capsys):
    assert main(["receive", str(tmp_path)]) == 2
    assert "FLUX_KONTEXT_CALLBACK_SECRET" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["receive", str(tmp_path), "--inbox", str(tmp_path)])


def test_receive_refuses_an_unwritable_inbox(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FLUX_KONTEXT_CALLBACK_SECRET", SECRET)
    (tmp_path / "file").write_text("")
    assert main(["receive", str(tmp_path / "file")]) == 2
    assert "cannot be written to" in capsys.readouterr().err
