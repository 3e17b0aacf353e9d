"""The AI mark is readable, changes no pixel, breaks no signature and raises no error."""

import io
import struct
import xml.etree.ElementTree as ET
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from prefect_flux_kontext.images.ai_metadata import add_ai_metadata
from prefect_flux_kontext.images.decode import inspect_image
from tests.support.pictures import animation, picture

TEXT, RESTYLED = "trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia"
PROPERTY = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"
NEWSCODES = "http://cv.iptc.org/newscodes/digitalsourcetype/"


def exif():
    written = Image.Exif()
    written[0x010E] = "a description"
    return written.tobytes()


IMAGES = {
    "JPEG": picture("jpeg"),
    "grey progressive JPEG": picture("jpeg", "L", progressive=True),
    "CMYK JPEG": picture("jpeg", "CMYK"),
    "JPEG with Exif": picture("jpeg", exif=exif()),
    "JPEG with a colour profile": picture("jpeg", icc_profile=b"profile" * 99),
    "JPEG with a comment": picture("jpeg", comment=b"made today"),
    "JPEG with a line end after it": picture("jpeg") + b"\r\n",
    "JPEG with fill bytes": picture("jpeg").replace(b"\xff\xdb", b"\xff\xff\xff\xdb", 1),
    "PNG": picture("png"),
    "PNG with a palette": picture("png", "P"),
    "PNG with alpha": picture("png", "RGBA"),
    "16-bit PNG": picture("png", "I;16"),
    "animated PNG": animation("png"),
    "WebP": picture("webp"),
    "WebP with alpha": picture("webp", "RGBA"),
    "lossless WebP": picture("webp", lossless=True),
    "lossless WebP with alpha": picture("webp", "RGBA", lossless=True),
    "WebP with Exif": picture("webp", exif=exif()),
    "animated WebP": animation("webp"),
}


def read_frames(data):
    """Return the properties and metadata of an image, and the pixels of every frame."""
    with Image.open(io.BytesIO(data)) as image:
        properties = image.format, image.mode, image.size, image.info.get("exif")
        properties += (image.info.get("icc_profile"), image.info.get("comment"))
        pixels = []
        for number in range(getattr(image, "n_frames", 1)):
            image.seek(number)
            pixels.append(image.convert("RGBA").tobytes())
    return properties, pixels


def read_source_type(data):
    """Return the source type in the XMP that Pillow finds, or None without XMP."""
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        packet = image.info.get("xmp")
    if packet is None:
        return None
    (found,) = ET.fromstring(packet).iter(PROPERTY)
    return found.text


@pytest.mark.parametrize("data", IMAGES.values(), ids=IMAGES)
@pytest.mark.parametrize("source", [TEXT, RESTYLED])
def test_mark_is_readable_and_pixels_are_unchanged(data, source):
    marked = add_ai_metadata(data, source)
    assert read_source_type(data) is None
    assert read_source_type(marked) == NEWSCODES + source
    assert read_frames(marked) == read_frames(data)
    assert inspect_image(marked) == inspect_image(data)


@pytest.mark.parametrize("data", IMAGES.values(), ids=IMAGES)
def test_marking_is_deterministic_and_happens_once(data):
    marked = add_ai_metadata(data, TEXT)
    assert add_ai_metadata(data, TEXT) == marked
    assert add_ai_metadata(marked, RESTYLED) == marked


@given(
    kind=st.sampled_from(["jpeg", "png", "webp"]),
    mode=st.sampled_from(["RGB", "L", "RGBA", "P"]),
    width=st.integers(1, 70),
    height=st.integers(1, 70),
    lossless=st.booleans(),
)
def test_images_of_any_size_keep_their_pixels(kind, mode, width, height, lossless):
    mode = "RGB" if kind == "jpeg" and mode in ("RGBA", "P") else mode
    data = picture(kind, mode, (width, height), lossless=lossless)
    marked = add_ai_metadata(data, RESTYLED)
    assert read_source_type(marked) == NEWSCODES + RESTYLED
    assert read_frames(marked) == read_frames(data)


@given(st.sampled_from(list(IMAGES.values())), st.data())
def test_malformed_data_raises_no_error(data, draw):
    at = draw.draw(st.integers(0, min(len(data), 400)))
    broken = draw.draw(
        st.sampled_from(
            [data[:at], data[:at] + b"\0\xff" + data[at + 2 :], data[at:], data + data]
        )
    )
    assert isinstance(add_ai_metadata(broken, TEXT), bytes)


def segment(marker, content):
    return b"\xff" + bytes([marker]) + struct.pack(">H", 2 + len(content)) + content


def chunk(name, content):
    check = struct.pack(">I", zlib.crc32(name + content))
    return struct.pack(">I", len(content)) + name + content + check


def webp_with(name, content):
    data = IMAGES["WebP with Exif"]
    grown = data[12:] + name + struct.pack("<I", len(content)) + content
    return b"RIFF" + struct.pack("<I", 4 + len(grown)) + b"WEBP" + grown


def png_text(keyword, compressed):
    text = PngImagePlugin.PngInfo()
    text.add_itxt(keyword, "<x/>", zip=compressed)
    return picture("png", pnginfo=text)


JPEG, PNG = IMAGES["JPEG"], IMAGES["PNG"]
LEFT_UNCHANGED = {
    "JPEG with C2PA": JPEG[:2] + segment(0xEB, b"JP\0\1\0\0\0\1jumb") + JPEG[2:],
    "JPEG with C2PA after its Exif": IMAGES["JPEG with Exif"].replace(
        b"\xff\xdb", segment(0xEB, b"JP\0\1\0\0\0\1jumb") + b"\xff\xdb", 1
    ),
    "JPEG with XMP": JPEG[:2] + segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x/>") + JPEG[2:],
    "JPEG with a second picture": animation("mpo"),
    "PNG with C2PA": PNG[:33] + chunk(b"caBX", b"\0\0\0\1jumb") + PNG[33:],
    "PNG with XMP": png_text("XML:com.adobe.xmp", compressed=False),
    "PNG with compressed XMP": png_text("XML:com.adobe.xmp", compressed=True),
    "PNG with XMP in a raw profile": png_text("Raw profile type xmp", compressed=False),
    "WebP with C2PA": webp_with(b"C2PA", b"jumb"),
    "WebP with XMP": webp_with(b"XMP ", b"<x/>"),
    "GIF": picture("gif", "L"),
    "nothing": b"",
}


@pytest.mark.parametrize("data", LEFT_UNCHANGED.values(), ids=LEFT_UNCHANGED)
def test_signed_images_and_existing_xmp_are_unchanged(data):
    assert add_ai_metadata(data, TEXT) == data


def test_jfif_and_exif_stay_first():
    marked = add_ai_metadata(IMAGES["JPEG with Exif"], TEXT)
    assert marked.index(b"JFIF") < marked.index(b"Exif") < marked.index(b"xap/1.0")
    assert marked.index(b"xap/1.0") < marked.index(b"\xff\xdb")
