"""Staged references hold no metadata, and look as before."""

import contextlib
import io
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageChops, ImageCms, ImageOps, PngImagePlugin

from prefect_flux_kontext.errors import ReferenceImageError
from prefect_flux_kontext.images.metadata import remove_metadata
from prefect_flux_kontext.references.resolver import References
from prefect_flux_kontext.references.staging import Staging
from tests.support.pictures import animation, picture

CANARY = b"canary-place-7f3a9c51"
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
XMP = b"<x:xmpmeta xmlns:x='adobe:ns:meta/'>" + CANARY + b"</x:xmpmeta>"


def exif(orientation):
    made = Image.Exif()
    made[0x0112] = orientation
    made[0x010E] = CANARY.decode()
    gps = made.get_ifd(0x8825)
    gps[1], gps[2] = "N", (52.0, 31.0, 12.0)
    gps[0x1D] = CANARY.decode()
    return made.tobytes()


def jpeg(orientation=6, mode="RGB", **how):
    data = picture(
        "jpeg", mode, exif=exif(orientation), icc_profile=PROFILE, comment=CANARY, xmp=XMP, **how
    )
    iptc = b"Photoshop 3.0\x00" + CANARY
    return data[:2] + b"\xff\xed" + struct.pack(">H", 2 + len(iptc)) + iptc + data[2:]


def png(orientation=6, mode="RGB"):
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", CANARY.decode())
    text.add_itxt("XML:com.adobe.xmp", XMP.decode())
    text.add(b"prVt", CANARY)
    return picture("png", mode, exif=exif(orientation), icc_profile=PROFILE, pnginfo=text)


def webp(orientation=6, mode="RGB", **how):
    return picture("webp", mode, exif=exif(orientation), icc_profile=PROFILE, xmp=XMP, **how) + (
        CANARY
    )


def mpo():
    first, second = Image.open(io.BytesIO(jpeg(3))), Image.open(io.BytesIO(jpeg(1)))
    file = io.BytesIO()
    first.save(file, "MPO", save_all=True, append_images=[second], exif=exif(3))
    return file.getvalue()


IMAGES = {
    **{f"a JPEG turned {n}": jpeg(n) for n in range(1, 9)},
    "a progressive JPEG": jpeg(progressive=True),
    "a CMYK JPEG": jpeg(mode="CMYK"),
    "a grey JPEG": picture("jpeg", "L", comment=CANARY, exif=exif(8)),
    "a JPEG with a trailer": jpeg() + CANARY,
    "an MPO": mpo(),
    **{f"a PNG turned {n}": png(n) for n in (1, 3, 8)},
    "a PNG with a palette": png(mode="P"),
    "a PNG with a trailer": png() + CANARY,
    "a transparent PNG": png(mode="RGBA"),
    **{f"a WebP turned {n}": webp(n) for n in (1, 3, 8)},
    "a lossless transparent WebP": webp(mode="RGBA", lossless=True),
    "a plain JPEG": picture("jpeg"),
    "a plain PNG": picture("png"),
    "a plain WebP": picture("webp"),
    "an animated WebP": animation("webp"),
    "an animated PNG": animation("png"),
}


def upright(data):
    image = Image.open(io.BytesIO(data))
    image.load()
    return ImageOps.exif_transpose(image)


@pytest.mark.parametrize("name", IMAGES)
def test_metadata_is_removed_without_loss(name):
    data = IMAGES[name]
    cleaned = remove_metadata(data)
    assert CANARY not in cleaned
    for chunk in (b"xmpmeta", b"Photoshop", b"MPF\0", b"tEXt", b"iTXt", b"zTXt"):
        assert chunk not in cleaned
    before, after = upright(data), upright(cleaned)
    assert (after.size, after.mode) == (before.size, before.mode)
    assert ImageChops.difference(before, after).getbbox() is None
    assert after.info.get("icc_profile") == before.info.get("icc_profile")
    with Image.open(io.BytesIO(cleaned)) as image:
        assert set(image.getexif()) <= {0x0112}
    assert remove_metadata(cleaned) == cleaned


def test_compressed_text_is_removed_from_a_png():
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "x" * 5_000, zip=True)
    assert b"zTXt" not in remove_metadata(picture("png", pnginfo=text))


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_cut_image_is_refused_or_complete(kind):
    data = {"jpeg": jpeg, "png": png, "webp": webp}[kind]()
    for cut in range(0, len(data), 97):
        with contextlib.suppress(ReferenceImageError):
            assert CANARY not in remove_metadata(data[:cut])


@given(st.sampled_from(["jpeg", "png", "webp"]), st.binary(max_size=40), st.integers(0, 2_000))
def test_any_change_gives_an_image_or_one_error(kind, noise, at):
    data = {"jpeg": jpeg, "png": png, "webp": webp}[kind]()
    with contextlib.suppress(ReferenceImageError):
        remove_metadata(data[:at] + noise + data[at:])


@pytest.mark.parametrize("name", ["a JPEG turned 6", "a PNG turned 8", "a WebP turned 3"])
def test_staged_file_holds_no_metadata(name, tmp_path):
    path, staged = tmp_path / "own", tmp_path / "staged"
    path.write_bytes(IMAGES[name])
    references = References(Staging(str(staged), "https://cdn.test"))
    references.identify([str(path)])
    assert references.find_content_problems([str(path)]) == {}
    references._make_available(str(path), verify_staged=False)
    references._make_available(str(path), verify_staged=True)
    (file,) = staged.iterdir()
    assert CANARY not in file.read_bytes()
    assert upright(file.read_bytes()).size == upright(IMAGES[name]).size
