"""The contact sheet shows every image in its place with its caption."""

from PIL import Image

from prefect_flux_kontext.report.gallery.builder import draw_contact_sheet
from tests.support.pictures import picture

BACKGROUND = (250, 249, 246)


def colour(path, name, size=(300, 200), kind="png"):
    file = path / f"{name}.{kind}"
    Image.new("RGB", size, name).save(file)
    return file


def test_images_are_in_rows_and_columns(tmp_path):
    colours = ["red", "green", "blue"]
    red, green, blue = (colour(tmp_path, name) for name in colours)
    sheet = draw_contact_sheet([[("before", red), ("after", green)], [("before", blue)]])
    assert (sheet.mode, sheet.size) == ("RGB", (512, 432))
    middles = [(128, 96), (384, 96), (128, 312), (384, 312)]
    assert [sheet.getpixel(middle) for middle in middles] == [
        (255, 0, 0),
        (0, 128, 0),
        (0, 0, 255),
        BACKGROUND,
    ]


def test_caption_is_below_its_image(tmp_path):
    red = colour(tmp_path, "red")
    strip = (0, 192, 256, 216)
    bare = draw_contact_sheet([[("", red)]]).crop(strip)
    captioned = draw_contact_sheet([[("cat, before", red)]]).crop(strip)
    assert bare.getextrema() == tuple((value, value) for value in BACKGROUND)
    assert captioned.getextrema() != bare.getextrema()


def test_images_keep_their_aspect_ratio(tmp_path):
    tall = colour(tmp_path, "red", size=(50, 500), kind="jpg")
    grey, alpha = tmp_path / "grey.jpg", tmp_path / "alpha.webp"
    grey.write_bytes(picture("jpeg", "CMYK"))
    alpha.write_bytes(picture("webp", "RGBA"))
    sheet = draw_contact_sheet([[("tall", tall), ("CMYK", grey), ("alpha", alpha)]])
    assert sheet.size == (768, 216)
    assert sheet.getpixel((128, 96))[0] > 200
    assert sheet.getpixel((10, 96)) == BACKGROUND
