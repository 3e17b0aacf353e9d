"""Only complete JPEG, PNG and WebP images pass, judged by their bytes."""

import tracemalloc

import pytest

from prefect_flux_kontext.errors import InvalidImageError
from prefect_flux_kontext.images.decode import MAX_PIXELS, ImageInfo, inspect_image
from tests.support.pictures import animation, picture, png_that_claims

CUTS = 35

NOT_IMAGES = {
    "nothing": b"",
    "one byte": b"\xff",
    "text": b"No image here, the generation failed.",
    "HTML": b"<!DOCTYPE html><html><body>502 Bad Gateway</body></html>",
    "JSON": b'{"code": 403, "message": "expired"}',
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg" width="64" height="64"></svg>',
    "GIF": picture("gif", "L"),
    "BMP": picture("bmp"),
    "TIFF": picture("tiff"),
    "zeros": bytes(4_096),
    "JPEG start marker": b"\xff\xd8\xff\xe0",
    "JPEG start and end markers": b"\xff\xd8\xff\xd9",
    "PNG signature": b"\x89PNG\r\n\x1a\n",
    "RIFF with WAVE": b"RIFF\x24\x00\x00\x00WAVEfmt " + bytes(24),
}


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_inspect_image_accepts_supported_formats(kind):
    expected = ImageInfo(format=kind, width=96, height=72)
    assert inspect_image(picture(kind)) == expected


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (picture("jpeg", "CMYK"), "jpeg"),
        (picture("jpeg", "L"), "jpeg"),
        (picture("jpeg", progressive=True), "jpeg"),
        (picture("jpeg") + b"\r\n", "jpeg"),
        (animation("mpo"), "jpeg"),
        (picture("png", "I;16"), "png"),
        (picture("png", "P"), "png"),
        (picture("png", "RGBA"), "png"),
        (animation("png"), "png"),
        (picture("webp", "RGBA", lossless=True), "webp"),
        (animation("webp"), "webp"),
    ],
    ids=[
        "CMYK JPEG",
        "grey JPEG",
        "progressive JPEG",
        "JPEG with a line end after it",
        "JPEG with a second picture",
        "16-bit PNG",
        "PNG with a palette",
        "PNG with alpha",
        "animated PNG",
        "lossless WebP",
        "animated WebP",
    ],
)
def test_inspect_image_accepts_unusual_variants(data, kind):
    assert inspect_image(data) == ImageInfo(format=kind, width=96, height=72)


@pytest.mark.parametrize("data", NOT_IMAGES.values(), ids=NOT_IMAGES)
def test_error_for_other_content_shows_the_first_bytes(data):
    with pytest.raises(InvalidImageError) as caught:
        inspect_image(data)
    assert repr(data[:16]) in caught.value.message
    assert "0x" not in caught.value.message.replace("\\x", "")


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_image_truncated_anywhere_is_refused(kind):
    data = picture(kind)
    step = len(data) // CUTS
    cuts = [*range(0, len(data) - 1, step), *range(len(data) - 10, len(data))]
    assert len(cuts) >= CUTS
    for cut in cuts:
        with pytest.raises(InvalidImageError):
            inspect_image(data[:cut])


@pytest.mark.parametrize("kind", ["png", "webp", "mpo"])
def test_animation_truncated_in_a_later_frame_is_refused(kind):
    data = animation(kind)
    for cut in range(len(data) // 2, len(data), len(data) // 2 // CUTS):
        with pytest.raises(InvalidImageError):
            inspect_image(data[:cut])


@pytest.mark.parametrize("side", [8_001, 9_000, 20_000, 65_500])
def test_image_with_too_many_pixels_is_not_decoded(side):
    bomb = png_that_claims(side, side)
    assert side * side > MAX_PIXELS
    tracemalloc.start()
    try:
        with pytest.raises(InvalidImageError, match=r"pixels"):
            inspect_image(bomb)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
