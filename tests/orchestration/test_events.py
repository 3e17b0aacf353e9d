"""The events, artifacts, asset and logs of a batch in Prefect."""

import asyncio

import pytest
from prefect import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName
from prefect.settings import PREFECT_API_URL, temporary_settings

from prefect_flux_kontext.batch.summary import BatchSummary
from prefect_flux_kontext.errors import BudgetReachedError
from prefect_flux_kontext.flows import collect_batch, retry_failed, style_transfer_batch
from prefect_flux_kontext.orchestration import events, run_page
from prefect_flux_kontext.orchestration.run_page import (
    find_browser_url,
    progress_artifact,
    publish_summary,
)
from prefect_flux_kontext.storage.filesystem import OutputFolder
from tests.orchestration.conftest import QUICK
from tests.orchestration.records import read_artifacts, read_logs, read_our_events

pytestmark = pytest.mark.anyio


def rows(number, **cells):
    return [{"id": f"row-{n}", "prompt": f"a lighthouse {n}", **cells} for n in range(number)]


async def run(flow, *args, **how):
    state = await flow(*args, **how, cadence=QUICK, return_state=True)
    return state, state.state_details.flow_run_id


async def test_batch_emits_start_waves_failed_rows_and_end(account, tmp_path):
    wrong = [{"id": "rude", "prompt": "nsfw"}]
    _, run_id = await run(
        style_transfer_batch, rows(3) + wrong, str(tmp_path), credentials=account
    )
    found = await read_our_events(
        run_id,
        events.BATCH_STARTED,
        events.WAVE_FINISHED,
        events.ROWS_FAILED,
        events.BATCH_FINISHED,
        events.ASSET_STORED,
    )
    by_name = {event["event"]: event for event in found}
    assert len(by_name) == len(found) == 5
    started = by_name[events.BATCH_STARTED]["payload"]
    assert (started["rows"], started["to_pay"], started["price_usd"]) == (4, 4, 0.12)
    wave = by_name[events.WAVE_FINISHED]["payload"]
    assert (wave["wave"], wave["stored"], wave["failed"]) == (1, 3, 1)
    assert wave["batch_spent_usd"] == 0.12
    (failed,) = by_name[events.ROWS_FAILED]["payload"]["rows"]
    assert (failed["id"], failed["line"], failed["reason"]) == ("rude", 4, "CONTENT_VIOLATION")
    assert failed["task_id"] in failed["message"]
    finished = by_name[events.BATCH_FINISHED]
    assert finished["payload"]["outcome"] == "incomplete"
    assert finished["payload"]["spent_usd"] == 0.12
    assert finished["payload"]["reasons"] == {"CONTENT_VIOLATION": 1}
    assert finished["payload"]["output"] == f"file://{tmp_path}"
    labels = finished["resource"]
    assert labels["flux-kontext.output"] == f"file://{tmp_path}"
    assert labels["flux-kontext.flow"] == "style-transfer-batch"
    assert labels["flux-kontext.outcome"] == "incomplete"
    assert labels["flux-kontext.outstanding"] == "no"
    roles = {related["prefect.resource.role"] for related in finished["related"]}
    assert {"flow-run", "flow"} <= roles
    assert by_name[events.ASSET_STORED]["resource"]["prefect.resource.id"] == f"file://{tmp_path}"


async def test_stopped_batch_reports_its_counts(account, tmp_path):
    state, run_id = await run(
        style_transfer_batch, rows(9), str(tmp_path), credentials=account, budget_usd=0.10
    )
    with pytest.raises(BudgetReachedError):
        await state.aresult()
    by_name = {
        event["event"]: event for event in await read_our_events(run_id, events.BATCH_FINISHED)
    }
    finished = by_name[events.BATCH_FINISHED]["payload"]
    assert finished["outcome"] == "stopped"
    assert (finished["stored"], finished["spent_usd"]) == (3, 0.09)
    text = (await read_artifacts(run_id))["markdown"].data
    assert "# Stopped" in text
    assert "3 of 9" in text


