"""Rows that are stored already are counted in bulk, and get a result line only if it changes."""

import json
from datetime import timedelta

import pytest

from prefect_flux_kontext.batch.policy import RowOptions
from prefect_flux_kontext.batch.runner import run_batch
from prefect_flux_kontext.batch.session import open_session
from prefect_flux_kontext.client.client import FluxKontextClient
from prefect_flux_kontext.manifest.reader import Manifest
from prefect_flux_kontext.models import utc_now
from prefect_flux_kontext.report.results import open_results_store
from prefect_flux_kontext.report.verdicts import Verdict, Verdicts
from prefect_flux_kontext.sandbox.server import running_sandbox
from prefect_flux_kontext.sandbox.settings import SandboxSettings
from prefect_flux_kontext.settings import FluxKontextSettings
from prefect_flux_kontext.storage.filesystem import OutputFolder
from tests.support.batches import KEY, QUICK

pytestmark = pytest.mark.anyio

LEDGER_COLUMNS = ("sha256", "submitted_at", "finished_at", "waiting_seconds", "cost_usd", "file")


@pytest.fixture(scope="module")
def sandbox():
    with running_sandbox(SandboxSettings(mean=0.05, long_edge=16, api_key=KEY)) as running:
        yield running


def shop(*numbers, **changes):
    """Rows of a shop, of which the first gets the changes."""
    rows = [{"id": f"p{n}", "prompt": f"a lamp {n}", "sku": f"s{n}"} for n in numbers]
    return [{**rows[0], **changes}, *rows[1:]]


async def run(sandbox, rows, output, **options):
    """Run rows; return the summary and the sizes of the waves that were run."""
    waves = []

    async def run_wave(wave):
        summary = await wave.run()
        waves.append(summary.rows)
        return summary

    client = FluxKontextClient(KEY, base_url=sandbox.url)
    row_options = RowOptions(cadence=QUICK, **options)
    async with open_session(
        client, OutputFolder(output), row_options, FluxKontextSettings()
    ) as session:
        summary = await run_batch(session, Manifest(rows).rows(), run_wave, concurrent_tasks=10)
        assert session.progress.model_dump(include={"rows", "stored", "already_stored"}) == (
            summary.model_dump(include={"rows", "stored", "already_stored"})
        )
    return summary, waves


def lines(output):
    text = (output / "results.jsonl").read_text()
    return {line["id"]: line for line in map(json.loads, text.splitlines())}


def stamps(output):
    names = ("results.jsonl", "results.parquet", "gallery.html", "_results/lines.index")
    found = ((output / name).stat() for name in names)
    return [(stat.st_ino, stat.st_mtime_ns, stat.st_size) for stat in found]


async def test_nothing_new_runs_no_wave_and_writes_nothing(sandbox, tmp_path):
    await run(sandbox, shop(*range(300)), tmp_path)
    before = stamps(tmp_path)
    summary, waves = await run(sandbox, shop(*reversed(range(300))), tmp_path)
    assert (summary.rows, summary.stored, summary.already_stored) == (300, 300, 300)
    assert (summary.spent, waves) == (0, [])
    assert stamps(tmp_path) == before


async def test_new_rows_share_a_wave_and_keep_other_lines(sandbox, tmp_path):
    await run(sandbox, shop(*range(600)), tmp_path)
    before = (tmp_path / "results.jsonl").read_bytes()
    rows = shop(900, *range(300), 901, *range(300, 600), 902)
    summary, waves = await run(sandbox, rows, tmp_path)
    assert (summary.rows, summary.stored, summary.already_stored) == (603, 603, 600)
    assert waves == [3]
    after = (tmp_path / "results.jsonl").read_bytes()
    assert after.startswith(before)
    assert list(lines(tmp_path))[600:] == ["p900", "p901", "p902"]
    assert read_parquet_ids(tmp_path) == list(lines(tmp_path))


def read_parquet_ids(output):
    pq = pytest.importorskip("pyarrow.parquet")
    return pq.read_table(output / "results.parquet")["id"].to_pylist()


