"""Output paths are known at plan time, are unique and stay in the output."""

import contextlib
from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_flux_kontext.batch.runner import FAILED_ROWS
from prefect_flux_kontext.errors import ConfigurationError
from prefect_flux_kontext.ledger.store import LEDGER_FOLDER
from prefect_flux_kontext.manifest.output_paths import build_output_path, parse_path_template
from prefect_flux_kontext.manifest.reader import Manifest
from prefect_flux_kontext.manifest.row import RefusedRow, make_row
from prefect_flux_kontext.storage.names import find_name_problem


def build_path(template=None, row_id="cat", style=None, **cells):
    names = None if template is None else parse_path_template(template)
    return build_output_path(row_id, style, cells, names, "jpeg")


def problem(template=None, **given):
    with pytest.raises(ValueError, match=r".") as caught:
        build_path(template, **given)
    return str(caught.value)


def make_row_with_output(text, **cells):
    return make_row(2, {"prompt": "x", "output": text, **cells})


def outcomes(rows, **given):
    made = Manifest([{"prompt": "x", **row} for row in rows], **given).rows()
    return [row.reason if isinstance(row, RefusedRow) else row.name for row in made]


def test_image_is_named_by_id_and_style():
    assert build_path() == "cat"
    assert build_path(style="oil") == "cat/oil"


def test_id_with_slashes_keeps_its_folders():
    assert build_path(row_id="2024/spring/cat") == "2024/spring/cat"
    assert build_path(row_id="2024/a cat", style="oil").startswith("2024/a-cat~")
    for odd in ("a//b", "a/", "./a", "a\\b", "a/./b"):
        assert "/" not in build_path(row_id=odd)


def test_template_inserts_safe_values():
    assert build_path("{style}/{sku}-{id}.{ext}", style="oil", sku="A 1").startswith("oil/A-1~")
    assert (
        build_path("all/{sku}.{ext}", sku="../../x")
        == f"all/{build_path('{sku}.{ext}', sku='../../x')}"
    )
    assert build_path("{photo title}.{ext}", **{"photo title": "cat"}) == "cat"
    assert build_path("{sku}_{sku}.{ext}", sku="7") == "7_7"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{id}", "it must end in `.{ext}`"),
        ("{id}.jpg", "it must end in `.{ext}`"),
        ("{id}.{ext}.gz", "it must end in `.{ext}`"),
        ("{ext}/{id}.{ext}", "`{ext}` may appear only at the end"),
        ("{id.__class__}.{ext}", "`{id.__class__}` is not a plain column name"),
        ("{id[0]}.{ext}", "`{id[0]}` is not a plain column name"),
        ("{id!r}.{ext}", "`{id!r}` is not a plain column name"),
        ("{id:>99999999}.{ext}", "`{id:>99999999}` is not a plain column name"),
        ("{}.{ext}", "`{}` is not a plain column name"),
        ("{0}.{ext}", "`{0}` is not a plain column name"),
        ("{id.{ext}", "expected '}'"),
        ("id}.{ext}", "Single '}'"),
        ("{{id}}.{ext}", "text outside columns"),
        ("my {id}.{ext}", "text outside columns"),
        ("a\\{id}.{ext}", "text outside columns"),
        ("/{id}.{ext}", "a path segment is empty"),
        ("a//{id}.{ext}", "a path segment is empty"),
        ("../{id}.{ext}", "a path segment is empty"),
        ("a/.{id}.{ext}", "starts with a dot"),
        (".{ext}", "a path segment is empty"),
        ("CON/{id}.{ext}", "reserved on Windows"),
        ("_ledger/{id}.{ext}", "reserved for the batch's own _ledger"),
        ("all.jpg/{id}.{ext}", "a folder 'all.jpg' that is named like an image"),
        ("x" * 300 + "{id}.{ext}", "a name has at most 400, and 200 between slashes"),
    ],
)
def test_invalid_template_is_refused_before_the_first_row(template, expected):
    with pytest.raises(ConfigurationError) as caught:
        list(Manifest([{"prompt": "x"}], names=template).rows())
    assert expected in caught.value.message
    assert "Use a template like `{id}/{style}.{ext}`" in caught.value.message
    assert len(caught.value.message) < 600


def test_row_without_template_column_is_refused():
    assert problem("{sku}/{id}.{ext}", colour="red") == (
        "the output names use a column 'sku' that the manifest does not have; its columns are "
        "colour"
    )
    assert "use the column 'sku', which is empty" in problem("{sku}/{id}.{ext}", sku=" ")
    assert "the row has no style" in problem("{style}/{id}.{ext}")


