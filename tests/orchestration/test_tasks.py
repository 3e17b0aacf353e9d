"""The three tasks: in flows and outside, their retries and their errors."""

import json

import anyio
import pytest
from prefect import flow
from prefect.cache_policies import NO_CACHE

from prefect_flux_kontext import (
    GenerationRequest,
    GenerationResult,
    GenerationTask,
    persist_images,
    submit_generation,
    wait_for_generation,
)
from prefect_flux_kontext.errors import (
    GenerationFailedError,
    GenerationTimeoutError,
    ReplyLostError,
    ServiceTroubleError,
    StorageError,
    UnauthorizedError,
)
from prefect_flux_kontext.sandbox.faults.plan import FaultPlan
from prefect_flux_kontext.tasks import _is_transient
from tests.orchestration.conftest import QUICK
from tests.support.fixed_reply import fixed_reply_server
from tests.support.pictures import picture

pytestmark = pytest.mark.anyio

REQUEST = GenerationRequest(prompt="a lighthouse", aspect_ratio="1:1")
ALL = (submit_generation, wait_for_generation, persist_images)


async def test_async_flow_awaits_the_tasks(account, sandbox, tmp_path):
    @flow
    async def restyle():
        task = await submit_generation(REQUEST, account)
        result = await wait_for_generation(task, account, QUICK)
        return await persist_images(result, str(tmp_path), "lighthouse")

    (stored,) = await restyle()
    assert (tmp_path / "lighthouse.jpg").stat().st_size == stored.size
    assert sandbox.service.bill()["accepted"] == 1


@pytest.mark.parametrize("has_ledger", [False, True])
async def test_submitted_task_has_the_ratio_of_its_reference(
    has_ledger, account, sandbox, tmp_path, monkeypatch
):
    image = f"{sandbox.url}/references/cat.png"
    request = GenerationRequest(prompt="oil", image_urls=[image])
    ledger = str(tmp_path) if has_ledger else None
    for reads in ("true", "false"):
        monkeypatch.setenv("FLUX_KONTEXT_MATCH_REFERENCES", reads)
        task = await submit_generation(request, account, ledger, key=reads)
        assert task.request.aspect_ratio == "match"
        assert task.request.matched_ratio == ("4:3" if reads == "true" else "16:9")
        assert bool(task.request.match_note) == (reads == "false")
    sent = [record["aspect_ratio"] for record in sandbox.service.records()]
    assert sent == ["4:3", "16:9"]


def test_sync_flow_submits_the_tasks(account, sandbox, tmp_path):
    @flow
    def restyle():
        task = submit_generation.submit(REQUEST, account).result()
        result = wait_for_generation.submit(task, account, QUICK).result()
        return persist_images.submit(result, str(tmp_path)).result()

    (stored,) = restyle()
    assert stored.uri == f"file://{tmp_path}/{stored.task_id}.jpg"
    assert sandbox.service.bill()["accepted"] == 1


def test_sync_flow_passes_futures_between_tasks(account, sandbox, tmp_path):
    @flow
    def restyle():
        task = submit_generation.submit(REQUEST, account)
        result = wait_for_generation.submit(task, account, QUICK)
        return persist_images.submit(result, str(tmp_path)).result()

    assert len(restyle()) == 1


async def test_tasks_use_the_environment_by_default(account_in_environment, tmp_path):
    @flow
    async def restyle():
        result = await wait_for_generation(await submit_generation(REQUEST))
        return await persist_images(result, str(tmp_path))

    assert len(await restyle()) == 1


async def test_tasks_take_the_name_of_a_saved_block(account, sandbox):
    await account.asave("of-the-tasks", overwrite=True)

    @flow
    async def restyle():
        task = await submit_generation(REQUEST, "of-the-tasks")
        return await wait_for_generation(task, "of-the-tasks", QUICK)

    assert (await restyle()).result_urls
    assert sandbox.service.bill()["accepted"] == 1


async def test_tasks_run_outside_of_flows(account, sandbox, tmp_path):
    task = await submit_generation(REQUEST, account)
    result = await wait_for_generation(task, account, QUICK)
    assert len(await persist_images(result, str(tmp_path))) == 1


async def test_another_flow_can_wait_for_a_task_id(account, tmp_path):
    note = anyio.Path(tmp_path / "task.json")

    @flow
    async def evening():
        task = await submit_generation(REQUEST, account)
        await note.write_text(task.model_dump_json())

    @flow
    async def morning():
        task = GenerationTask.model_validate_json(await note.read_text())
        result = await wait_for_generation(task, account, QUICK)
        return GenerationResult.model_validate_json(result.model_dump_json())

    @flow
    async def noon():
        task_id = json.loads(await note.read_text())["task_id"]
        return await wait_for_generation(GenerationTask(task_id=task_id), account, QUICK)

    await evening()
    first, second = await morning(), await noon()
    assert first.request == REQUEST
    assert second.request is None
    assert first.result_urls == second.result_urls


def test_submit_has_no_retries_and_no_cache():
    assert submit_generation.retries == 0
    assert all(task.cache_policy is NO_CACHE for task in ALL)
    assert not any(task.persist_result for task in ALL)


