"""Secrets that are planted show up nowhere, however a process ends.

`orchestration/test_secrets.py` and `test_signatures.py` search what Prefect keeps; this searches
what the package says and leaves behind.
"""

import base64
import csv
import json
import os
import subprocess
import sys

import pytest

from prefect_flux_kontext.sandbox.faults.plan import FaultPlan
from prefect_flux_kontext.sandbox.server import running_sandbox
from prefect_flux_kontext.sandbox.settings import SandboxSettings
from tests.chaos.callback_batches import held_port
from tests.support.served_folder import served_folder
from tests.test_redaction import SECRET, URLS

KEY = "canary-key-7f3a9c51e2"
WRONG = "canary-wrong-7f3a9c51e2"
CALLBACK = "canary-callback-secret-7f3a9c51e2"
STORE = "canary-store-7f3a9c51e2"
SIGNATURE = "canary-signature-7f3a9c51e2"
# Signatures of every kind, and passwords in URLs of every scheme.
SIGNED = [url.replace(SECRET, SIGNATURE) for url in URLS]
SECRETS = (KEY, WRONG, CALLBACK, STORE, SIGNATURE)

# Everything is logged, as somebody does who looks for a fault, and tracebacks show variables.
PROGRAM = """
import logging, os, sys, traceback
from unittest.mock import patch
from prefect_flux_kontext.client import client
from prefect_flux_kontext.batch import runner
from prefect_flux_kontext.cli import main
from prefect_flux_kontext.credentials import FluxKontextCredentials
from prefect_flux_kontext.settings import FluxKontextSettings
from prefect_flux_kontext.storage.filesystem import OutputFolder

def with_variables(kind, error, where):
    return "".join(traceback.TracebackException(kind, error, where, capture_locals=True).format())

class Formatter(logging.Formatter):
    def formatException(self, details):
        return with_variables(*details)

def hook(*details):
    print(with_variables(*details), file=sys.stderr)
    sys.__excepthook__(*details)

def crash(*_, **__):
    if ending == "aborted":
        os.abort()
    raise ZeroDivisionError("nobody has foreseen this")

async def crash_later(*_, **__):
    crash()

async def crash_at_a_submit(connections, method, *args, **how):
    if method == "POST":
        crash()
    return await send_request(connections, method, *args, **how)

ending, manifest, output = sys.argv[1:]
send_request = client.send_request
run = ["run", manifest, output, "--skip-invalid", "--text-to-image"]
sys.excepthook = hook
logging.basicConfig(level=logging.DEBUG, stream=sys.stderr)
logging.getLogger().handlers[0].setFormatter(Formatter(logging.BASIC_FORMAT))
settings = FluxKontextSettings()
print(settings, repr(settings), FluxKontextCredentials(api_key=settings.api_key))
if ending == "well":
    with patch.object(client, "send_request", crash_at_a_submit):
        main(run)
    with patch.object(OutputFolder, "write_unique", crash_later):
        main(["run", manifest, output + "2", "--skip-invalid", "--text-to-image"])
    for command in (
        ["run", manifest, output + "2", "--text-to-image"],
        run,
        ["status", output],
        ["status", output, "--json"],
        ["plan", manifest, output, "--text-to-image", "--json"],
        run + ["--json"],
        ["gallery", output],
    ):
        main(command)
    signed = os.environ["SIGNED_MANIFEST"]
    for command in (
        ["run", signed, output + "4", "--nonsense"],
        ["run", signed, output + "4"],
        ["plan", signed.replace("m.csv", "none.csv"), output + "4"],
        ["run", signed, output + "4", "--skip-invalid", "--text-to-image"],
        ["retry-failed", output + "4"],
        ["run", manifest, os.environ["SIGNED_OUTPUT"]],
        ["status", os.environ["SIGNED_OUTPUT"]],
    ):
        try:
            main(command)
        except SystemExit:
            pass
    for name in ("FLUX_KONTEXT_STAGING_URL", "FLUX_KONTEXT_CALLBACK_INBOX"):
        os.environ[name] = os.environ["SIGNED_OUTPUT"]
        main(["run", manifest, output + "5", "--skip-invalid", "--text-to-image"])
        del os.environ[name]
    os.environ["FLUX_KONTEXT_API_KEY"] = os.environ["WRONG"]
    main(["run", manifest, output + "3", "--skip-invalid", "--text-to-image"])
else:
    runner.run_waves = crash
    main(run)
"""


def forms(secret):
    """The secret in plain and as any of the three alignments of base64 shows it."""
    yield secret.encode()
    for shift in range(3):
        yield base64.b64encode(bytes(shift) + secret.encode()).rstrip(b"=")[4 if shift else 0 : -1]


def leaks(folder):
    return [
        (str(path), form)
        for path in folder.rglob("*")
        if path.is_file()
        for content in [path.read_bytes()]
        for secret in SECRETS
        for form in forms(secret)
        if form in content
    ]


ENDINGS = {
    "well": ("401", "nobody has foreseen this", "unexpected error", "    key = "),
    "unhandled": ("nobody has foreseen this", "    manifest = "),
    "aborted": ("Fatal Python error: Aborted",),
}


