import io

import pytest
from PIL import Image, ImageChops, ImageStat

from prefect_flux_kontext.sandbox.painting import STYLES, choose_style, paint
from prefect_flux_kontext.sandbox.settings import PHOTOS

PHOTO = (PHOTOS / "motorcycle.webp").read_bytes()


def painted(prompt, reference=PHOTO, ratio="4:3", edge=160):
    content = paint(
        reference,
        prompt,
        choose_style(prompt),
        aspect_ratio=ratio,
        output_format="png",
        long_edge=edge,
    )
    return Image.open(io.BytesIO(content))


def difference(one, other):
    """Mean difference of two pictures in grey levels, 0 to 255."""
    return sum(ImageStat.Stat(ImageChops.difference(one, other)).mean) / 3


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("A loose WATERCOLOR of it", "watercolour"),
        ("watercolour painting", "watercolour"),
        ("turn this into a pencil sketch", "pencil"),
        ("a charcoal drawing", "pencil"),
        ("an oil painting in the style of van Gogh", "oil"),
        ("travel poster", "poster"),
        ("pop-art, please", "pop art"),
        ("as an anime still", "cartoon"),
        ("mosaic floor", "mosaic"),
        ("a stained-glass window", "stained glass"),
        ("film noir", "noir"),
        ("in black and white", "noir"),
        ("sepia, 1920s", "vintage"),
        ("neon signs at midnight", "neon"),
        ("make it nicer", "tint"),
        ("boiling soil", "tint"),
    ],
)
def test_prompt_words_choose_the_style(prompt, name):
    assert choose_style(prompt).name == name


def test_prompts_without_a_style_differ_by_tint():
    assert len({choose_style(f"make it number {number}") for number in range(100)}) > 12


def test_styles_differ_from_the_photo_and_each_other():
    pictures = {name: painted(name) for name in STYLES}
    pictures["nothing"] = painted("make it nicer")
    plain = Image.open(PHOTOS / "motorcycle.webp").convert("RGB").resize((160, 120))
    names = list(pictures)
    for at, name in enumerate(names):
        assert difference(pictures[name], plain) > 5, name
        for other in names[:at]:
            assert difference(pictures[name], pictures[other]) > 5, (name, other)


@pytest.mark.parametrize("style", [*STYLES, "plain"])
def test_smallest_size_is_painted_at_any_ratio(style):
    assert painted(style, ratio="21:9", edge=16).size == (16, 7)
    assert painted(style, None, ratio="9:16", edge=16).size == (9, 16)


def test_painting_is_deterministic():
    for style in STYLES:
        assert painted(style, edge=64).tobytes() == painted(style, edge=64).tobytes()


def test_landscapes_differ_by_prompt():
    landscapes = [painted(prompt, None) for prompt in ("a lake at night", "snow", "a forest")]
    assert len({landscape.tobytes() for landscape in landscapes}) == 3
    for landscape in landscapes:
        assert max(ImageStat.Stat(landscape).stddev) > 10


def test_grey_and_tiny_references_are_painted():
    for picture in (Image.new("L", (1, 1)), Image.new("I;16", (5, 300)), Image.new("P", (300, 5))):
        file = io.BytesIO()
        picture.save(file, "PNG")
        for style in STYLES:
            assert painted(style, file.getvalue(), edge=32).size == (32, 24)
