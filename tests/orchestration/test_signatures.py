"""A signed URL is only in the request, even if Prefect persists every result."""

import subprocess
import sys

import pytest

from prefect_flux_kontext.sandbox.server import running_sandbox
from prefect_flux_kontext.sandbox.settings import PHOTOS, SandboxSettings

KEY = "key-of-the-tests"
SIGNATURE = "canary-signature-7f3a9c51e2"

# Emulates a bucket whose signed URLs the sandbox serves.
PROGRAM = """
import asyncio, sys
from pathlib import Path
from fsspec import register_implementation
from fsspec.implementations.memory import MemoryFileSystem
from prefect_flux_kontext import *
from prefect_flux_kontext.flows import style_transfer, style_transfer_batch

photo, output, url, key, signature = sys.argv[1:]

class Bucket(MemoryFileSystem):
    protocol = "gs"

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.removeprefix("gs://"))

    def sign(self, path, expiration):
        return f"{url}{path.replace('photos', 'references')}?X-Goog-Signature={signature}"

register_implementation("gs", Bucket)
for name in ("cat.png", "none.png"):
    Bucket().pipe_file(f"gs://photos/{name}", Path(photo).read_bytes())
quick = PollingCadence(initial_delay=0, interval=0.05)
block = FluxKontextCredentials(api_key=key, base_url=url)
ended = []
for name in ("cat.png", "none.png"):
    reference = f"gs://photos/{name}"
    one = style_transfer("oil", output, reference, block, cadence=quick, return_state=True)
    rows = [{"id": name, "image": reference, "prompt": "ink"}]
    all_ = style_transfer_batch(rows, output, block, cadence=quick, return_state=True)
    for state in map(asyncio.run, (one, all_)):
        ended.append(state.type.value)
print(*ended)
"""


@pytest.mark.timeout(180)
def test_signature_is_not_stored_anywhere(prefect_api, tmp_path):
    output, results = tmp_path / "out", tmp_path / "results"
    with running_sandbox(SandboxSettings(mean=0.05, long_edge=64, api_key=KEY)) as sandbox:
        arguments = [str(PHOTOS / "cat.png"), str(output), sandbox.url, KEY, SIGNATURE]
        environment = prefect_api.environment | {
            "PREFECT_LOGGING_LEVEL": "DEBUG",
            "PREFECT_LOGGING_ROOT_LEVEL": "DEBUG",
            "PREFECT_LOGGING_EXTRA_LOGGERS": "prefect_flux_kontext",
            "PREFECT_RESULTS_PERSIST_BY_DEFAULT": "true",
            "PREFECT_LOCAL_STORAGE_PATH": str(results),
        }
        program = subprocess.run(
            [sys.executable, "-c", PROGRAM, *arguments],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert program.returncode == 0, program.stderr[-3_000:]
        # A batch pays once more for a reference that cannot be fetched; a single image does not.
        assert sandbox.service.bill()["accepted"] == 2 + 3
    assert program.stdout.split() == ["COMPLETED", "COMPLETED", "FAILED", "COMPLETED"]
    (tmp_path / "stderr").write_text(program.stderr)
    # Other values are found in these folders, so the search would find the signature too.
    assert any(results.iterdir())
    assert "INVALID_IMAGE_URL" in program.stderr
    assert "gs://photos/cat.png" in "".join(
        path.read_text() for path in output.rglob("*intent.json")
    )
    leaks = [
        str(path)
        for folder in (tmp_path, prefect_api.home)
        for path in folder.rglob("*")
        if path.is_file() and SIGNATURE.encode() in path.read_bytes()
    ]
    assert leaks == []
