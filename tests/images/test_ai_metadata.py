"""The label "made by AI" is readable and changes neither pixels nor signed images."""

import io
import struct
import xml.etree.ElementTree as ET
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from prefect_flux_kontext.images.decode import inspect_image
from prefect_flux_kontext.images.metadata import add_ai_metadata
from tests.support.pictures import animation, picture

TEXT, RESTYLED = "trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia"
PROPERTY = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"
NEWSCODES = "http://cv.iptc.org/newscodes/digitalsourcetype/"


def exif():
    metadata = Image.Exif()
    metadata[0x010E] = "a description"
    return metadata.tobytes()


PICTURES = {
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


def frames(data):
    """The metadata of an image and the pixels of every frame."""
    with Image.open(io.BytesIO(data)) as image:
        info = image.format, image.mode, image.size, image.info.get("exif")
        info += (image.info.get("icc_profile"), image.info.get("comment"))
        pixels = []
        for number in range(getattr(image, "n_frames", 1)):
            image.seek(number)
            pixels.append(image.convert("RGBA").tobytes())
    return info, pixels


def source_type(data):
    """The source type in the XMP, found by Pillow and an XML parser; None without XMP."""
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        packet = image.info.get("xmp")
    if packet is None:
        return None
    (found,) = ET.fromstring(packet).iter(PROPERTY)
    return found.text


@pytest.mark.parametrize("data", PICTURES.values(), ids=PICTURES)
@pytest.mark.parametrize("source", [TEXT, RESTYLED])
def test_label_is_readable_and_keeps_the_image(data, source):
    labelled = add_ai_metadata(data, source)
    assert source_type(data) is None
    assert source_type(labelled) == NEWSCODES + source
    assert frames(labelled) == frames(data)
    assert inspect_image(labelled) == inspect_image(data)


@pytest.mark.parametrize("data", PICTURES.values(), ids=PICTURES)
def test_label_is_deterministic_and_added_once(data):
    labelled = add_ai_metadata(data, TEXT)
    assert add_ai_metadata(data, TEXT) == labelled
    assert add_ai_metadata(labelled, RESTYLED) == labelled


@given(
    kind=st.sampled_from(["jpeg", "png", "webp"]),
    mode=st.sampled_from(["RGB", "L", "RGBA", "P"]),
    width=st.integers(1, 70),
    height=st.integers(1, 70),
    lossless=st.booleans(),
)
def test_label_keeps_the_pixels_of_images_of_any_size(kind, mode, width, height, lossless):
    mode = "RGB" if kind == "jpeg" and mode in ("RGBA", "P") else mode
    data = picture(kind, mode, (width, height), lossless=lossless)
    labelled = add_ai_metadata(data, RESTYLED)
    assert source_type(labelled) == NEWSCODES + RESTYLED
    assert frames(labelled) == frames(data)


@given(st.sampled_from(list(PICTURES.values())), st.data())
def test_malformed_image_raises_no_error(data, draw):
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
    data = PICTURES["WebP with Exif"]
    grown = data[12:] + name + struct.pack("<I", len(content)) + content
    return b"RIFF" + struct.pack("<I", 4 + len(grown)) + b"WEBP" + grown


def png_text(keyword, compressed):
    text = PngImagePlugin.PngInfo()
    text.add_itxt(keyword, "<x/>", zip=compressed)
    return picture("png", pnginfo=text)


JPEG, PNG = PICTURES["JPEG"], PICTURES["PNG"]
UNCHANGED = {
    "JPEG with C2PA": JPEG[:2] + segment(0xEB, b"JP\0\1\0\0\0\1jumb") + JPEG[2:],
    "JPEG with C2PA after its Exif": PICTURES["JPEG with Exif"].replace(
        b"\xff\xdb", segment(0xEB, b"JP\0\1\0\0\0\1jumb") + b"\xff\xdb", 1
    ),
    "JPEG with XMP": JPEG[:2] + segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x/>") + JPEG[2:],
    "JPEG with a second picture": animation("mpo"),
    "PNG with C2PA": PNG[:33] + chunk(b"caBX", b"\0\0\0\1jumb") + PNG[33:],
    "PNG with XMP": png_text("XML:com.adobe.xmp", compressed=False),
    "PNG with compressed XMP": png_text("XML:com.adobe.xmp", compressed=True),
    "PNG with legacy XMP": png_text("Raw profile type xmp", compressed=False),
    "WebP with C2PA": webp_with(b"C2PA", b"jumb"),
    "WebP with XMP": webp_with(b"XMP ", b"<x/>"),
    "GIF": picture("gif", "L"),
    "nothing": b"",
}


@pytest.mark.parametrize("data", UNCHANGED.values(), ids=UNCHANGED)
def test_images_with_c2pa_or_xmp_stay_unchanged(data):
    assert add_ai_metadata(data, TEXT) == data


def test_jfif_and_exif_stay_first():
    labelled = add_ai_metadata(PICTURES["JPEG with Exif"], TEXT)
    assert labelled.index(b"JFIF") < labelled.index(b"Exif") < labelled.index(b"xap/1.0")
    assert labelled.index(b"xap/1.0") < labelled.index(b"\xff\xdb")