def test_free_tasks_retry_transient_errors():
    # Prefect 3.8 only calls a condition that is a plain function.
    for task in (wait_for_generation, persist_images):
        assert task.retries >= 1
        assert task.retry_condition_fn is _is_transient


async def test_submit_with_unknown_outcome_is_sent_once(account):
    async with fixed_reply_server(502) as service:
        there = account.model_copy(update={"base_url": service.url})

        @flow
        async def submit_once():
            return await submit_generation.with_options(retry_delay_seconds=0)(REQUEST, there)

        with pytest.raises(ServiceTroubleError):
            await submit_once()
        assert service.posts == 1


async def persist_to(output):
    """Persist a valid result to an invalid output; return the number of fetches and the error."""
    async with fixed_reply_server(200, picture("jpeg")) as host:
        result = GenerationResult(task_id="t", result_urls=[host.url], base_url=host.url)

        @flow
        async def persists():
            task = persist_images.with_options(retries=2, retry_delay_seconds=0)
            return await task(result, output)

        state = await persists(return_state=True)
        return host.gets, await state.aresult(raise_on_failure=False)


async def test_transient_error_is_retried(tmp_path):
    (tmp_path / "t.jpg" / "in the way").mkdir(parents=True)
    fetched, error = await persist_to(str(tmp_path))
    assert fetched == 3
    assert isinstance(error, StorageError)


async def test_permanent_error_is_not_retried(account):
    @flow
    async def waits(base_url):
        there = account.model_copy(update={"base_url": base_url})
        wait = wait_for_generation.with_options(retries=2, retry_delay_seconds=0)
        return await wait(GenerationTask(task_id="task_x"), there, QUICK)

    async with fixed_reply_server(401, b'{"code": 401, "message": "no"}') as service:
        with pytest.raises(UnauthorizedError):
            await waits(service.url)
        assert service.gets == 1


async def test_failed_generation_raises_its_code_and_message(account, sandbox):
    @flow
    async def fails(**how):
        task = await submit_generation(GenerationRequest(prompt="nsfw"), account)
        return await wait_for_generation.with_options(retry_delay_seconds=0)(task, account, QUICK)

    with pytest.raises(GenerationFailedError, match="content rules") as caught:
        await fails()
    assert caught.value.code == "CONTENT_VIOLATION"
    assert caught.value.task_id in str(caught.value)
    state = await fails(return_state=True)
    assert state.is_failed()
    assert "CONTENT_VIOLATION" in state.message
    # One task for each of the two flow runs, none for retries.
    assert sandbox.service.bill()["accepted"] == 2


def test_failed_generation_raises_through_a_future(account):
    @flow
    def fails():
        task = submit_generation.submit(GenerationRequest(prompt="nsfw"), account).result()
        return wait_for_generation.submit(task, account, QUICK).result()

    with pytest.raises(GenerationFailedError) as caught:
        fails()
    assert caught.value.code == "CONTENT_VIOLATION"


async def test_wrong_key_raises_and_costs_nothing(account, sandbox):
    wrong = account.model_copy(update={"api_key": "wrong"})
    with pytest.raises(UnauthorizedError):
        await submit_generation(REQUEST, wrong)
    assert sandbox.service.bill()["accepted"] == 0


async def test_timed_out_wait_can_be_repeated(account, sandbox):
    task = await submit_generation(REQUEST, account)
    impatient = QUICK.model_copy(update={"timeout": 1e-9})
    with pytest.raises(GenerationTimeoutError, match=task.task_id):
        await wait_for_generation.with_options(retries=0)(task, account, impatient)
    assert (await wait_for_generation(task, account, QUICK)).task_id == task.task_id
    assert sandbox.service.bill()["accepted"] == 1


def test_submits_of_a_sync_flow_share_the_limiter(account, sandbox):
    few = account.model_copy(update={"concurrent_tasks": 3})

    @flow
    def restyle():
        waits = []
        for _ in range(12):
            task = submit_generation.submit(REQUEST, few)
            waits.append(wait_for_generation.submit(task, few, QUICK))
        return [wait.result() for wait in waits]

    assert len({result.task_id for result in restyle()}) == 12
    bill = sandbox.service.bill()
    assert bill["accepted"] == 12
    assert bill["peak_running"] <= 3
    assert bill["submits_refused"] == {"requests": 0, "slots": 0}


async def test_retries_from_outside_never_repeat_a_doubtful_submit(account, sandbox):
    sandbox.active_faults.change(FaultPlan(faults=["submit:lost-reply"]))

    @flow
    async def insist():
        submit = submit_generation.with_options(retries=3, retry_delay_seconds=0)
        return await submit(GenerationRequest(prompt="a lighthouse"), account)

    with pytest.raises(ReplyLostError):
        await insist()
    assert sandbox.service.bill()["accepted"] == 1


async def test_accepted_task_is_logged(account, sandbox, caplog):
    @flow
    async def submit():
        return await submit_generation(GenerationRequest(prompt="a lighthouse"), account)

    task = await submit()
    assert f"Accepted as task {task.task_id}." in caplog.text
