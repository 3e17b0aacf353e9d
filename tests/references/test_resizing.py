"""Images that are too large are shrunk to the limits of the service."""

import io

import pytest
from PIL import Image

from prefect_flux_kontext.errors import ReferenceImageError
from prefect_flux_kontext.references.validation import shrink_to_fit
from tests.references.test_validation import jpeg_that_claims
from tests.support.pictures import picture, png_that_claims


def decode(data):
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def encode(image, kind="png", **how):
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def test_shrink_to_fit_is_deterministic():
    data = picture("png", size=(900, 600))
    assert shrink_to_fit(data, 500_000) == shrink_to_fit(data, 500_000)


def test_shrink_to_fit_lowers_quality_before_size():
    data = picture("png", size=(2_200, 1_500))
    large, small = shrink_to_fit(data, 4_000_000), shrink_to_fit(data, 300_000)
    assert decode(large).size == (2_200, 1_500)
    assert len(large) <= 4_000_000
    assert decode(small).size == (1_024, 698)
    assert len(small) <= 300_000


def test_long_edge_is_at_most_4096_pixels():
    data = encode(Image.new("RGB", (9_000, 300), "teal"), "jpeg")
    assert decode(shrink_to_fit(data, 10_000_000)).size[0] == 4_096


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_result_is_upright_without_exif(kind):
    image = Image.new("RGB", (60, 40), "red")
    image.paste("blue", (0, 0, 30, 40))
    exif = Image.Exif()
    exif[274] = 6
    shrunk = decode(shrink_to_fit(encode(image, kind, exif=exif), 10_000_000))
    assert shrunk.size == (40, 60)
    assert not shrunk.getexif()
    red, _, blue = shrunk.getpixel((20, 10))
    assert blue > red + 150


def test_transparency_and_colour_profile_are_kept():
    image = Image.new("RGBA", (60, 40), (255, 0, 0, 0))
    shrunk = decode(shrink_to_fit(encode(image), 10_000_000))
    assert (shrunk.format, shrunk.mode) == ("WEBP", "RGBA")
    assert shrunk.getpixel((5, 5))[3] == 0
    profiled = encode(Image.new("RGB", (60, 40)), icc_profile=b"a profile")
    assert decode(shrink_to_fit(profiled, 10_000_000)).info["icc_profile"] == b"a profile"


def test_16_bit_grey_keeps_its_range():
    image = Image.frombytes("I;16", (256, 1), b"".join(bytes([0, n]) for n in range(256)))
    shrunk = decode(shrink_to_fit(encode(image.resize((256, 16))), 10_000_000)).convert("L")
    assert shrunk.getpixel((2, 8)) < 20
    assert shrunk.getpixel((253, 8)) > 235


@pytest.mark.parametrize("mode", ["CMYK", "L"])
def test_other_colour_modes_become_rgb(mode):
    assert decode(shrink_to_fit(picture("jpeg", mode), 10_000_000)).mode == "RGB"


@pytest.mark.parametrize(
    "data",
    [
        picture()[:-1_000],
        jpeg_that_claims(20_000, 20_000),
        png_that_claims(9_000, 9_000),
        b"\xff\xd8",
        b"x",
    ],
    ids=["cut off", "JPEG bomb", "large PNG", "JPEG marker only", "no image"],
)
def test_undecodable_data_is_refused(data):
    with pytest.raises(ReferenceImageError):
        shrink_to_fit(data, 10_000_000)
