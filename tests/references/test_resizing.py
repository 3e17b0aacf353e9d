"""An image that is too large is shrunk to what the service takes, the same way each time."""

import io

import pytest
from PIL import Image

from prefect_flux_kontext.errors import ReferenceImageError
from prefect_flux_kontext.references.resizing import shrink_to_fit
from tests.references.test_validation import jpeg_that_claims
from tests.support.pictures import picture, png_that_claims


def opened(data):
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def encoded(image, kind="png", **how):
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def test_the_same_image_gives_the_same_bytes():
    data = picture("png", size=(900, 600))
    assert shrink_to_fit(data, 500_000) == shrink_to_fit(data, 500_000)


def test_quality_goes_first_and_then_size():
    data = picture("png", size=(2_200, 1_500))
    large, small = shrink_to_fit(data, 4_000_000), shrink_to_fit(data, 300_000)
    assert opened(large).size == (2_200, 1_500)
    assert len(large) <= 4_000_000
    assert opened(small).size == (1_024, 698)
    assert len(small) <= 300_000


def test_the_long_edge_is_4096_pixels_at_most():
    data = encoded(Image.new("RGB", (9_000, 300), "teal"), "jpeg")
    assert opened(shrink_to_fit(data, 10_000_000)).size[0] == 4_096


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_it_is_upright_and_says_nothing_of_its_orientation(kind):
    image = Image.new("RGB", (60, 40), "red")
    image.paste("blue", (0, 0, 30, 40))
    exif = Image.Exif()
    exif[274] = 6
    told = opened(shrink_to_fit(encoded(image, kind, exif=exif), 10_000_000))
    assert told.size == (40, 60)
    assert not told.getexif()
    red, _, blue = told.getpixel((20, 10))
    assert blue > red + 150


def test_transparency_and_colour_profile_are_kept():
    image = Image.new("RGBA", (60, 40), (255, 0, 0, 0))
    told = opened(shrink_to_fit(encoded(image), 10_000_000))
    assert (told.format, told.mode) == ("WEBP", "RGBA")
    assert told.getpixel((5, 5))[3] == 0
    profiled = encoded(Image.new("RGB", (60, 40)), icc_profile=b"a profile")
    assert opened(shrink_to_fit(profiled, 10_000_000)).info["icc_profile"] == b"a profile"


def test_16_bits_of_grey_keep_their_range():
    image = Image.frombytes("I;16", (256, 1), b"".join(bytes([0, n]) for n in range(256)))
    told = opened(shrink_to_fit(encoded(image.resize((256, 16))), 10_000_000)).convert("L")
    assert told.getpixel((2, 8)) < 20
    assert told.getpixel((253, 8)) > 235


@pytest.mark.parametrize("mode", ["CMYK", "L"])
def test_other_colours_become_plain_ones(mode):
    assert opened(shrink_to_fit(picture("jpeg", mode), 10_000_000)).mode == "RGB"


@pytest.mark.parametrize(
    "data",
    [
        picture()[:-1_000],
        jpeg_that_claims(20_000, 20_000),
        png_that_claims(9_000, 9_000),
        b"\xff\xd8",
        b"x",
    ],
    ids=["cut off", "a bomb of a JPEG", "a large PNG", "a mere start", "no image"],
)
def test_what_cannot_be_decoded_is_refused(data):
    with pytest.raises(ReferenceImageError):
        shrink_to_fit(data, 10_000_000)
