"""Gallery rows are held as columns of text without loss."""

import json

import pytest

from prefect_flux_kontext.report.gallery.page import Column, GalleryRows
from prefect_flux_kontext.report.thumbnails import image_thumbnail_name, reference_thumbnail_name
from tests.support.galleries import failed, line


def decode(column):
    decoded = json.loads(column.to_json())
    return (
        [decoded["values"][index] for index in decoded["indexes"]]
        if "indexes" in decoded
        else decoded["values"]
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
def test_column_round_trips_any_value(values):
    column = Column()
    for value in values:
        column.add(value)
    assert list(column) == decode(column) == values


def test_column_holds_repeated_values_once():
    column = Column()
    for _ in range(10):
        column.add("the same prompt")
    assert column.to_json().count("the same prompt") == 1


def test_custom_columns_are_empty_where_missing():
    rows = GalleryRows()
    for added in (line(0, sku="7"), line(1, manifest_cost_usd="9"), failed(2, sku="8")):
        rows.add(added)
    assert {name: list(column) for name, column in rows.custom.items()} == {
        "sku": ["7", None, "8"],
        "cost_usd": [None, "9", None],
    }
    assert list(rows.columns["state"]) == ["stored", "stored", "failed"]
    assert len(rows) == 3


def test_thumbnails_need_a_stored_image_and_a_reference():
    rows = GalleryRows()
    for added in (line(0), failed(1), line(2, reference_images=None)):
        rows.add(added)
    of = image_thumbnail_name(line(0)["key"]), None, image_thumbnail_name(line(2)["key"])
    assert tuple(rows.after) == of
    assert list(rows.before) == [
        reference_thumbnail_name("https://example.com/0.jpg"),
        reference_thumbnail_name("https://example.com/1.jpg"),
        None,
    ]