async def test_cancelled_batch_reports_outstanding_rows(account, sandbox, tmp_path):
    name = f"cancelled-{tmp_path.name}"
    slow = {"initial_delay": 60.0, "interval": 1.0, "timeout": 90.0}
    flow = style_transfer_batch.with_options(flow_run_name=name)
    running = asyncio.create_task(flow(rows(3), str(tmp_path), credentials=account, cadence=slow))
    for _ in range(1_200):
        if sandbox.service.bill()["accepted"] == 3:
            break
        await asyncio.sleep(0.05)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    async with get_client() as client:
        by_name = FlowRunFilter(name=FlowRunFilterName(any_=[name]))
        (found,) = await client.read_flow_runs(flow_run_filter=by_name)
    by_name = {
        event["event"]: event for event in await read_our_events(found.id, events.BATCH_FINISHED)
    }
    finished = by_name[events.BATCH_FINISHED]
    assert finished["payload"]["outcome"] == "stopped"
    assert finished["resource"]["flux-kontext.outstanding"] == "yes"
    assert "# Stopped" in (await read_artifacts(found.id))["markdown"].data


async def test_batch_without_new_images_emits_no_asset(account, tmp_path):
    await run(style_transfer_batch, rows(2), str(tmp_path), credentials=account)
    _, run_id = await run(style_transfer_batch, rows(2), str(tmp_path), credentials=account)
    found = await read_our_events(run_id, events.BATCH_FINISHED)
    assert events.ASSET_STORED not in {event["event"] for event in found}


def manifest_with_references(folder, url):
    """Write a manifest of two images in two folders of one host."""
    path = folder / "manifest.csv"
    lines = [f"{name},{url}/{name}/a.jpg,as a poster" for name in ("red", "blue")]
    path.write_text("\n".join(["id,image,prompt", *lines, "text,,nsfw"]), encoding="utf-8")
    return path


async def test_asset_names_what_it_was_made_from(account, tmp_path, monkeypatch):
    output = tmp_path / "posters"
    monkeypatch.setenv("FLUX_KONTEXT_ASSET_OWNERS", '["catalogue team"]')
    monkeypatch.setenv("FLUX_KONTEXT_MATCH_REFERENCES", "false")
    urls = f'{{"file://{tmp_path}": "https://pictures.example.com"}}'
    monkeypatch.setenv("FLUX_KONTEXT_PUBLIC_URLS", urls)
    manifest = manifest_with_references(tmp_path, "https://shop.example.com/photos")
    _, run_id = await run(style_transfer_batch, str(manifest), str(output), credentials=account)
    found = await read_our_events(run_id, events.BATCH_FINISHED, events.ASSET_FAILED)
    by_name = {event["event"]: event for event in found}
    asset = by_name[events.ASSET_FAILED]
    assert asset["resource"] == {
        "prefect.resource.id": f"file://{output}",
        "prefect.resource.name": "posters",
        "prefect.asset.url": "https://pictures.example.com/posters/gallery.html",
        "prefect.asset.owners": '["catalogue team"]',
    }
    roles = {
        (part["prefect.resource.role"], part["prefect.resource.id"]) for part in asset["related"]
    }
    sources = {f"file://{manifest}", "https://shop.example.com/photos"}
    assert {("asset", source) for source in sources} <= roles
    assert ("asset-materialized-by", "prefect-flux-kontext") in roles
    assert asset["payload"]["rows"] == 3
    referenced = [
        e["resource"]["prefect.resource.id"]
        for e in found
        if e["event"] == "prefect.asset.referenced"
    ]
    assert sorted(referenced) == sorted(sources)