@pytest.mark.parametrize(
    ("template", "cells", "expected"),
    [
        ("{a}N.{ext}", {"a": "CO"}, "'CON', which is reserved"),
        ("{a}/{id}.{ext}", {"a": "x.jpg"}, "'x.jpg' that is named like an image"),
        ("{a}{a}{a}.{ext}", {"a": "x y" * 50}, "a name has at most 400"),
        ("{a}/{id}.{ext}", {"a": "_ledger"}, "the batch's own _ledger"),
        ("{a}/{id}.{ext}", {"a": "_LEDGER"}, "the batch's own _LEDGER"),
    ],
)
def test_rendered_template_is_checked(template, cells, expected):
    assert expected in problem(template, **cells)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("hero", "hero"),
        ("hero.jpg", "hero"),
        ("site/hero.JPEG", "site/hero"),
        ("v1.2/hero", "v1.2/hero"),
        ("a-b~0123456789ab/hero", "a-b~0123456789ab/hero"),
    ],
)
def test_output_column_names_the_image(given, name):
    """The extension is optional."""
    assert make_row_with_output(given, id="cat").name == name


def test_output_column_is_made_safe():
    assert make_row_with_output("a photo/Ünder.jpg").name.startswith("a-photo~")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("../../etc/passwd", "leads out of the output"),
        ("a/../../b", "leads out of the output"),
        ("/etc/passwd", "is an absolute path"),
        ("C:\\temp\\x", "is an absolute path"),
        ("s3://bucket/x", "is a URL"),
        ("a\\b", "contains a backslash"),
        ("a//b", "has an empty path segment"),
        ("a/", "has an empty path segment"),
        ("./a", "has an empty path segment"),
        (".jpg", "has an empty path segment"),
        ("a\x07b", "an invisible character"),
        ("a\u202egpj", "an invisible character"),
        ("x" * 81, "more than 80 characters"),
        ("/".join(["x" * 70] * 7), "a name has at most 400"),
        ("CON", "reserved on Windows"),
        ("a/nul.jpg", "reserved on Windows"),
        ("_ledger/rows/x", "the batch's own _ledger"),
        ("failed.csv", "the batch's own failed.csv"),
        ("Failed.CSV", "the batch's own Failed.CSV"),
        ("a.jpg/b", "named like an image"),
        ("hero.png", "has the extension png, but the row's output_format is jpeg"),
        ("hero.webp", "has the extension webp, but the row's output_format is jpeg"),
    ],
)
def test_invalid_output_column_is_refused(given, expected):
    row = make_row_with_output(given)
    assert isinstance(row, RefusedRow)
    assert expected in row.reason
    assert f"output {given!r:.80}" in row.reason


def test_extension_may_match_the_output_format():
    assert make_row_with_output("hero.png", output_format="png").name == "hero"


def test_batch_files_are_not_valid_image_names():
    for own in (LEDGER_FOLDER, FAILED_ROWS):
        assert find_name_problem(own)
        assert find_name_problem(f"{own}/x")


def test_duplicate_names_are_found_across_columns():
    assert outcomes([{"id": "cat"}, {"id": "dog", "output": "CAT.jpg"}, {"id": "Cat"}]) == [
        "cat",
        "duplicate output name 'CAT', first used on line 1",
        "duplicate id 'Cat', first used on line 1; ids name files",
    ]
    assert outcomes(
        [{"id": "cat", "style": "oil"}, {"id": "cat", "style": "noir"}, {"id": "cat/oil"}]
    ) == ["cat/oil", "cat/noir", "duplicate id 'cat/oil', first used on line 1; ids name files"]


def test_rows_may_share_an_id_if_their_names_differ():
    rows = [{"id": "cat", "sku": "1"}, {"id": "cat", "sku": "2"}]
    assert outcomes(rows, names="{sku}-{id}.{ext}") == ["1-cat", "2-cat"]


def test_styles_with_the_same_output_name_are_refused():
    expected = "two styles of the line have the same output name 'cat'"
    for rows, names in (([{"id": "cat"}], "{id}.{ext}"), ([{"output": "cat"}], None)):
        assert outcomes(rows, names=names, styles=["oil", "noir"]) == ["cat", expected]


ANY = st.text(max_size=30)


@given(ANY, st.none() | ANY, ANY, st.sampled_from([None, "{style}/{a}-{id}.{ext}", "x/{a}.{ext}"]))
def test_no_cells_lead_out_of_the_output(row_id, style, cell, template):
    row = make_row(2, {"id": row_id, "prompt": "x", "output": cell, "a": cell})
    names = [] if isinstance(row, RefusedRow) else [row.name]
    with contextlib.suppress(ValueError):
        names.append(build_path(template, row_id, style, a=cell))
    for name in names:
        path = PurePosixPath("/out", name)
        assert PurePosixPath("/out") in path.parents
        assert not {"..", "", "."} & set(name.split("/"))
        assert all(part[0] not in ".-~" and len(part) <= 200 for part in name.split("/"))
        assert name.isascii()
        assert name.split("/")[0].casefold() not in ("_ledger", "failed.csv")
