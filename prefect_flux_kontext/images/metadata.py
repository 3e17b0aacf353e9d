"""Change the metadata of images: label results as made by AI, and clean references.

The pixels do not change, and the same image always gets the same bytes. The label is IPTC's
`DigitalSourceType` in an XMP packet, where photo agencies, platforms and search engines look for
it: https://iptc.org/std/photometadata/specification. Images with signed provenance (C2PA), which
the label would break, and those that have XMP stay as they are.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from typing import Literal

from PIL import ExifTags, Image

from prefect_flux_kontext.errors import ReferenceImageError
from prefect_flux_kontext.images.headers import (
    JPEG_END,
    JPEG_SCAN,
    PNG_SIGNATURE,
    iter_jpeg_segments,
    iter_png_chunks,
    iter_webp_chunks,
    read_size,
)

SourceType = Literal["trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia"]
"""IPTC's terms for an image made from text alone, and for one made from other images too."""

_PACKET = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about=""'
    ' xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">'
    "<Iptc4xmpExt:DigitalSourceType>"
    "http://cv.iptc.org/newscodes/digitalsourcetype/{source}"
    "</Iptc4xmpExt:DigitalSourceType></rdf:Description></rdf:RDF></x:xmpmeta>"
    '<?xpacket end="w"?>'
)

_JPEG_XMP = b"http://ns.adobe.com/xap/1.0/\0"
_APP0, _APP1, _APP2, _APP11 = 0xE0, 0xE1, 0xE2, 0xEB

_PNG_XMP = b"XML:com.adobe.xmp\0"

# Bytes of a PNG's signature and its first chunk, IHDR.
_PNG_HEADER_BYTES = 33

# Flags of the WebP chunk VP8X, and its bytes.
_VP8X_XMP, _VP8X_EXIF, _VP8X_ALPHA = 0x04, 0x08, 0x10
_VP8X_BYTES = 18

