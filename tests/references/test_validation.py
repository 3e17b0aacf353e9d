"""Images that the service would not take are refused; no decompression bomb is decoded."""

import io

import pytest
from PIL import Image

from prefect_flux_kontext.errors import ReferenceImageError
from prefect_flux_kontext.images.headers import read_format, read_size
from prefect_flux_kontext.references import validation
from prefect_flux_kontext.references.validation import check_image, needs_shrinking
from tests.support.pictures import animation, picture, png_that_claims

KINDS = [
    ("jpeg", "RGB", {}),
    ("jpeg", "L", {"progressive": True}),
    ("jpeg", "CMYK", {}),
    ("png", "RGBA", {}),
    ("png", "P", {}),
    ("webp", "RGB", {}),
    ("webp", "RGB", {"lossless": True}),
    ("webp", "RGBA", {}),
]


def jpeg_that_claims(width, height):
    data = bytearray(picture(size=(400, 300)))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    return bytes(data)


def webp_that_claims(width, height):
    data = bytearray(animation())
    at = data.index(b"VP8X")
    data[at + 12 : at + 15] = (width - 1).to_bytes(3, "little")
    data[at + 15 : at + 18] = (height - 1).to_bytes(3, "little")
    return bytes(data)


def problem(data, **how):
    with pytest.raises(ReferenceImageError) as caught:
        check_image(data, **{"fit": False, **how})
    return caught.value.message


@pytest.mark.parametrize(("kind", "mode", "how"), KINDS)
def test_check_image_accepts_supported_formats(kind, mode, how):
    data = picture(kind, mode, (97, 73), **how)
    check_image(data, fit=False)
    assert read_size(data) == (97, 73)
    assert read_format(data) == kind
    assert not needs_shrinking(data)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "is an empty file"),
        (b"a cat, in words", "is text by its content; the service takes JPG, PNG and WebP"),
        (b"<svg xmlns='x'/>", "is an SVG"),
        (b"<?xml version='1.0'?>\n<!-- a -->\n<svg/>", "is an SVG"),
        (b"<?xml version='1.0'?><Error/>", "is XML"),
        (b"\n<!DOCTYPE html><p>403", "is a page of HTML"),
        (picture("gif"), "is a GIF"),
        (picture("bmp"), "is a BMP"),
        (picture("tiff"), "is a TIFF"),
        (b"\0\0\0\x18ftypheic\0\0", "is a HEIC"),
        (b"\0\0\0\x18ftypavif\0\0", "is an AVIF"),
        (b"%PDF-1.7", "is a PDF"),
        (b"\0\1\2" * 30, "is not an image by its content"),
        (picture()[:-1_000], "is cut off or damaged"),
        (picture("png")[:-20], "is cut off or damaged"),
        (picture("webp")[:-20], "is cut off or damaged"),
        (b"\xff\xd8", "is not an image"),
        (bytes(11_000_000), "has 11.0 MB; the service takes 10 MB; shrink it, or use --fit-ref"),
        (bytes(10_000_001), "has 10.1 MB"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_check_image_names_the_unsupported_content(data, expected):
    assert expected in problem(data)


def test_message_shows_no_content_of_the_file():
    assert "BEGIN" not in problem(b"-----BEGIN PRIVATE KEY-----")


@pytest.mark.parametrize("claim", [png_that_claims, jpeg_that_claims, webp_that_claims])
@pytest.mark.parametrize("fit", [False, True])
def test_bomb_is_refused_by_its_header(claim, fit, monkeypatch):
    bomb = claim(50_000, 50_000)

    def fail(*_args, **_how):
        raise AssertionError("it was decoded")

    monkeypatch.setattr(validation, "inspect_image", fail)
    monkeypatch.setattr(Image.Image, "load", fail)
    assert "has 50,000 x 50,000 pixels" in problem(bomb, fit=fit)


def test_photo_of_too_many_pixels_is_refused_or_shrunk():
    file = io.BytesIO()
    Image.new("RGB", (12_000, 9_000), "teal").save(file, "jpeg")
    assert "has 12,000 x 9,000 pixels, more than 64,000,000; shrink it" in problem(file.getvalue())
    check_image(file.getvalue(), fit=True)
    assert needs_shrinking(file.getvalue())


def test_file_over_100_mb_is_refused_also_with_fit():
    with pytest.raises(ReferenceImageError, match=r"has 100\.1 MB; at most 100 MB are read"):
        validation.check_size(100_000_001, fit=True)


def test_large_file_that_is_not_an_image_is_refused():
    assert "is not an image" in problem(bytes(11_000_000), fit=True)
