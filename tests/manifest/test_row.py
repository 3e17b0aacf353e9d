"""A line of a manifest becomes a valid row, or is refused with its reasons."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_flux_kontext.manifest.row import (
    RefusedRow,
    Row,
    RowDefaults,
    find_reference_problems,
    make_row,
)
from prefect_flux_kontext.references.rights import Rights

URL = "http://references.test/cat.jpg"


def reason(prompt=None, **cells):
    row = make_row(7, cells, RowDefaults(prompt=prompt))
    assert isinstance(row, RefusedRow)
    assert row.line == 7
    return row.reason


def test_default_prompt_fills_in_for_rows_without_one():
    own = make_row(2, {"image": URL, "prompt": "oil"}, RowDefaults(prompt="pencil"))
    none = make_row(2, {"image": URL, "prompt": "  "}, RowDefaults(prompt="pencil"))
    assert (own.request.prompt, none.request.prompt) == ("oil", "pencil")


def test_prompt_alone_is_text_to_image():
    row = make_row(2, {"prompt": "a lighthouse"})
    assert row.request.image_urls == []


def test_empty_reference_is_not_paid_as_text_to_image():
    assert reason(prompt="as watercolour", id="cat", image="") == (
        "the row has neither an image nor a prompt of its own; add one of them"
    )


def test_empty_cells_take_the_defaults():
    row = make_row(2, {"image": URL, "prompt": "x", "mode": "", "aspect_ratio": " "})
    assert (row.request.mode, row.request.aspect_ratio) == ("pro", "match")
    row = make_row(2, {"prompt": "x", "aspect_ratio": " "})
    assert row.request.aspect_ratio == "16:9"


def test_match_of_a_row_without_a_reference_is_refused():
    row = make_row(2, {"prompt": "x", "aspect_ratio": "match"})
    assert row.reason == "aspect_ratio 'match' needs a reference image"


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ({}, "prompt is missing; give the row one, or set a prompt for all rows"),
        ({"prompt": "x" * 10_001}, "prompt 'xxx"),
        ({"prompt": "x", "mode": "turbo"}, "mode 'turbo': Input should be 'pro' or 'max'"),
        (
            {"prompt": "x", "aspect_ratio": "2:1"},
            "aspect_ratio '2:1': Input should be 'match', '21:9'",
        ),
        ({"prompt": "x", "output_format": "gif"}, "output_format 'gif'"),
        ({"prompt": "x", "provider": "best"}, "provider 'best'"),
    ],
)
def test_invalid_value_is_refused_with_allowed_values(cells, expected):
    assert reason(image=URL, **cells).startswith(expected)
    assert len(reason(image=URL, **cells)) < 300


def test_every_problem_of_a_row_is_listed():
    expected = reason(image="gist://cat.jpg", mode="turbo")
    assert expected.count(";") >= 2
    for word in ("cat.jpg", "mode", "prompt"):
        assert word in expected


@pytest.mark.parametrize(
    "image",
    [
        "C:\\cat.jpg",
        "gist://1/cat.jpg",
        "github://a:b@c/cat.jpg",
        "hf://a/cat.jpg",
        "zip://cat.jpg::s3://bucket/a.zip",
        "ftp://a.test/cat.jpg",
        "data:image/png;base64,AAAA",
        "http://",
        "http:///cat.jpg",
        "https:cat.jpg",
        "//a.test/cat.jpg",
        "http://[::1",
        "http://[not-an-address]/x",
    ],
)
def test_unsupported_reference_is_refused(image):
    expected = reason(image=image, prompt="x")
    shown = image.replace("a:b@", "")
    assert f"image {shown!r} is not an http or https URL" in expected
    assert "nor a local file, so the service cannot fetch it" in expected


@pytest.mark.parametrize("image", ["cat.jpg", "/etc/passwd", "file:///etc/passwd", "memory://x"])
def test_local_file_needs_a_local_manifest(image):
    assert f"image {image!r} is a local file, and the manifest is not" in reason(
        image=image, prompt="x"
    )
    assert isinstance(
        make_row(2, {"image": image, "prompt": "x"}, RowDefaults(rights=Rights("/data"))), Row
    )


def test_relative_path_becomes_absolute_in_the_cells():
    row = make_row(2, {"image": "a/cat.jpg", "prompt": "x"}, RowDefaults(rights=Rights("/data")))
    assert row.request.image_urls == ["/data/a/cat.jpg"]
    assert row.cells["image"] == "/data/a/cat.jpg"
    several = make_row(
        2, {"images": f"{URL} file://cat.jpg", "prompt": "x"}, RowDefaults(rights=Rights("/data"))
    )
    assert json.loads(several.cells["images"]) == [URL, "/data/cat.jpg"]
    # Otherwise moving the manifest to another folder would rename its images.
    assert (
        row.id
        == make_row(
            2, {"image": "a/cat.jpg", "prompt": "x"}, RowDefaults(rights=Rights("/other"))
        ).id
    )


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ("http://a.test/x\r\ny.jpg", "contains an invisible character"),
        ("http://me:word@a.test/x.jpg", "image at a.test has a user name or password"),
        ("http://169.254.169.254/latest", "is at a link-local address"),
    ],
)
def test_unsafe_reference_is_refused(image, expected):
    (problem,) = find_reference_problems(image)
    assert expected in problem
    assert "word@" not in problem


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a\0b", "an invisible character"),
        ("a\nb", "an invisible character"),
        ("a\u202egpj.exe", "an invisible character"),
        ("../../etc/passwd", "leads out of the output"),
        ("a/../../b", "leads out of the output"),
        ("/etc/passwd", "is an absolute path"),
        ("C:\\temp", "is an absolute path"),
        ("CON", "is reserved on Windows"),
        ("x" * 5_000, "id has 5,000 characters"),
    ],
)
def test_id_that_cannot_name_a_file_is_refused(given, expected):
    assert expected in reason(id=given, prompt="x")


@pytest.mark.parametrize("text", [f'["{URL}"]', URL])
def test_column_images_may_hold_one_reference(text):
    assert make_row(2, {"images": text, "prompt": "x"}).request.image_urls == [URL]


@pytest.mark.parametrize("text", [f'["{URL}", "http://a.test/b.png"]', f"{URL}  {URL}"])
def test_row_with_several_references_is_refused(text):
    assert reason(images=text, prompt="x") == (
        "the row has 2 reference images and the service takes one; give each image a row of its "
        "own"
    )


@pytest.mark.parametrize("text", ["[", '["a"', "[1]", "[" * 100_000])
def test_invalid_list_of_references_is_refused(text):
    assert "JSON list" in reason(images=text, prompt="x")


def test_image_and_images_together_are_refused():
    assert "both `image` and `images`" in reason(image=URL, images=URL, prompt="x")


@pytest.mark.parametrize("image", [URL, "HTTPS://a.test/x%20y.png", "http://[::1]:80/x?sig=1#f"])
def test_public_reference_is_accepted(image):
    assert find_reference_problems(image) == []


@given(st.dictionaries(st.sampled_from(["id", "image", "prompt", "mode", "other"]), st.text()))
def test_no_cells_make_a_row_raise(cells):
    row = make_row(2, cells, RowDefaults(prompt="x"))
    assert isinstance(row, Row | RefusedRow)
    assert row.id


@pytest.mark.parametrize("escape", ["\\u0000", "\\ud800"])
def test_escaped_characters_of_a_list_are_refused(escape):
    """The cell is fine as text, and the reference in its JSON list is not."""
    row = make_row(
        1,
        {"images": f'["a{escape}.jpg"]', "prompt": "oil"},
        RowDefaults(rights=Rights("/", ("/a",))),
    )
    assert isinstance(row, RefusedRow)
    assert row.reason.startswith("images contains ")
