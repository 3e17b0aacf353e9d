"""A generation as a job Block, by Prefect's convention, in sync and async flows."""

import pytest
from prefect import flow
from prefect.blocks.abstract import JobBlock, JobRun
from prefect.testing.standard_test_suites import BlockStandardTestSuite

from prefect_flux_kontext import GenerationRequest, ImageGeneration
from prefect_flux_kontext.credentials import FluxKontextCredentials
from prefect_flux_kontext.errors import FluxKontextError, GenerationFailedError
from prefect_flux_kontext.sandbox.faults.plan import FaultPlan


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setenv("FLUX_KONTEXT_POLL_INITIAL_DELAY", "0")
    monkeypatch.setenv("FLUX_KONTEXT_POLL_INTERVAL", "0.05")


def make_job(account, output, prompt="a lighthouse", **fields):
    request = GenerationRequest(prompt=prompt, aspect_ratio="1:1")
    return ImageGeneration(credentials=account, request=request, output=str(output), **fields)


class TestBlockStandards(BlockStandardTestSuite):
    @pytest.fixture
    def block(self):
        return ImageGeneration

    def test_has_a_valid_image(self, block):
        # The suite's own test downloads the logo, but these tests connect only to loopback.
        assert block._logo_url == FluxKontextCredentials._logo_url


def test_sync_flow_runs_a_saved_job(account, sandbox, tmp_path):
    make_job(account, tmp_path, name="cat").save("of-the-tests", overwrite=True)

    @flow
    def restyle():
        run = ImageGeneration.load("of-the-tests").trigger()
        assert isinstance(run, JobRun)
        run.wait_for_completion()
        return run.fetch_result()

    (image,) = restyle()
    assert image.uri == f"file://{tmp_path}/cat.jpg"
    assert issubclass(ImageGeneration, JobBlock)


@pytest.mark.anyio
async def test_async_flow_awaits_the_job_and_pays_once(account, sandbox, tmp_path):
    job = make_job(account, tmp_path)

    @flow
    async def restyle():
        run = await job.trigger()
        await run.wait_for_completion()
        return await run.fetch_result()

    first = await restyle()
    sandbox.active_faults.change(FaultPlan(faults=["status:not-found", "download:not-found"]))
    assert await restyle() == first
    assert sandbox.service.bill()["accepted"] == 1


@pytest.mark.anyio
async def test_result_is_fetched_only_after_the_wait(account, tmp_path):
    run = await make_job(account, tmp_path).trigger()
    with pytest.raises(FluxKontextError, match="wait_for_completion") as caught:
        await run.fetch_result()
    assert caught.value.task_id == run.task.task_id


@pytest.mark.anyio
async def test_failed_job_raises_its_fail_code(account, tmp_path):
    run = await make_job(account, tmp_path, "a nsfw lighthouse").trigger()
    with pytest.raises(GenerationFailedError) as caught:
        await run.wait_for_completion()
    assert caught.value.code == "CONTENT_VIOLATION"