async def test_parquet_that_could_not_be_written_is_completed(sandbox, tmp_path):
    await run(sandbox, shop(1, 2), tmp_path)
    (tmp_path / "results.parquet").rename(tmp_path / "earlier")
    (tmp_path / "results.parquet" / "taken").mkdir(parents=True)
    await run(sandbox, shop(1, 2, 3), tmp_path)
    assert list(lines(tmp_path)) == ["p1", "p2", "p3"]
    (tmp_path / "results.parquet" / "taken").rmdir()
    (tmp_path / "results.parquet").rmdir()
    (tmp_path / "earlier").rename(tmp_path / "results.parquet")
    for rows in ((1, 2, 3), (1, 2, 3, 4)):
        await run(sandbox, shop(*rows), tmp_path)
        assert read_parquet_ids(tmp_path) == [f"p{row}" for row in rows]


async def test_changed_column_writes_one_complete_line(sandbox, tmp_path):
    await run(sandbox, shop(1, 2), tmp_path)
    before = lines(tmp_path)
    _, waves = await run(sandbox, shop(1, 2, sku="new"), tmp_path)
    after = lines(tmp_path)
    assert (waves, after["p2"]) == ([1], before["p2"])
    assert (after["p1"]["sku"], after["p1"]["stored_before"]) == ("new", True)
    assert all(after["p1"][name] == before["p1"][name] for name in LEDGER_COLUMNS)
    assert (await run(sandbox, shop(1, 2, sku="new"), tmp_path))[1] == []


async def test_renamed_row_gets_line_and_file(sandbox, tmp_path):
    await run(sandbox, shop(1, 2), tmp_path)
    summary, waves = await run(sandbox, shop(1, 2, id="other"), tmp_path)
    assert (summary.already_stored, summary.spent, waves) == (2, 0, [1])
    assert lines(tmp_path)["other"]["file"] == "other.jpg"
    assert (tmp_path / "other.jpg").read_bytes() == (tmp_path / "p1.jpg").read_bytes()


async def test_style_that_changes_no_prompt_gets_a_line(sandbox, tmp_path):
    styles = tmp_path / "styles.yaml"
    styles.write_text("plain: '{{ prompt }}'\nbare: '{{ prompt }}'\n")
    for style, wave in (("plain", [1]), ("bare", [1]), ("bare", [1])):
        rows = [{"id": "a", "prompt": "a lamp", "style": style}]
        manifest = Manifest(rows, styles=[str(styles)])
        client = FluxKontextClient(KEY, base_url=sandbox.url)
        folder, options = OutputFolder(tmp_path / "out"), RowOptions(cadence=QUICK)
        async with open_session(client, folder, options, FluxKontextSettings()) as session:
            summary = await run_batch(
                session, manifest.rows(), lambda wave: wave.run(), concurrent_tasks=10
            )
        assert summary.stored == len(wave)
    text = (tmp_path / "out" / "results.jsonl").read_text()
    assert [json.loads(line)["style"] for line in text.splitlines()] == ["plain", "bare"]


@pytest.mark.parametrize("name", ["results.jsonl", "_results/lines.index"])
async def test_removed_results_are_written_again(sandbox, tmp_path, name):
    await run(sandbox, shop(1, 2, 3), tmp_path)
    before = lines(tmp_path)
    (tmp_path / name).unlink()
    summary, waves = await run(sandbox, shop(1, 2, 3), tmp_path)
    assert (summary.already_stored, summary.spent) == (3, 0)
    assert waves == ([3] if name == "results.jsonl" else [])
    after = lines(tmp_path)
    assert [after[row]["sha256"] for row in before] == [row["sha256"] for row in before.values()]
    assert (await run(sandbox, shop(1, 2, 3), tmp_path))[1] == []