# What a reference keeps. JPEG segments: JFIF, the ICC profile, and Adobe's colour transform.
_JPEG_KEPT = ((_APP0, b"JFIF\0"), (_APP2, b"ICC_PROFILE\0"), (0xEE, b"Adobe"))
_JPEG_APPLICATION, _JPEG_COMMENT = range(0xE0, 0xF0), 0xFE
# Chunks that decide how the image looks; all that begin with a capital are critical.
_PNG_KEPT = re.compile(
    rb"tRNS|gAMA|cHRM|sRGB|iCCP|cICP|sBIT|bKGD|hIST|pHYs|mDCV|cLLI|acTL|fcTL|fdAT|[A-Z][A-Za-z]{3}"
)
_WEBP_KEPT = frozenset((b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF", b"ICCP"))


def add_ai_metadata(data: bytes, source: SourceType) -> bytes:
    """Return a whole JPEG, PNG or WebP with the label.

    An image with XMP or C2PA, or of another format, is returned unchanged.
    """
    packet = _PACKET.format(source=source).encode()
    try:
        if data.startswith(b"\xff\xd8"):
            return _label_jpeg(data, packet)
        if data.startswith(PNG_SIGNATURE):
            return _label_png(data, packet)
        if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
            return _label_webp(data, packet)
    except (IndexError, ValueError, struct.error):
        pass  # the file is malformed; the image is worth more than the label
    return data


def _label_jpeg(data: bytes, packet: bytes) -> bytes:
    insert_at, is_header = 2, True
    for marker, _, at, end in iter_jpeg_segments(data):
        if marker == JPEG_SCAN:
            break
        content = data[at + 2 : end]
        if (
            (marker == _APP1 and content.startswith(_JPEG_XMP))
            or (marker == _APP11 and content.startswith(b"JP"))  # JUMBF, the box of C2PA
            # The Multi-Picture index holds byte offsets, which the label would shift.
            or (marker == _APP2 and content.startswith(b"MPF\0"))
        ):
            return data
        # JFIF and Exif must come first.
        is_header = is_header and marker in (_APP0, _APP1)
        if is_header:
            insert_at = end
    else:
        raise ValueError("the JPEG has no image")
    return data[:insert_at] + _build_app1(_JPEG_XMP + packet) + data[insert_at:]


def _label_png(data: bytes, packet: bytes) -> bytes:
    for kind, at, end in iter_png_chunks(data):
        content = data[at + 8 : min(end, at + 72)]
        is_xmp = kind == b"iTXt" and content.startswith(_PNG_XMP)
        is_legacy_xmp = kind in (b"tEXt", b"zTXt", b"iTXt") and content.startswith(
            b"Raw profile type xmp"
        )
        if kind == b"caBX" or is_xmp or is_legacy_xmp:
            return data
    # Uncompressed, without language or translated keyword.
    chunk = _build_png_chunk(b"iTXt", _PNG_XMP + b"\0\0\0\0" + packet)
    return data[:_PNG_HEADER_BYTES] + chunk + data[_PNG_HEADER_BYTES:]


def _label_webp(data: bytes, packet: bytes) -> bytes:
    end = 8 + int.from_bytes(data[4:8], "little")
    first, begin, last = data[12:16], 12, 0
    for kind, _, last in iter_webp_chunks(data):  # noqa: B007 - used after the loop
        if kind in (b"C2PA", b"XMP "):
            return data
    if last != end or end > len(data):
        raise ValueError("the chunks do not add up")
    if first == b"VP8X":
        head = data[12:20] + bytes([data[20] | _VP8X_XMP]) + data[21:30]
        begin = 30
    else:
        head = b"VP8X" + struct.pack("<I", 10) + _build_vp8x(data, first)
    chunks = head + data[begin:end] + b"XMP " + struct.pack("<I", len(packet)) + packet
    chunks += b"\0" * (len(packet) % 2)
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP" + chunks + data[end:]


def _build_vp8x(data: bytes, kind: bytes) -> bytes:
    """Build the content of a VP8X chunk for a WebP without one: its flags and its size."""
    size = read_size(data)
    if size is None or not all(size):
        raise ValueError("the WebP has no image")
    has_alpha = kind == b"VP8L" and data[24] >> 4 & 1
    flags = _VP8X_XMP | (_VP8X_ALPHA if has_alpha else 0)
    return struct.pack("<I", flags) + b"".join((side - 1).to_bytes(3, "little") for side in size)


def remove_metadata(data: bytes) -> bytes:
    """Return an image with only its pixels, orientation and colour profile; the first of an MPO.

    What tells the place, the device, the author or comments is removed before others can fetch it.

    Raises:
        ReferenceImageError: Its structure is damaged, so that metadata could be left.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        exif = b"" if orientation not in range(2, 9) else _build_exif(orientation)
        if data.startswith(b"\xff\xd8"):
            return _clean_jpeg(data, exif)
        return _clean_png(data, exif) if data.startswith(b"\x89PNG") else _clean_webp(data, exif)
    except Exception as error:  # noqa: BLE001 - damaged metadata raises errors of any type
        raise ReferenceImageError(
            f"has damaged metadata, which cannot be removed ({type(error).__name__}: {error}); "
            "encode the image again"
        ) from None


def _build_exif(orientation: int) -> bytes:
    """Build Exif data with one entry, the orientation."""
    return struct.pack(
        "<2sHIHHHIII", b"II", 42, 8, 1, ExifTags.Base.Orientation, 3, 1, orientation, 0
    )


def _clean_jpeg(data: bytes, exif: bytes) -> bytes:
    parts = [data[:2]]
    if exif:
        parts.append(_build_app1(b"Exif\0\0" + exif))
    previous_end = 2
    for marker, start, content_at, end in iter_jpeg_segments(data):
        parts.append(data[previous_end:start])  # the data of a scan
        segment = b"\xff" + data[content_at - 1 : end]
        previous_end = end
        is_extra = marker in _JPEG_APPLICATION or marker == _JPEG_COMMENT
        if not is_extra or any(
            marker == kept and segment[4:].startswith(name) for kept, name in _JPEG_KEPT
        ):
            # JFIF without its thumbnail.
            is_jfif = marker == _APP0
            parts.append(b"\xff\xe0\x00\x10" + segment[4:16] + b"\0\0" if is_jfif else segment)
        if marker == JPEG_END:
            return b"".join(parts)
    raise ValueError("the end is missing")


def _clean_png(data: bytes, exif: bytes) -> bytes:
    chunks = [data[at:end] for kind, at, end in iter_png_chunks(data) if _PNG_KEPT.fullmatch(kind)]
    if exif:
        chunks.insert(1, _build_png_chunk(b"eXIf", exif))
    return PNG_SIGNATURE + b"".join(chunks)


def _clean_webp(data: bytes, exif: bytes) -> bytes:
    chunks = [data[at:end] for kind, at, end in iter_webp_chunks(data) if kind in _WEBP_KEPT]
    if chunks[0].startswith(b"VP8X"):
        flags = chunks[0][8] & ~(_VP8X_EXIF | _VP8X_XMP) | (_VP8X_EXIF if exif else 0)
        chunks[0] = chunks[0][:8] + bytes([flags]) + chunks[0][9:_VP8X_BYTES]
        if exif:
            chunks.append(b"EXIF" + struct.pack("<I", len(exif)) + exif)
    body = b"WEBP" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _build_app1(content: bytes) -> bytes:
    return struct.pack(">2sH", b"\xff\xe1", 2 + len(content)) + content


def _build_png_chunk(kind: bytes, content: bytes) -> bytes:
    check = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)