@pytest.mark.timeout(400)
@pytest.mark.parametrize("ending", ENDINGS)
def test_no_secret_is_said_or_left_behind(ending, tmp_path):
    output, manifest = tmp_path / "out", tmp_path / "manifest"
    with running_sandbox(SandboxSettings(mean=0.2, long_edge=64, api_key=KEY)) as sandbox:
        sandbox.active_faults.change(FaultPlan(faults=["submit:lost-reply@2", "status:html@3"]))
        signed = f"{sandbox.url}/references/cat.png?X-Amz-Signature={SIGNATURE}"
        (tmp_path / "served").mkdir()
        write_signed(tmp_path / "served" / "m.csv", sandbox.url.removeprefix("http://"))
        with manifest.open("w", newline="") as file:
            csv.writer(file).writerows(
                [
                    ("id", "image", "prompt", "source"),
                    ("a", "", "oil", signed),
                    ("b", signed, "ink", ""),
                    ("c", "", "nsfw", ""),
                    ("d", "x", "oil", ""),
                ]
            )
        with served_folder(tmp_path / "served") as served:
            program = run_program(sandbox, ending, manifest, output, served)
    (tmp_path / "said").write_text(program.stdout + program.stderr)
    for there in ENDINGS[ending]:
        assert there in program.stderr, program.stderr[-3_000:]
    # The manifest, and what is made of it to be run again, hold what they have to.
    manifest.unlink()
    (tmp_path / "served" / "m.csv").unlink()
    for path in tmp_path.rglob("failed.csv"):
        assert not [
            secret for secret in SECRETS if secret != SIGNATURE and secret in path.read_text()
        ]
        path.unlink()
    assert leaks(tmp_path) == []
    if ending == "well":
        there_is_what_was_searched(program, tmp_path)


def write_signed(path, host):
    """Write a manifest with each URL as a reference, and in other columns in every notation."""
    own = [url.replace("a.test", host) for url in SIGNED]
    as_list = json.dumps(own)
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("id", "images", "prompt", "plain", "list", "escaped", "nested"))
        for number, url in enumerate(own):
            notations = (url, json.dumps([url]), escaped(json.dumps([url])))
            rows.writerow(
                (
                    f"signed-{number}",
                    notations[number % 3],
                    "oil",
                    f"see <{url}>, '{url}'",
                    as_list,
                    escaped(as_list),
                    json.dumps({"inside": as_list}),
                )
            )


def escaped(text):
    return text.replace("/", "\\/").replace("&", "\\u0026")


def run_program(sandbox, ending, manifest, output, served):
    with held_port() as port:
        environment = os.environ | {
            "FLUX_KONTEXT_API_KEY": KEY,
            "FLUX_KONTEXT_BASE_URL": sandbox.url,
            "FLUX_KONTEXT_CALLBACK_SECRET": CALLBACK,
            "FLUX_KONTEXT_CALLBACK_URL": f"http://127.0.0.1:{port}/flux",
            "FLUX_KONTEXT_CALLBACK_LISTEN": f"127.0.0.1:{port}",
            "FLUX_KONTEXT_CALLBACK_SWEEP": "1",
            "FLUX_KONTEXT_CALLBACK_GRACE": "2",
            "FLUX_KONTEXT_POLL_INITIAL_DELAY": "0.1",
            "FLUX_KONTEXT_POLL_INTERVAL": "0.1",
            "FLUX_KONTEXT_POLL_TIMEOUT": "20",
            "FLUX_KONTEXT_STORAGE_OPTIONS": json.dumps({"secret": STORE}),
            "WRONG": WRONG,
            "SIGNED_MANIFEST": f"{served}/m.csv?X-Amz-Signature={SIGNATURE}&token={SIGNATURE}",
            "SIGNED_OUTPUT": f"s3://key:{SIGNATURE}@bucket/out",
        }
        arguments = [ending, str(manifest), str(output)]
        return subprocess.run(
            [sys.executable, "-X", "dev", "-c", PROGRAM, *arguments],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )


def there_is_what_was_searched(program, folder):
    """The search is no use unless it looks where things are."""
    for logger in (":prefect_flux_kontext", "DEBUG:asyncio"):
        assert logger in program.stderr, logger
    for there in ("4/results.jsonl", "user name or password in its URL", "no manifest at"):
        assert there in program.stdout + program.stderr or (folder / f"out{there}").exists(), there
    assert list((folder / "out2").rglob("format.json"))
    for name in ("results.jsonl", "gallery.html", "*.intent.json"):
        files = list((folder / "out2").rglob(name))
        assert any("/references/cat.png" in path.read_text() for path in files), name


@pytest.mark.parametrize("command", ["", "run", "receive"])
def test_help_tells_no_setting(command):
    environment = os.environ | {
        "FLUX_KONTEXT_API_KEY": KEY,
        "FLUX_KONTEXT_CALLBACK_SECRET": CALLBACK,
        "FLUX_KONTEXT_STORAGE_OPTIONS": json.dumps({"secret": STORE}),
    }
    for option in ["--help", "--nonsense"] if command else ["--help", "--version"]:
        program = subprocess.run(
            [sys.executable, "-m", "prefect_flux_kontext", *command.split(), option],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert program.stdout + program.stderr
        assert "canary" not in program.stdout + program.stderr


def test_the_search_would_find_a_key_in_base64(tmp_path):
    for before in (b"", b"a", b"ab", b"abc"):
        (tmp_path / "file").write_bytes(base64.b64encode(before + KEY.encode() + b" after"))
        assert leaks(tmp_path)