async def test_edited_results_are_completed(sandbox, tmp_path):
    await run(sandbox, shop(1, 2, 3), tmp_path)
    text = (tmp_path / "results.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "results.jsonl").write_text(text[0] + text[1].replace('"s2"', '"edited"'))
    _, waves = await run(sandbox, shop(1, 2, 3), tmp_path)
    assert waves == [2]
    assert [line["sku"] for line in lines(tmp_path).values()] == ["s1", "s2", "s3"]


async def test_damaged_index_is_not_used(sandbox, tmp_path):
    await run(sandbox, shop(1, 2), tmp_path)
    index = tmp_path / "_results" / "lines.index"
    for data in (b"no JSON", b"{}\n", index.read_bytes()[:-3], index.read_bytes()[:-24]):
        index.write_bytes(data)
        summary, waves = await run(sandbox, shop(1, 2), tmp_path)
        assert (summary.already_stored, waves) == (2, [])
    assert list(lines(tmp_path)) == ["p1", "p2"]


async def test_damaged_results_stop_no_run(sandbox, tmp_path, caplog):
    await run(sandbox, shop(1), tmp_path)
    (tmp_path / "results.jsonl").write_text("no JSON\n")
    summary, _ = await run(sandbox, shop(1), tmp_path)
    assert (summary.already_stored, summary.spent) == (1, 0)
    assert "The results of earlier runs cannot be read" in caplog.text


@pytest.mark.parametrize("change", [{"prompt": ""}, {"prompt": "a nsfw lamp"}, {"prompt": "else"}])
async def test_row_that_returns_to_its_request_is_stored_again(sandbox, tmp_path, change):
    await run(sandbox, shop(1, 2), tmp_path)
    before = lines(tmp_path)["p1"]
    await run(sandbox, shop(1, 2, **change), tmp_path)
    assert lines(tmp_path)["p1"].get("key") != before["key"]
    summary, waves = await run(sandbox, shop(1, 2), tmp_path)
    assert (summary.already_stored, summary.spent, waves) == (2, 0, [1])
    after = lines(tmp_path)["p1"]
    assert all(after[name] == before[name] for name in (*LEDGER_COLUMNS, "key", "state"))
    assert not (tmp_path / "failed.csv").exists()


async def test_equal_rows_are_counted_each(sandbox, tmp_path):
    rows = [{"id": name, "prompt": "one lamp"} for name in "abc"]
    summary, _ = await run(sandbox, rows, tmp_path)
    assert summary.stored == 3
    summary, _ = await run(sandbox, rows, tmp_path)
    assert (summary.rows, summary.already_stored, summary.spent) == (3, 3, 0)
    assert sorted(lines(tmp_path)) == ["a", "b", "c"]


async def test_flags_of_stored_rows_are_counted(sandbox, tmp_path):
    def dull(_image, _row):
        return ["dull"]

    await run(sandbox, shop(1, 2), tmp_path, checks=(dull,))
    summary, waves = await run(sandbox, shop(1, 2), tmp_path, checks=(dull,))
    assert (summary.flags["dull"], waves) == (2, [])


@pytest.mark.parametrize(("days", "already"), [(-1, 0), (1, 2)])
async def test_rows_stored_since_a_time_are_new(sandbox, tmp_path, days, already):
    await run(sandbox, shop(1, 2), tmp_path)
    since = utc_now() + timedelta(days=days)
    summary, waves = await run(sandbox, shop(1, 2), tmp_path, since=since)
    assert (summary.stored, summary.already_stored, waves) == (2, already, [])


async def test_verdict_is_joined_though_nothing_is_new(sandbox, tmp_path):
    await run(sandbox, shop(1, 2), tmp_path)
    key = lines(tmp_path)["p2"]["key"]
    await Verdicts(OutputFolder(tmp_path)).record([Verdict(key=key, verdict="keep")])
    _, waves = await run(sandbox, shop(1, 2), tmp_path)
    found = [line.get("verdict") for line in lines(tmp_path).values()]
    assert (waves, found) == ([], [None, "keep"])


async def test_parts_of_a_killed_run_are_merged(sandbox, tmp_path, monkeypatch):
    await run(sandbox, shop(1), tmp_path)

    async def fail(*_, **__):
        raise RuntimeError("killed here")

    with monkeypatch.context() as patched:
        patched.setattr("prefect_flux_kontext.report.builder.update_report", fail)
        await run(sandbox, shop(1, 2), tmp_path)
    assert list(lines(tmp_path)) == ["p1"]
    _, waves = await run(sandbox, shop(1), tmp_path)
    assert (waves, list(lines(tmp_path))) == ([], ["p1", "p2"])
    assert await open_results_store(OutputFolder(tmp_path)).list_names("parts") == []
