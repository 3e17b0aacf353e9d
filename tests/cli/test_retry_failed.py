"""`flux-kontext retry-failed`: what is paid for again, and what never was."""

from prefect_flux_kontext.cli import main


def test_a_line_that_could_not_be_read_is_not_paid_for_by_the_prompt_for_all_rows(
    sandbox, tmp_path, capsys
):
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
    told = capsys.readouterr().out
    assert told.count("the row has neither an image nor a prompt of its own") == 4
    assert "0 of 3 rows stored" in told
    assert sandbox.service.bill()["accepted"] == 2