async def test_stopped_batch_emits_a_failed_asset(account, tmp_path):
    _, run_id = await run(
        style_transfer_batch, rows(9), str(tmp_path), credentials=account, budget_usd=0.10
    )
    found = await read_our_events(run_id, events.BATCH_FINISHED, events.ASSET_FAILED)
    (asset,) = [event for event in found if event["event"].startswith("prefect.asset.")]
    assert (asset["payload"]["stored"], asset["payload"]["spent_usd"]) == (3, 0.09)


@pytest.mark.parametrize(("above", "times"), [(0.05, 1), (0.09, 0), (None, 0)])
async def test_spending_above_the_limit_is_emitted_once(above, times, account, tmp_path):
    _, run_id = await run(
        style_transfer_batch, rows(3), str(tmp_path), credentials=account, alert_above_usd=above
    )
    found = await read_our_events(run_id, events.BATCH_FINISHED)
    alarms = [event["payload"] for event in found if event["event"] == events.SPEND_ABOVE]
    assert len(alarms) == times
    for alarm in alarms:
        assert alarm["spent_usd"] > alarm["above_usd"] == above


async def test_collect_emits_expiring_results(account, tmp_path, monkeypatch):
    await run(style_transfer_batch, rows(2), str(tmp_path), credentials=account, wait="collect")
    monkeypatch.setenv("FLUX_KONTEXT_RESULT_DAYS", "1")
    # It times out before the first response, so that the rows stay outstanding.
    hasty = {"initial_delay": 0.0, "interval": 0.01, "timeout": 1e-9}
    state = await collect_batch(
        str(tmp_path), credentials=account, cadence=hasty, return_state=True
    )
    assert (await state.aresult()).outstanding == 2
    run_id = state.state_details.flow_run_id
    by_name = {
        e["event"]: e["payload"] for e in await read_our_events(run_id, events.RESULTS_EXPIRING)
    }
    expiring = by_name[events.RESULTS_EXPIRING]
    assert expiring["rows"] == 2
    assert 0.9 < expiring["days_left"] <= 1
    assert expiring["task_id"]


async def test_three_hundred_rows_emit_five_events_at_most(account, tmp_path):
    _, run_id = await run(style_transfer_batch, rows(300), str(tmp_path), credentials=account)
    found = await read_our_events(run_id, events.BATCH_FINISHED, events.ASSET_STORED)
    assert len(found) <= 5


class TestArtifacts:
    async def test_summary_has_counts_reasons_rows_and_files(self, account, tmp_path):
        hostile = {"id": "a|b <b>*x*</b>", "prompt": "nsfw"}
        _, run_id = await run(
            style_transfer_batch, [*rows(2), hostile], str(tmp_path), credentials=account
        )
        found = await read_artifacts(run_id)
        text = found["markdown"].data
        for word in ("2 of 3", "$0.09", "CONTENT_VIOLATION", "failed.csv"):
            assert word in text
        assert r"a\|b &lt;b&gt;\*x\*&lt;/b&gt;" in text
        assert "<b>" not in text
        progress = found["progress"]
        assert progress.data == 100
        assert "3 of 3 rows" in progress.description
        assert set(found) == {"markdown", "progress"}

    async def test_files_with_a_public_url_are_linked(self, account, tmp_path, monkeypatch):
        urls = f'{{"file://{tmp_path.parent}": "https://pictures.example.com/all/"}}'
        monkeypatch.setenv("FLUX_KONTEXT_PUBLIC_URLS", urls)
        _, run_id = await run(style_transfer_batch, rows(1), str(tmp_path), credentials=account)
        found = await read_artifacts(run_id)
        url = f"https://pictures.example.com/all/{tmp_path.name}/_gallery/contact-sheet.png"
        assert found["image"].data == url
        assert f"[_gallery/contact-sheet.png]({url})" in found["markdown"].data

    async def test_summary_has_spend_by_column_and_balance(self, account, tmp_path):
        given = [*rows(2, team="a|b"), {"id": "other", "prompt": "a cow", "team": "red"}]
        _, run_id = await run(
            style_transfer_batch,
            given,
            str(tmp_path),
            credentials=account,
            budget_by={"team": {"red": 1}},
        )
        text = (await read_artifacts(run_id))["markdown"].data
        assert "## Spent\n\n| team | rows | spent |\n" in text
        assert "| a\\|b | 2 | $0.06 |\n| red | 1 | $0.03 |" in text
        assert "| Balance of the account | fell by $0.09 to $" in text

    async def test_collect_and_retry_write_a_summary(self, account, tmp_path):
        wrong = [{"id": "rude", "prompt": "nsfw"}]
        await run(style_transfer_batch, wrong, str(tmp_path), credentials=account)
        for flow in (retry_failed, collect_batch):
            _, run_id = await run(flow, str(tmp_path), credentials=account)
            assert "markdown" in await read_artifacts(run_id)


