"""`flux-kontext retry-failed`: which rows are submitted again."""

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
