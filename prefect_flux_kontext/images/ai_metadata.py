"""Label images as made by AI in their metadata. The pixels do not change.

The label is IPTC's `DigitalSourceType` in an XMP packet, where photo agencies, platforms and
search engines look for it: https://iptc.org/std/photometadata/specification. The same image always
gets the same bytes. Two kinds of images stay unchanged: those with signed provenance (C2PA), which
the label would break, and those that already have XMP.
"""

from __future__ import annotations

import struct
import zlib
from typing import Literal

from prefect_flux_kontext.images.headers import (
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

# Flags of the WebP chunk VP8X.
_VP8X_XMP, _VP8X_ALPHA = 0x04, 0x10


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
    segment = b"\xff\xe1" + struct.pack(">H", 2 + len(_JPEG_XMP) + len(packet))
    return data[:insert_at] + segment + _JPEG_XMP + packet + data[insert_at:]


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
    chunk = b"iTXt" + _PNG_XMP + b"\0\0\0\0" + packet
    chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
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
