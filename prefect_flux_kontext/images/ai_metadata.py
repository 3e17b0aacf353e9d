"""The mark "made by AI", put into an image's bytes beside its pixels, which stay as they are.

It is IPTC's `DigitalSourceType` in a packet of XMP, where photo agencies, platforms and search
engines look for it: https://iptc.org/std/photometadata/specification. The bytes follow from the
image alone. Left as they are: images with signed provenance (C2PA), which would break, and images
with XMP of their own, which is not ours to rewrite.
"""

from __future__ import annotations

import struct
import zlib
from typing import Literal

SourceType = Literal["trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia"]
"""IPTC's words for an image made from text alone, and for one made from other images as well."""

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
# Markers: the first byte of each, those without content, and those that are looked at.
_MARKER, _ALONE = 0xFF, (0x01, *range(0xD0, 0xD8))
_APP0, _APP1, _APP2, _APP11, _SCAN = 0xE0, 0xE1, 0xE2, 0xEB, 0xDA
_PNG_XMP = b"XML:com.adobe.xmp\0"
_PNG_XMPS = (_PNG_XMP, b"Raw profile type xmp\0")
_PNG_HEAD = 33
_VP8X_XMP, _VP8X_ALPHA = 0x04, 0x10


def add_ai_metadata(data: bytes, source: SourceType) -> bytes:
    """The image with the mark; as it is where it has XMP or C2PA already or is no such image.

    Args:
        data: A whole JPEG, PNG or WebP.
        source: How it was made.
    """
    packet = _PACKET.format(source=source).encode()
    try:
        if data.startswith(b"\xff\xd8"):
            return _marked_jpeg(data, packet)
        if data.startswith(b"\x89PNG\r\n\x1a\n"):
            return _marked_png(data, packet)
        if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
            return _marked_webp(data, packet)
    except (IndexError, ValueError, struct.error):
        pass  # not built as its kind is; the pixels count more than the mark
    return data


def _marked_jpeg(data: bytes, packet: bytes) -> bytes:
    at = place = 2
    marker, at_head = _APP0, True
    while marker != _SCAN:
        if data[at] != _MARKER:
            raise ValueError("no marker")
        marker = data[at + 1]
        if marker == _MARKER or marker in _ALONE:
            at += 1 if marker == _MARKER else 2
            continue
        (length,) = struct.unpack_from(">H", data, at + 2)
        content = data[at + 4 : at + 2 + length]
        if (
            (marker == _APP1 and content.startswith(_JPEG_XMP))
            or (marker == _APP11 and content.startswith(b"JP"))  # JUMBF, C2PA's box
            # It says at which byte a second picture is.
            or (marker == _APP2 and content.startswith(b"MPF\0"))
        ):
            return data
        at += 2 + length
        # JFIF and Exif each ask to be first.
        at_head = at_head and marker in (_APP0, _APP1)
        if at_head:
            place = at
    segment = b"\xff\xe1" + struct.pack(">H", 2 + len(_JPEG_XMP) + len(packet))
    return data[:place] + segment + _JPEG_XMP + packet + data[place:]


def _marked_png(data: bytes, packet: bytes) -> bytes:
    at, kind = 8, b""
    while kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", data, at)
        content = data[at + 8 : at + 8 + min(length, 64)]
        has_xmp = kind == b"iTXt" and content.startswith(_PNG_XMP)
        old_xmp = kind in (b"tEXt", b"zTXt", b"iTXt") and content.startswith(
            b"Raw profile type xmp"
        )
        if kind == b"caBX" or has_xmp or old_xmp:
            return data
        at += 12 + length
    # Not compressed, and of no language.
    named = b"iTXt" + _PNG_XMP + b"\0\0\0\0" + packet
    chunk = struct.pack(">I", len(named) - 4) + named + struct.pack(">I", zlib.crc32(named))
    return data[:_PNG_HEAD] + chunk + data[_PNG_HEAD:]


def _marked_webp(data: bytes, packet: bytes) -> bytes:
    (size,) = struct.unpack_from("<I", data, 4)
    end = 8 + size
    first, begin, at = data[12:16], 12, 12
    while at < end:
        kind, length = struct.unpack_from("<4sI", data, at)
        if kind in (b"C2PA", b"XMP "):
            return data
        at += 8 + length + length % 2
    if at != end or end > len(data):
        raise ValueError("chunks that do not add up")
    if first == b"VP8X":
        head = data[12:20] + bytes([data[20] | _VP8X_XMP]) + data[21:30]
        begin = 30
    else:
        head = b"VP8X" + struct.pack("<I", 10) + _canvas(data, first)
    chunks = head + data[begin:end] + b"XMP " + struct.pack("<I", len(packet)) + packet
    chunks += b"\0" * (len(packet) % 2)
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP" + chunks + data[end:]


def _canvas(data: bytes, kind: bytes) -> bytes:
    """What VP8X tells of a WebP that had no need of it: its flags and its size in pixels."""
    flags = _VP8X_XMP
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        width, height = bits & 0x3FFF, bits >> 14 & 0x3FFF
        flags |= _VP8X_ALPHA * (bits >> 28 & 1)
    elif kind == b"VP8 ":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
        width, height = width - 1, height - 1
    else:
        raise ValueError("no picture")
    sides = struct.pack("<I", width)[:3] + struct.pack("<I", height)[:3]
    return struct.pack("<I", flags) + sides
