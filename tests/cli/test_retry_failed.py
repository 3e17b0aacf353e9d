"""`flux-kontext retry-failed`: which rows are submitted again."""

import csv
import json

import pytest

from prefect_flux_kontext.cli import main


def test_unreadable_line_does_not_take_the_common_prompt(sandbox, tmp_path, capsys):
    """A row that could not be read is not paid for with the prompt for all rows."""
    manifest, output = tmp_path / "m.jsonl", tmp_path / "out"
    manifest.write_text(
        '{"id": "good", "prompt": "a lighthouse"}\n'
        '{"id": "twice", "image": "http://references.test/a.jpg", "image": "b.jpg"}\n'
        '{"id": "broken", "prompt": \n'
        '{"id": "bad", "prompt": "nsfw"}\n'
    )
    assert main(["run", str(manifest), str(output), "--skip-invalid"]) == 1
    assert sandbox.service.bill()["accepted"] == 2
    assert len((output / "failed.csv").read_text().splitlines()) == 1 + 3
    capsys.readouterr()
    assert main(["retry-failed", str(output), "--prompt", "in oil"]) == 1
    out = capsys.readouterr().out
    assert out.count("the row has neither an image nor a prompt of its own") == 2
    assert "0 of 3 rows stored" in out
    assert sandbox.service.bill()["accepted"] == 2


@pytest.fixture
def run(sandbox, tmp_path, capsys):
    """Run CSV lines into one output; return the exit status and what is printed."""
    path, output = tmp_path / "m.csv", tmp_path / "out"

    def call(command, lines=None, *options):
        if lines is not None:
            path.write_text("id,prompt,style\n" + "\n".join(lines) + "\n")
        words = [command, *([str(path)] if lines is not None else []), str(output), *options]
        return main(words), capsys.readouterr().out

    call.output = output
    return call


def failed_ids(run):
    """Return the ids in failed.csv, which must be as many as `status` counts."""
    path = run.output / "failed.csv"
    rows = list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []
    states = json.loads(run("status", None, "--json")[1])["states"]
    assert states.get("failed", 0) == len(rows)
    results = map(json.loads, (run.output / "results.jsonl").read_text().splitlines())
    names = {(row["id"], row.get("style") or None) for row in rows}
    failed = {(line["id"], line.get("style")) for line in results if line["state"] == "failed"}
    assert failed <= names, "the results count failures that failed.csv does not have"
    return sorted(row["id"] for row in rows)


def test_failures_of_earlier_runs_stay(run):
    """They belong to the output: runs of other rows neither rewrite nor delete them."""
    run("run", ["a,nsfw,", "b,oil,"])
    run("run", ["c,oil,"])
    assert failed_ids(run) == ["a"]
    run("run", ["d,nsfw 2,", "e,,"], "--skip-invalid")
    assert failed_ids(run) == ["a", "d", "e"]
    status, out = run("retry-failed")
    assert (status, out.count("CONTENT_VIOLATION:")) == (1, 2)
    assert failed_ids(run) == ["a", "d", "e"]


def test_failure_leaves_once_its_row_is_stored(run):
    """Another prompt under the same id and style counts; another style does not."""
    run("run", ["a,nsfw,", "b,nsfw,oil"])
    assert failed_ids(run) == ["a", "b"]
    run("run", ["a,oil,", "b,in ink,noir"])
    assert failed_ids(run) == ["b"]
    run("run", ["b,in ink,oil"])
    assert failed_ids(run) == []
    assert not (run.output / "failed.csv").exists()


def test_retried_rows_keep_their_lines(run):
    """Messages, failed.csv and the results name the line of the manifest, also after a retry."""
    run("run", ["a,oil,", "b,nsfw,", '"c","nsfw', '2",', "d,nsfw 3,"])
    path = run.output / "failed.csv"
    path.write_text(path.read_text().replace("nsfw 3", "a ship"))
    for _ in range(2):  # the second time, nothing is paid
        out = run("retry-failed")[1]
        assert f"rows in {path.as_uri()}" in out
        assert ("line 3, b: " in out, "line 5, c: " in out) == (True, True)
    with path.open(newline="") as file:
        assert [(row["id"], row["failed_line"]) for row in csv.DictReader(file)] == [
            ("b", "3"),
            ("c", "5"),
        ]
    run("run", ["z,nsfw,"])
    assert failed_ids(run) == ["b", "c", "z"]
    results = map(json.loads, (run.output / "results.jsonl").read_text().splitlines())
    found = {line["id"]: line for line in results}
    assert [found[name]["line"] for name in "abcd"] == [2, 3, 5, 6]
    assert not [key for line in found.values() for key in line if key.startswith("failed_")]


def test_added_row_has_its_line_in_the_file(run):
    run("run", ["a,nsfw,"])
    path = run.output / "failed.csv"
    for line in ("b,nsfw two", "c,nsfw three,,x,y,z"):
        path.write_text(path.read_text() + line + "\n")
    assert "line 3, b: " in run("retry-failed")[1]


def test_nothing_to_retry_exits_0(run):
    run("run", ["a,oil,"])
    status, out = run("retry-failed")
    assert status == 0
    assert "Nothing to do." in out


def test_retry_of_a_mistyped_output_exits_2(sandbox, tmp_path, capsys):
    assert main(["retry-failed", str(tmp_path / "typo")]) == 2
    assert "no results either" in capsys.readouterr().err


def test_failed_rows_with_equal_ids_are_all_kept(run):
    run("run", ["a,,", "a,,", "a,oil,"], "--skip-invalid")
    assert failed_ids(run) == ["a", "a"]


def test_edited_file_of_failed_rows_is_kept_by_other_runs(run):
    run("run", ["a,nsfw,"])
    path = run.output / "failed.csv"
    path.write_text(path.read_text().replace("a,nsfw", "a,a better prompt"))
    run("run", ["b,oil,"])
    status, out = run("retry-failed")
    assert (status, "1 of 1 rows stored" in out) == (0, True)
    assert failed_ids(run) == []


def test_damaged_file_of_failed_rows_pays_nothing(run, sandbox, capsys):
    run("run", ["a,nsfw,"])
    path = run.output / "failed.csv"
    path.write_text(path.read_text() + '"x"y,\n')
    paid = sandbox.service.bill()["accepted"]
    assert run("run", ["b,oil,"])[0] == 2
    assert sandbox.service.bill()["accepted"] == paid
