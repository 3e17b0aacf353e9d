"""Images that are small and take long to decode are refused before they are decoded."""

import io
import struct
import time
import zlib

import pytest
from PIL import Image

from prefect_flux_kontext.errors import InvalidImageError, ReferenceImageError
from prefect_flux_kontext.images.decode import inspect_image
from prefect_flux_kontext.images.headers import find_slow_structure
from prefect_flux_kontext.references.validation import check_can_shrink, check_image
from prefect_flux_kontext.report.thumbnails import make_thumbnail
from tests.support.pictures import animation, picture


def many_scans(number, size=(3_000, 3_000)):
    """A progressive JPEG whose last scan is repeated."""
    file = io.BytesIO()
    Image.new("L", size).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    scan = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + scan * number + b"\xff\xd9"


def many_segments(number):
    data = picture("jpeg")
    return data[:2] + b"\xff\xfe\x00\x02" * number + data[2:]


def many_chunks(number):
    data = picture("png")
    empty = struct.pack(">I", 0) + b"tEXt" + struct.pack(">I", zlib.crc32(b"tEXt"))
    return data[:33] + empty * number + data[33:]


SLOW = {
    "scans": many_scans(2_000),
    "segments": many_segments(200_000),
    "chunks": many_chunks(200_000),
}


@pytest.mark.parametrize("kind", SLOW)
def test_slow_image_is_refused_without_decoding(kind):
    data = SLOW[kind]
    began = time.process_time()
    with pytest.raises(InvalidImageError, match="would take long to decode"):
        inspect_image(data)
    with pytest.raises(ReferenceImageError, match="would take long to decode"):
        check_image(data, fit=True)
    with pytest.raises(ValueError, match="it has more than"):
        make_thumbnail(data, 64)
    assert time.process_time() - began < 1


def test_slow_photo_is_not_shrunk():
    data = many_scans(200, size=(9_000, 9_000))
    with pytest.raises(ReferenceImageError, match="would take long to decode"):
        check_can_shrink(data, "is large")


@pytest.mark.parametrize(
    "data",
    [
        picture("jpeg"),
        picture("jpeg", progressive=True, quality=100),
        picture("jpeg", "CMYK", progressive=True),
        picture("png", size=(1_200, 900)),
        picture("webp", lossless=True),
        animation("webp"),
        animation("png"),
        many_scans(80, size=(64, 64)),
        # Bytes that look like scans, in a segment of its own.
        picture("jpeg", exif=b"Exif\0\0" + b"\xff\xda" * 20_000),
    ],
    ids=range(9),
)
def test_usual_structure_is_not_slow(data):
    assert find_slow_structure(data) is None


@pytest.mark.parametrize("cut", [2, 3, 4, 20, 200])
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_truncated_image_has_no_slow_structure(kind, cut):
    assert find_slow_structure(picture(kind)[:cut]) is None
