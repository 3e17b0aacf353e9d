"""Every image's name is known at plan time, stays in the output and is no other image's."""

import contextlib
from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_flux_kontext.batch.runner import FAILED_ROWS
from prefect_flux_kontext.errors import ConfigurationError
from prefect_flux_kontext.ledger.store import LEDGER_FOLDER
from prefect_flux_kontext.manifest.output_paths import output_path, parse_path_template
from prefect_flux_kontext.manifest.reader import Manifest
from prefect_flux_kontext.manifest.row import RefusedRow, make_row
from prefect_flux_kontext.storage.names import find_name_problem


def named(template=None, row_id="cat", style=None, **cells):
    names = None if template is None else parse_path_template(template)
    return output_path(row_id, style, cells, names, "jpeg")


def problem(template=None, **given):
    with pytest.raises(ValueError, match=r".") as caught:
        named(template, **given)
    return str(caught.value)


def output(text, **cells):
    return make_row(2, {"prompt": "x", "output": text, **cells})


def reasons(rows, **given):
    made = Manifest([{"prompt": "x", **row} for row in rows], **given).rows()
    return [row.reason if isinstance(row, RefusedRow) else row.name for row in made]


def test_an_image_is_named_by_its_id_and_lies_in_a_folder_with_a_style():
    assert named() == "cat"
    assert named(style="oil") == "cat/oil"


def test_an_id_that_is_a_relative_path_keeps_its_folders():
    assert named(row_id="2024/spring/cat") == "2024/spring/cat"
    assert named(row_id="2024/a cat", style="oil").startswith("2024/a-cat~")
    for odd in ("a//b", "a/", "./a", "a\\b", "a/./b"):
        assert "/" not in named(row_id=odd)


def test_a_template_puts_ids_styles_and_columns_in_their_places_and_makes_them_safe():
    assert named("{style}/{sku}-{id}.{ext}", style="oil", sku="A 1").startswith("oil/A-1~")
    assert named("all/{sku}.{ext}", sku="../../x") == f"all/{named('{sku}.{ext}', sku='../../x')}"
    assert named("{photo title}.{ext}", **{"photo title": "cat"}) == "cat"
    assert named("{sku}_{sku}.{ext}", sku="7") == "7_7"


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{id}", "it does not end in `.{ext}`"),
        ("{id}.jpg", "it does not end in `.{ext}`"),
        ("{id}.{ext}.gz", "it does not end in `.{ext}`"),
        ("{ext}/{id}.{ext}", "`{ext}` stands before its end"),
        ("{id.__class__}.{ext}", "`{id.__class__}` is not a column alone"),
        ("{id[0]}.{ext}", "`{id[0]}` is not a column alone"),
        ("{id!r}.{ext}", "`{id!r}` is not a column alone"),
        ("{id:>99999999}.{ext}", "`{id:>99999999}` is not a column alone"),
        ("{}.{ext}", "`{}` is not a column alone"),
        ("{0}.{ext}", "`{0}` is not a column alone"),
        ("{id.{ext}", "expected '}'"),
        ("id}.{ext}", "Single '}'"),
        ("{{id}}.{ext}", "outside of its columns"),
        ("my {id}.{ext}", "outside of its columns"),
        ("a\\{id}.{ext}", "outside of its columns"),
        ("/{id}.{ext}", "a part between slashes is empty"),
        ("a//{id}.{ext}", "a part between slashes is empty"),
        ("../{id}.{ext}", "a part between slashes is empty"),
        ("a/.{id}.{ext}", "begins with a dot"),
        (".{ext}", "a part between slashes is empty"),
        ("CON/{id}.{ext}", "reserved on Windows"),
        ("_ledger/{id}.{ext}", "reserved for the batch's own _ledger"),
        ("all.jpg/{id}.{ext}", "a folder 'all.jpg' that is named like an image"),
        ("x" * 300 + "{id}.{ext}", "a name has at most 400, and 200 between slashes"),
    ],
)
def test_a_template_that_cannot_name_images_is_refused_before_the_first_row(template, told):
    with pytest.raises(ConfigurationError) as caught:
        list(Manifest([{"prompt": "x"}], names=template).rows())
    assert told in caught.value.message
    assert "They are like `{id}/{style}.{ext}`" in caught.value.message
    assert len(caught.value.message) < 600


def test_a_row_without_what_the_template_names_is_refused_with_what_there_is():
    assert problem("{sku}/{id}.{ext}", colour="red") == (
        "the output names need a column 'sku'; there are colour"
    )
    assert "the column 'sku' is empty" in problem("{sku}/{id}.{ext}", sku=" ")
    assert "the row has no style" in problem("{style}/{id}.{ext}")


