"""No image is written over another row's: both are paid for."""

import pytest

from prefect_flux_kontext.errors import StorageError
from prefect_flux_kontext.images.persist import image_names, place_stored_images
from prefect_flux_kontext.manifest.row import make_row
from prefect_flux_kontext.storage.filesystem import OutputFolder

pytestmark = pytest.mark.anyio

KEY = "1a2b3c4d5e6f70818293a4b5c6d7e8f9"


@pytest.fixture
def output(tmp_path):
    return OutputFolder(tmp_path)


def test_the_wanted_name_comes_first_and_then_one_that_only_this_row_has():
    assert image_names("cat", 1, ".jpg", KEY) == ["cat.jpg", "cat~1a2b3c4d.jpg"]
    assert image_names("cat", 2, ".jpg", KEY) == ["cat~2.jpg", "cat~1a2b3c4d~2.jpg"]
    assert image_names("cat", 1, ".jpg", None) == ["cat.jpg"]


def test_a_second_image_never_has_the_name_of_another_row():
    for other in ("cat~2", "cat-2", "cat~1a2b3c4d", "cat~1a2b3c4d~2"):
        for cells in ({"id": other}, {"output": other}, {"id": "x", "output": f"{other}.jpg"}):
            row = make_row(2, {"prompt": "x", **cells})
            theirs = image_names(row.name, 1, ".jpg", KEY)
            assert not set(image_names("cat", 2, ".jpg", KEY)) & set(theirs)
            assert not set(image_names("cat", 1, ".jpg", KEY)) & set(theirs)


def test_images_in_folders_are_told_apart_in_their_folders():
    assert image_names("cat/oil", 1, ".jpg", KEY) == ["cat/oil.jpg", "cat/oil~1a2b3c4d.jpg"]


async def test_what_another_row_has_stored_stays_as_it_is(output, tmp_path):
    names = image_names("cat", 1, ".jpg", KEY)
    await output.write("cat.jpg", b"of another prompt")
    assert await output.write_unique(names, b"ours") == output.uri("cat~1a2b3c4d.jpg")
    assert (tmp_path / "cat.jpg").read_bytes() == b"of another prompt"
    assert (tmp_path / "cat~1a2b3c4d.jpg").read_bytes() == b"ours"


async def test_writing_the_same_image_again_takes_the_same_place(output, tmp_path):
    names = image_names("cat", 1, ".jpg", KEY)
    for _ in range(2):
        assert await output.write_unique(names, b"ours") == output.uri("cat.jpg")
    assert [path.name for path in tmp_path.iterdir()] == ["cat.jpg"]


async def test_a_row_gets_the_image_of_its_equal_under_its_own_name(output, tmp_path):
    await output.write("cat.jpg", b"picture")
    uris = await place_stored_images(["cat.jpg"], output, name="tiger", key=KEY)
    assert uris == [output.uri("tiger.jpg")]
    assert (tmp_path / "tiger.jpg").read_bytes() == b"picture"
    assert await place_stored_images(["cat.jpg"], output, name="cat", key=KEY) == [
        output.uri("cat.jpg")
    ]


async def test_an_image_that_is_gone_is_said_to_be(output):
    with pytest.raises(StorageError, match="missing"):
        await place_stored_images(["cat.jpg"], output, name="tiger", key=KEY)
