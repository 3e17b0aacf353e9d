"""What the page of a flow run shows: its name, its last state, its artifacts."""

import base64
import io
import logging
import re
from datetime import UTC, datetime

import pytest
from PIL import Image
from prefect import get_client
from prefect.exceptions import TerminationSignal

from prefect_flux_kontext.flows import style_transfer_batch
from prefect_flux_kontext.orchestration.batch_run import is_no_termination
from prefect_flux_kontext.orchestration.run_page import build_artifact_key, name_output
from tests.orchestration.conftest import QUICK
from tests.orchestration.records import read_artifacts

pytestmark = pytest.mark.anyio

CADENCE = QUICK.model_dump()


async def run(manifest, output, account, **options):
    state = await style_transfer_batch(
        manifest, str(output), account, cadence=CADENCE, return_state=True, **options
    )
    async with get_client() as client:
        return state, await client.read_flow_run(state.state_details.flow_run_id)


async def test_run_is_named_by_output_and_date(account, tmp_path):
    """The end says what came out, in words and as the flow's result."""
    manifest = [{"id": "a", "prompt": "oil"}, {"id": "b", "prompt": "nsfw"}]
    state, found = await run(manifest, tmp_path / "restyled", account)
    assert found.name == f"restyled · {datetime.now(UTC):%F}"
    assert found.state.message == "1 of 2 stored, 1 failed, $0.06"
    assert (await state.aresult()).stored == 1


async def test_caller_of_the_flow_gets_the_summary(account, tmp_path):
    summary = await style_transfer_batch(
        [{"prompt": "oil"}], str(tmp_path), account, cadence=CADENCE
    )
    assert summary.stored == 1


async def test_summary_shows_the_contact_sheet(account, tmp_path):
    _, found = await run([{"prompt": "oil"}], tmp_path / "My pictures!", account)
    summary = (await read_artifacts(found.id))["markdown"]
    assert re.fullmatch(r"my-pictures-summary-[0-9a-f]{8}", summary.key)
    (data,) = re.findall(r"!\[contact sheet\]\(data:image/webp;base64,([^)]+)\)", summary.data)
    assert Image.open(io.BytesIO(base64.b64decode(data))).format == "WEBP"


async def test_parameters_reach_rows_that_name_none(account, sandbox, tmp_path):
    manifest = [{"prompt": "oil"}, {"prompt": "ink", "mode": "pro"}]
    await run(manifest, tmp_path, account, mode="max", output_format="png")
    assert sandbox.service.bill()["by_mode"] == {"pro": 1, "max": 1}
    assert len(list(tmp_path.glob("*.png"))) == 2


@pytest.mark.parametrize(("error", "logged"), [(TerminationSignal(15), False), (KeyError(), True)])
def test_cancelled_run_logs_no_traceback(error, logged, caplog):
    """Prefect's signal handler raises in the event loop, and asyncio would log that."""
    logger = logging.getLogger("asyncio")
    logger.addFilter(is_no_termination)
    try:
        logger.error("unhandled exception during asyncio.run() shutdown", exc_info=error)
    finally:
        logger.removeFilter(is_no_termination)
    assert bool(caplog.records) is logged


@pytest.mark.parametrize(
    ("output", "name"),
    [
        ("/data/restyled/", "restyled"),
        ("s3://bucket/a/b", "b"),
        ("s3://bucket", "bucket"),
        ("block:s3-bucket/mine", "mine"),
        ("", "batch"),
        ("/", "batch"),
    ],
)
def test_output_has_a_short_name(output, name):
    assert name_output(output) == name


@pytest.mark.parametrize("output", ["/a/Ünïcode 1", "/a/---", "/", "s3://b/x_y"])
def test_artifact_key_is_valid_for_prefect(output):
    key = build_artifact_key(output, "plan")
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", key)
    assert key != build_artifact_key(f"{output}2", "plan")