class TestLogs:
    async def test_wave_and_each_failed_row_log_one_line(self, account, tmp_path):
        wrong = [{"id": f"rude-{n}", "prompt": f"nsfw {n}"} for n in range(3)]
        _, run_id = await run(
            style_transfer_batch, rows(5) + wrong, str(tmp_path), credentials=account
        )
        lines = await read_logs(run_id)
        assert sum(line.startswith("Wave 1: 5 of 8 rows stored") for line in lines) == 1
        assert sum(line.startswith("Row rude-") for line in lines) == 3
        assert any("3 failed rows are in" in line for line in lines)  # the core's own line
        assert not any("HTTP Request" in line for line in lines)
        assert len(lines) < 16

    async def test_rows_left_to_collect_are_not_logged_as_failed(self, account, tmp_path):
        _, run_id = await run(
            style_transfer_batch, rows(5), str(tmp_path), credentials=account, wait="collect"
        )
        assert not any(line.startswith("Row ") for line in await read_logs(run_id))


class TestWithoutPrefectApi:
    @pytest.fixture(autouse=True)
    def _no_api(self):
        with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:1/api"}):
            yield

    async def test_unwritable_summary_raises_nothing(self, tmp_path):
        await publish_summary(BatchSummary(rows=1), OutputFolder(tmp_path), "stored", {})

    async def test_unwritable_progress_still_calls_on_update(self):
        updates = []
        async with progress_artifact(BatchSummary(rows=1), 1, "", lambda: updates.append(1)):
            pass
        assert updates == [1]

    @pytest.mark.virtual_time
    @pytest.mark.parametrize(("number", "most"), [(600, 5), (2_500, 10)])
    async def test_progress_is_updated_by_rows_not_by_time(self, number, most, monkeypatch):
        shown = []

        async def created(*_args):
            return "the artifact"

        async def updated(_artifact, percent, _text):
            shown.append(percent)

        monkeypatch.setattr(run_page, "acreate_progress_artifact", created)
        monkeypatch.setattr(run_page, "aupdate_progress_artifact", updated)
        batch = BatchSummary()
        async with progress_artifact(batch, number, "", lambda: None):
            for _ in range(number):
                batch.rows += 1
                await asyncio.sleep(2 * run_page.UPDATE_INTERVAL_SECONDS)
        assert len(shown) <= most
        assert shown[-1] == 100


class TestBrowserUrl:
    @pytest.mark.parametrize(
        ("uri", "url"),
        [
            ("https://pictures.example.com/a.png", "https://pictures.example.com/a.png"),
            ("s3://bucket/deep/out/a b.png", "https://deep.example.com/out/a%20b.png"),
            ("s3://bucket/out/a.png", "https://cdn.example.com/all/out/a.png"),
            ("s3://bucket-2/out/a.png", None),
            ("file:///data/a.png", None),
        ],
    )
    def test_longest_prefix_wins(self, uri, url):
        urls = {
            "s3://bucket": "https://cdn.example.com/all/",
            "s3://bucket/deep/": "https://deep.example.com",
        }
        assert find_browser_url(uri, urls) == url
