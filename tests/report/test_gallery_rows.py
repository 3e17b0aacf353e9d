"""The rows of a gallery are held as columns of text, and come out as they went in."""

import json

import pytest

from prefect_flux_kontext.report.gallery.page import Column, GalleryRows
from prefect_flux_kontext.report.thumbnails import name_of_image, name_of_reference
from tests.support.galleries import failed, line


def unpacked(column):
    told = json.loads(column.to_json())
    return (
        [told["values"][index] for index in told["indexes"]]
        if "indexes" in told
        else told["values"]
    )


@pytest.mark.parametrize(
    "values",
    [
        [],
        [None],
        ["a", "a", "a", "b", None],
        ["a\nb", "a\u2028b", "a\u0085b", '"\\"', "ä😀", "\x1c"],
        [1, 1.5, True, None, "1", ["x", "y"], []],
    ],
)
def test_a_column_gives_back_whatever_it_was_given(values):
    column = Column()
    for value in values:
        column.add(value)
    assert list(column) == unpacked(column) == values


def test_a_value_that_is_often_the_same_is_written_once():
    column = Column()
    for _ in range(10):
        column.add("the same prompt")
    assert column.to_json().count("the same prompt") == 1


def test_own_columns_that_come_late_or_end_early_are_empty_elsewhere():
    rows = GalleryRows()
    for added in (line(0, sku="7"), line(1, manifest_cost_usd="9"), failed(2, sku="8")):
        rows.add(added)
    assert {name: list(column) for name, column in rows.custom.items()} == {
        "sku": ["7", None, "8"],
        "cost_usd": [None, "9", None],
    }
    assert list(rows.columns["state"]) == ["stored", "stored", "failed"]
    assert len(rows) == 3


def test_only_stored_rows_have_a_picture_and_rows_without_reference_none_before():
    rows = GalleryRows()
    for added in (line(0), failed(1), line(2, reference_images=None)):
        rows.add(added)
    of = name_of_image(line(0)["key"]), None, name_of_image(line(2)["key"])
    assert tuple(rows.after) == of
    assert list(rows.before) == [
        name_of_reference("https://example.com/0.jpg"),
        name_of_reference("https://example.com/1.jpg"),
        None,
    ]
