"""Images of a batch have an AI mark, and the ledger describes the marked files."""

import hashlib

import httpx
import pytest

from prefect_flux_kontext.ledger.store import open_ledger_store
from prefect_flux_kontext.ledger.waves import read_finished_rows
from prefect_flux_kontext.manifest.reader import Manifest
from prefect_flux_kontext.sandbox.server import running_sandbox
from prefect_flux_kontext.sandbox.settings import SandboxSettings
from prefect_flux_kontext.storage.filesystem import OutputFolder
from tests.support.batches import KEY, run

pytestmark = pytest.mark.anyio

MADE, RESTYLED = (
    b"digitalsourcetype/trainedAlgorithmicMedia<",
    b"digitalsourcetype/compositeWithTrainedAlgorithmicMedia<",
)


@pytest.fixture
def sandbox():
    with running_sandbox(SandboxSettings(mean=0.1, long_edge=64, api_key=KEY)) as running:
        yield running


def rows(sandbox):
    reference = f"{sandbox.url}/references/rocket.jpg"
    made = {"id": "made", "prompt": "a lighthouse"}
    return Manifest([made, {"id": "restyled", "prompt": "oil", "image": reference}])


async def ended(output):
    store = open_ledger_store(OutputFolder(output))
    return [row.ended async for row in read_finished_rows(store)]


async def test_ai_mark_tells_made_from_restyled_images(sandbox, tmp_path):
    await run(sandbox, rows(sandbox), tmp_path)
    assert MADE in (tmp_path / "made.jpg").read_bytes()
    assert RESTYLED in (tmp_path / "restyled.jpg").read_bytes()
    for record in await ended(tmp_path):
        data = (tmp_path / record.files[0]).read_bytes()
        assert record.images[0].sha256 == hashlib.sha256(data).hexdigest()
        assert record.images[0].size == len(data)


async def test_ai_mark_can_be_switched_off(sandbox, tmp_path, monkeypatch):
    monkeypatch.setenv("FLUX_KONTEXT_AI_MARK", "false")
    await run(sandbox, rows(sandbox), tmp_path)
    async with httpx.AsyncClient(base_url=sandbox.url) as http:
        for record in await ended(tmp_path):
            served = await http.get(f"/results/{record.task_id}/1.jpg")
            assert (tmp_path / record.files[0]).read_bytes() == served.content
