"""An image ends where its format says, whatever its metadata and whatever follows it."""

import io
import zlib

import pytest
from PIL import Image, PngImagePlugin

from prefect_flux_kontext.errors import InvalidImageError
from prefect_flux_kontext.images.decode import decode_image, inspect_image
from prefect_flux_kontext.references.validation import check_image, shrink_to_fit
from tests.support.pictures import picture

KINDS = ["jpeg", "png", "webp"]


def png_with_text(**how):
    info = PngImagePlugin.PngInfo()
    info.add_itxt("workflow", "node " * 330_000, **how)
    return picture("png", pnginfo=info)


def jpeg_with_thumbnail():
    thumbnail = picture("jpeg", size=(32, 24))
    return picture("jpeg", exif=b"Exif\0\0" + b"II*\0\x08\0\0\0\0\0\0\0\0\0" + thumbnail)


LARGE_METADATA = {
    "PNG with packed text": png_with_text(zip=True),
    "PNG with plain text": png_with_text(),
    "PNG with a large profile": picture("png", icc_profile=bytes(3_000_000)),
    "JPEG with a large profile": picture("jpeg", icc_profile=bytes(3_000_000)),
    "JPEG with a thumbnail": jpeg_with_thumbnail(),
    "JPEG with an unreadable EXIF": picture("jpeg", exif=b"Exif\0\0broken"),
    "WebP with a large profile": picture("webp", icc_profile=bytes(3_000_000)),
}

TRAILERS = {
    "text": b"\n<!-- served by cache 7 -->\n",
    "zeros": bytes(5_000),
    "a video": b"\0\0\0\x18ftypmp42" + bytes(range(256)) * 40,
    "an archive": b"PK\x03\x04" + b"archive" * 100,
    "a marker": b"\xff\xd8\xff",
}


@pytest.mark.parametrize("data", LARGE_METADATA.values(), ids=LARGE_METADATA)
def test_large_metadata_is_accepted(data):
    info = inspect_image(data)
    assert (info.width, info.height) == (96, 72)
    check_image(data, fit=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trailer", TRAILERS.values(), ids=TRAILERS)
def test_bytes_after_the_image_are_ignored(kind, trailer):
    assert inspect_image(picture(kind) + trailer).format == kind


@pytest.mark.parametrize("data", LARGE_METADATA.values(), ids=LARGE_METADATA)
def test_image_cut_after_large_metadata_is_rejected(data):
    for missing in (1, 100, 2_000):
        with pytest.raises(InvalidImageError):
            inspect_image(data[:-missing])


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
def test_cut_jpeg_with_a_thumbnail_is_rejected(mode):
    data = jpeg_with_thumbnail()
    half = data[: len(data) // 2]
    with pytest.raises(InvalidImageError):
        inspect_image(half + b"\xff\xd9"[: 0 if mode == "L" else 1])


def test_png_with_large_metadata_can_be_shrunk():
    info = PngImagePlugin.PngInfo()
    info.add_itxt("workflow", "node " * 330_000, zip=True)
    data = picture("png", size=(1_200, 900), pnginfo=info)
    small = shrink_to_fit(data, 1_000_000)
    assert len(small) <= 1_000_000


def test_profile_and_transparency_of_a_png_are_kept():
    profile = zlib.compress(b"profile")
    image = Image.new("RGB", (4, 4), "red")
    file = io.BytesIO()
    image.save(file, "png", icc_profile=profile, transparency=(255, 0, 0))
    _, decoded = decode_image(file.getvalue())
    assert decoded.info["icc_profile"] == profile
    assert decoded.info["transparency"] == (255, 0, 0)
