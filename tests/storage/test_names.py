"""No image overwrites another row's image: both are paid for."""

import pytest

from prefect_flux_kontext.errors import StorageError
from prefect_flux_kontext.images.persist import list_image_names, place_stored_images
from prefect_flux_kontext.manifest.row import make_row
from prefect_flux_kontext.storage.filesystem import OutputFolder

pytestmark = pytest.mark.anyio

KEY = "1a2b3c4d5e6f70818293a4b5c6d7e8f9"


@pytest.fixture
def output(tmp_path):
    return OutputFolder(tmp_path)


def test_image_names_start_with_the_preferred_name():
    assert list_image_names("cat", 1, ".jpg", KEY) == ["cat.jpg", "cat~1a2b3c4d.jpg"]
    assert list_image_names("cat", 2, ".jpg", KEY) == ["cat~2.jpg", "cat~1a2b3c4d~2.jpg"]


def test_second_image_never_has_another_rows_name():
    for other in ("cat~2", "cat-2", "cat~1a2b3c4d", "cat~1a2b3c4d~2"):
        for cells in ({"id": other}, {"output": other}, {"id": "x", "output": f"{other}.jpg"}):
            row = make_row(2, {"prompt": "x", **cells})
            theirs = list_image_names(row.name, 1, ".jpg", KEY)
            assert not set(list_image_names("cat", 2, ".jpg", KEY)) & set(theirs)
            assert not set(list_image_names("cat", 1, ".jpg", KEY)) & set(theirs)


def test_image_names_stay_in_their_folder():
    assert list_image_names("cat/oil", 1, ".jpg", KEY) == ["cat/oil.jpg", "cat/oil~1a2b3c4d.jpg"]


async def test_write_unique_keeps_another_rows_image(output, tmp_path):
    names = list_image_names("cat", 1, ".jpg", KEY)
    await output.write("cat.jpg", b"of another prompt")
    assert await output.write_unique(names, b"ours") == output.uri("cat~1a2b3c4d.jpg")
    assert (tmp_path / "cat.jpg").read_bytes() == b"of another prompt"
    assert (tmp_path / "cat~1a2b3c4d.jpg").read_bytes() == b"ours"


async def test_write_unique_reuses_the_name_of_equal_bytes(output, tmp_path):
    names = list_image_names("cat", 1, ".jpg", KEY)
    for _ in range(2):
        assert await output.write_unique(names, b"ours") == output.uri("cat.jpg")
    assert [path.name for path in tmp_path.iterdir()] == ["cat.jpg"]


async def test_equal_row_gets_a_copy_under_its_own_name(output, tmp_path):
    await output.write("cat.jpg", b"picture")
    uris = await place_stored_images(["cat.jpg"], output, name="tiger", key=KEY)
    assert uris == [output.uri("tiger.jpg")]
    assert (tmp_path / "tiger.jpg").read_bytes() == b"picture"
    assert await place_stored_images(["cat.jpg"], output, name="cat", key=KEY) == [
        output.uri("cat.jpg")
    ]


async def test_missing_stored_image_is_a_storage_error(output):
    with pytest.raises(StorageError, match="missing"):
        await place_stored_images(["cat.jpg"], output, name="tiger", key=KEY)