@pytest.mark.parametrize(
    ("template", "cells", "told"),
    [
        ("{a}N.{ext}", {"a": "CO"}, "'CON', which is reserved"),
        ("{a}/{id}.{ext}", {"a": "x.jpg"}, "'x.jpg' that is named like an image"),
        ("{a}{a}{a}.{ext}", {"a": "x y" * 50}, "a name has at most 400"),
        ("{a}/{id}.{ext}", {"a": "_ledger"}, "the batch's own _ledger"),
        ("{a}/{id}.{ext}", {"a": "_LEDGER"}, "the batch's own _LEDGER"),
    ],
)
def test_what_comes_out_of_a_template_is_looked_at_again(template, cells, told):
    assert told in problem(template, **cells)


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
def test_a_row_may_name_its_image_itself_with_or_without_extension(given, name):
    assert output(given, id="cat").name == name


def test_a_name_that_is_not_plain_is_made_safe():
    assert output("a photo/Ünder.jpg").name.startswith("a-photo~")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("../../etc/passwd", "leads out of the output"),
        ("a/../../b", "leads out of the output"),
        ("/etc/passwd", "is an absolute path"),
        ("C:\\temp\\x", "is an absolute path"),
        ("s3://bucket/x", "is a URL"),
        ("a\\b", "holds a backslash"),
        ("a//b", "has a part that is empty"),
        ("a/", "has a part that is empty"),
        ("./a", "has a part that is empty"),
        (".jpg", "has a part that is empty"),
        ("a\x07b", "cannot be seen"),
        ("a\u202egpj", "cannot be seen"),
        ("x" * 81, "more than 80 characters"),
        ("/".join(["x" * 70] * 7), "a name has at most 400"),
        ("CON", "reserved on Windows"),
        ("a/nul.jpg", "reserved on Windows"),
        ("_ledger/rows/x", "the batch's own _ledger"),
        ("failed.csv", "the batch's own failed.csv"),
        ("Failed.CSV", "the batch's own Failed.CSV"),
        ("a.jpg/b", "named like an image"),
        ("hero.png", "is not jpeg, which the row's output_format is"),
        ("hero.webp", "is not jpeg, which the row's output_format is"),
    ],
)
def test_a_name_that_cannot_be_the_images_is_refused_with_the_reason(given, told):
    row = output(given)
    assert isinstance(row, RefusedRow)
    assert told in row.reason
    assert f"output {given!r:.80}" in row.reason


def test_a_png_is_named_png_where_the_row_is_one():
    assert output("hero.png", output_format="png").name == "hero"


def test_the_batchs_own_files_are_those_that_no_image_takes():
    for own in (LEDGER_FOLDER, FAILED_ROWS):
        assert find_name_problem(own)
        assert find_name_problem(f"{own}/x")


def test_equal_names_are_found_over_ids_styles_and_outputs():
    assert reasons([{"id": "cat"}, {"id": "dog", "output": "CAT.jpg"}, {"id": "Cat"}]) == [
        "cat",
        "output name 'CAT' is that of line 1 already",
        "id 'Cat' is on line 1 already; ids name files",
    ]
    assert reasons(
        [{"id": "cat", "style": "oil"}, {"id": "cat", "style": "noir"}, {"id": "cat/oil"}]
    ) == ["cat/oil", "cat/noir", "id 'cat/oil' is on line 1 already; ids name files"]


def test_two_rows_may_share_an_id_when_their_names_differ():
    rows = [{"id": "cat", "sku": "1"}, {"id": "cat", "sku": "2"}]
    assert reasons(rows, names="{sku}-{id}.{ext}") == ["1-cat", "2-cat"]


def test_two_styles_of_a_line_under_one_name_are_told_as_such():
    told = "two styles of the line have one output name, 'cat'"
    for rows, names in (([{"id": "cat"}], "{id}.{ext}"), ([{"output": "cat"}], None)):
        assert reasons(rows, names=names, styles=["oil", "noir"]) == ["cat", told]


ANY = st.text(max_size=30)


@given(ANY, st.none() | ANY, ANY, st.sampled_from([None, "{style}/{a}-{id}.{ext}", "x/{a}.{ext}"]))
def test_no_cells_whatsoever_lead_out_of_the_output(row_id, style, cell, template):
    row = make_row(2, {"id": row_id, "prompt": "x", "output": cell, "a": cell}, names=None)
    names = [] if isinstance(row, RefusedRow) else [row.name]
    with contextlib.suppress(ValueError):
        names.append(named(template, row_id, style, a=cell))
    for name in names:
        path = PurePosixPath("/out", name)
        assert PurePosixPath("/out") in path.parents
        assert not {"..", "", "."} & set(name.split("/"))
        assert all(part[0] not in ".-~" and len(part) <= 200 for part in name.split("/"))
        assert name.isascii()
        assert name.split("/")[0].casefold() not in ("_ledger", "failed.csv")
