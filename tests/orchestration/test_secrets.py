"""The key is not in the server's database, files, logs, results or outputs."""

import base64
import csv
import subprocess
import sys

import pytest

from prefect_flux_kontext.sandbox.server import running_sandbox
from prefect_flux_kontext.sandbox.settings import SandboxSettings

GOOD = "canary-good-7f3a9c51e2"
WRONG = "canary-wrong-7f3a9c51e2"
SAVED = "canary-saved-7f3a9c51e2"

# Runs in a process of its own, so that it logs at DEBUG from the start, and the server has all of
# its logs and events once it ends.
PROGRAM = """
import asyncio, os, sys
from prefect import flow
from prefect_flux_kontext import *
from prefect_flux_kontext.flows import style_transfer, style_transfer_batch

manifest, output, url, good, wrong, saved = sys.argv[1:]
quick = PollingCadence(initial_delay=0, interval=0.05)
block = FluxKontextCredentials(api_key=good, base_url=url)
bad = FluxKontextCredentials(api_key=wrong, base_url=url)
unreachable = FluxKontextCredentials(api_key=wrong, base_url="http://127.0.0.1:1")

@flow(persist_result=True)
async def own(account: FluxKontextCredentials, prompt: str):
    task = await submit_generation(GenerationRequest(prompt=prompt), account)
    result = await wait_for_generation.with_options(persist_result=True)(task, account, quick)
    return await persist_images(result, output)

@flow
def own_sync(account, prompt):
    task = submit_generation.submit(GenerationRequest(prompt=prompt), account)
    return wait_for_generation.submit(task, account, quick).result()

async def main():
    ended = []
    async def run(flow, *arguments, **how):
        state = await flow(*arguments, **how, return_state=True)
        ended.append(state.type.value)
    os.environ |= {"FLUX_KONTEXT_API_KEY": good, "FLUX_KONTEXT_BASE_URL": url}
    await FluxKontextCredentials(api_key=saved, base_url=url).asave("canary")
    for account in (block, "canary", bad):
        await run(style_transfer, "oil", output, credentials=account, cadence=quick)
    for account in (block, None, bad, unreachable):
        how = {"credentials": account, "cadence": quick, "skip_invalid": True}
        await run(style_transfer_batch, manifest, output, **how)
    await run(own, block, "oil")
    await run(own, block, "nsfw")
    os.environ["FLUX_KONTEXT_API_KEY"] = wrong
    await run(style_transfer, "oil", output, cadence=quick)
    print(*ended)

asyncio.run(main())
for account in (block, bad):
    print(own_sync(account, "oil", return_state=True).type.value)
"""


def forms(secret):
    """Yield the secret in plain text, UTF-16, and the three alignments of base64."""
    yield secret.encode()
    yield secret.encode("utf-16-le")
    for shift in range(3):
        text = base64.b64encode(bytes(shift) + secret.encode()).rstrip(b"=")
        yield text[2 if shift else 0 : -1][2:]


@pytest.mark.timeout(180)
def test_key_is_not_stored_anywhere(prefect_api, tmp_path):
    output, manifest = tmp_path / "out", tmp_path / "m.csv"
    with manifest.open("w", newline="") as file:
        csv.writer(file).writerows(
            [("id", "image", "prompt"), ("a", "", "oil"), ("b", "", "nsfw"), ("c", "x", "oil")]
        )
    with running_sandbox(SandboxSettings(mean=0.05, long_edge=64, api_key=GOOD)) as sandbox:
        arguments = [str(manifest), str(output), sandbox.url, GOOD, WRONG, SAVED]
        environment = prefect_api.environment | {
            "PREFECT_LOGGING_LEVEL": "DEBUG",
            "PREFECT_LOGGING_ROOT_LEVEL": "DEBUG",
            "PREFECT_LOGGING_EXTRA_LOGGERS": "prefect_flux_kontext",
        }
        program = subprocess.run(
            [sys.executable, "-c", PROGRAM, *arguments],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert program.returncode == 0, program.stderr[-3_000:]
        # The single image has been paid for by the batch, whose output is its ledger.
        assert sandbox.service.bill()["accepted"] >= 4
    ended = program.stdout.split()
    assert ended.count("COMPLETED") >= 4
    assert ended.count("FAILED") >= 4
    (tmp_path / "stdout").write_text(program.stdout)
    (tmp_path / "stderr").write_text(program.stderr)
    assert "DEBUG" in program.stderr
    assert "401" in program.stderr

    recorded = b"".join(path.read_bytes() for path in prefect_api.home.glob("prefect.db*"))
    # Names and messages are found in plain text, so the search would find the key too.
    for there in (
        b"style-transfer-batch",
        b"CONTENT_VIOLATION",
        b"flux-kontext-credentials",
        b"flux-kontext.batch.",  # events
        b"rows stored",  # the summary, an artifact
        b"HTTP Request: POST",  # httpx's log lines
    ):
        assert there in recorded + program.stderr.encode(), there
    for there in ("results.jsonl", "results.parquet", "gallery.html", "failed.csv"):
        assert (output / there).exists(), there
    leaks = [
        (str(path), form)
        for folder in (tmp_path, prefect_api.home)
        for path in folder.rglob("*")
        if path.is_file()
        for content in [path.read_bytes()]
        for secret in (GOOD, WRONG, SAVED)
        for form in forms(secret)
        if form in content
    ]
    assert leaks == []


def test_search_finds_a_key_in_base64():
    for before in (b"", b"a", b"ab", b"abc"):
        coded = base64.b64encode(before + GOOD.encode() + b" after")
        assert any(form in coded for form in forms(GOOD))
