"""Only whole images of the supported formats are accepted, by their bytes."""

import tracemalloc

import pytest
from PIL.PngImagePlugin import PngInfo

from prefect_flux_kontext.errors import InvalidImageError
from prefect_flux_kontext.images.decode import MAX_PIXELS, ImageInfo, inspect_image
from tests.support.pictures import animation, picture, png_that_claims

CUTS = 35

INVALID = {
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
    "JPEG start alone": b"\xff\xd8\xff\xe0",
    "JPEG start and end alone": b"\xff\xd8\xff\xd9",
    "PNG signature alone": b"\x89PNG\r\n\x1a\n",
    "RIFF that is not a WebP": b"RIFF\x24\x00\x00\x00WAVEfmt " + bytes(24),
}


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_whole_images_are_accepted_by_their_content(kind):
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
def test_unusual_images_are_accepted(data, kind):
    assert inspect_image(data) == ImageInfo(format=kind, width=96, height=72)


LARGE_METADATA = {
    "compressed text": {"text": "x" * 1_600_000, "zip": True},
    "plain text": {"text": "x" * 1_600_000, "zip": False},
    "many texts": {"text": "x" * 900_000, "zip": True, "times": 80},
}


@pytest.mark.parametrize("metadata", LARGE_METADATA.values(), ids=LARGE_METADATA)
def test_png_with_large_text_is_accepted(metadata):
    info = PngInfo()
    for number in range(metadata.get("times", 1)):
        info.add_itxt(f"workflow{number}", metadata["text"], zip=metadata["zip"])
    data = picture("png", pnginfo=info)
    assert inspect_image(data) == ImageInfo(format="png", width=96, height=72)
    with pytest.raises(InvalidImageError):
        inspect_image(data[: len(data) - 2_000])


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_image_with_large_colour_profile_is_accepted(kind):
    data = picture(kind, icc_profile=bytes(1_600_000))
    assert inspect_image(data).format == kind


AROUND = {
    "a line end after": (b"", b"\r\n"),
    "text after": (b"", b"<!-- served by a proxy -->"),
    "zeros after": (b"", bytes(4_096)),
    "an archive after": (b"", b"PK\x03\x04" + bytes(range(256)) * 9),
    "another image after": (b"", picture("jpeg")),
    "half an image after": (b"", picture("png")[:900]),
    "a line end before": (b"\r\n", b""),
    "a byte order mark before": (b"\xef\xbb\xbf", b""),
    "zeros before": (bytes(16), b""),
    "both": (b"\n", b"\n\n--boundary--"),
}


@pytest.mark.parametrize(("before", "after"), AROUND.values(), ids=AROUND)
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_image_ends_where_its_format_says(kind, before, after):
    data = picture(kind)
    assert inspect_image(before + data + after) == ImageInfo(format=kind, width=96, height=72)
    with pytest.raises(InvalidImageError):
        inspect_image(before + data[: len(data) // 2])


@pytest.mark.parametrize("data", INVALID.values(), ids=INVALID)
def test_other_data_is_rejected_with_its_first_bytes(data):
    with pytest.raises(InvalidImageError) as caught:
        inspect_image(data)
    assert repr(data[:16]) in caught.value.message
    assert "0x" not in caught.value.message.replace("\\x", "")


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_image_cut_anywhere_is_rejected(kind):
    data = picture(kind)
    step = len(data) // CUTS
    cuts = [*range(0, len(data) - 1, step), *range(len(data) - 10, len(data))]
    assert len(cuts) >= CUTS
    for cut in cuts:
        with pytest.raises(InvalidImageError):
            inspect_image(data[:cut])


@pytest.mark.parametrize("kind", ["png", "webp", "mpo"])
def test_animation_cut_in_a_later_frame_is_rejected(kind):
    data = animation(kind)
    for cut in range(len(data) // 2, len(data), len(data) // 2 // CUTS):
        with pytest.raises(InvalidImageError):
            inspect_image(data[:cut])


@pytest.mark.parametrize("side", [8_001, 9_000, 20_000, 65_500])
def test_bomb_is_rejected_without_decoding(side):
    bomb = png_that_claims(side, side)
    assert side * side > MAX_PIXELS
    tracemalloc.start()
    try:
        with pytest.raises(InvalidImageError, match=r"pixels"):
            inspect_image(bomb)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
