"""Several images of one row: their keys, names, numbers and prices."""

import json

import pytest

from prefect_flux_kontext.cli import main
from prefect_flux_kontext.manifest.reader import Manifest
from prefect_flux_kontext.manifest.row import RefusedRow, make_row
from prefect_flux_kontext.manifest.row_key import compute_row_key
from prefect_flux_kontext.models import GenerationRequest
from tests.cli.conftest import sandbox  # noqa: F401


def rows_of(cells, **options):
    return list(Manifest([{"id": "cat", "prompt": "A cat", **cells}], **options).rows())


def test_first_variant_has_the_key_without_variants():
    plain, first, second = (
        compute_row_key(GenerationRequest(prompt="A cat"), variant=number) for number in (1, 1, 2)
    )
    assert plain == first == "badff679b973923816f3747ff7dd79e3"
    assert second != plain
    assert rows_of({"variants": "3"})[0].key == make_row(1, {"id": "x", "prompt": "A cat"}).key


def test_row_is_made_in_each_of_its_variants():
    rows = rows_of({"variants": "3"})
    assert [row.name for row in rows] == ["cat", "cat~v2", "cat~v3"]
    assert [row.variant for row in rows] == [1, 2, 3]
    assert len({row.key for row in rows}) == 3


@pytest.mark.parametrize(
    ("cell", "parameter", "style", "number"),
    [("", None, None, 1), ("2", "3", 4, 2), ("", "3", 4, 3), ("", None, 4, 4), ("1", "3", 4, 1)],
)
def test_cell_is_over_parameter_over_style(tmp_path, cell, parameter, style, number):
    options = {"parameters": {"variants": parameter}}
    if style:
        (tmp_path / "s.yaml").write_text(f"ink: {{prompt: In ink, variants: {style}}}\n")
        options["styles"] = [str(tmp_path / "s.yaml")]
    assert len(rows_of({"variants": cell}, **options)) == number


@pytest.mark.parametrize("text", ["0", "21", "-1", "1.5", "three", "only 0", "²", "1e1", "999999"])
def test_invalid_number_refuses_the_row(text):
    (row,) = rows_of({"variants": text})
    assert isinstance(row, RefusedRow)
    assert "is not a number from 1 to 20" in row.reason


def test_single_variant_is_the_same_row_again():
    (again,) = rows_of({"variants": "only 2"})
    _, second, _ = rows_of({"variants": "3"})
    assert (again.key, again.name) == (second.key, second.name)
    assert dict(rows_of(dict(second.cells))[0].cells) == dict(second.cells)


def test_output_template_and_own_names_get_the_number():
    names = [row.name for row in rows_of({"variants": "2"}, names="x/{id}.{ext}")]
    assert names == ["x/cat", "x/cat~v2"]
    names = [row.name for row in rows_of({"variants": "2", "output": "y/z.jpg"})]
    assert names == ["y/z", "y/z~v2"]


def test_variants_are_planned_paid_and_retried_each(sandbox, tmp_path, capsys):  # noqa: F811
    manifest, output = tmp_path / "m.csv", tmp_path / "out"
    manifest.write_text("id,prompt,variants\na,A cat,3\nb,A nsfw dog,2\n")
    assert main(["run", str(manifest), str(output), "--dry-run"]) == 0
    assert "$0.15  price: 5 in pro" in capsys.readouterr().out
    assert main(["run", str(manifest), str(output)]) == 1
    lines = [json.loads(row) for row in (output / "results.jsonl").read_text().splitlines()]
    assert [(row["id"], row["variant_number"], row["state"]) for row in lines] == [
        ("a", 1, "stored"),
        ("a", 2, "stored"),
        ("a", 3, "stored"),
        ("b", 1, "failed"),
        ("b", 2, "failed"),
    ]
    failed = (output / "failed.csv").read_text()
    assert failed.count("only") == 2
    (output / "failed.csv").write_text(failed.replace("nsfw ", ""))
    assert main(["retry-failed", str(output)]) == 0
    assert sorted(path.name for path in output.glob("*.jpg")) == [
        "a.jpg",
        "a~v2.jpg",
        "a~v3.jpg",
        "b.jpg",
        "b~v2.jpg",
    ]
    assert not (output / "failed.csv").exists()
    assert sandbox.service.bill()["accepted"] == 7
