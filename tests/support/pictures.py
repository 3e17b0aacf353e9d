"""Small images of every format, valid and invalid."""

import io
import struct
import zlib

from PIL import Image


def picture(kind="jpeg", mode="RGB", size=(96, 72), **how):
    """Return the bytes of a noisy image. With noise, any truncation changes the pixels."""
    file = io.BytesIO()
    Image.effect_noise(size, 60).convert(mode).save(file, kind, **how)
    return file.getvalue()


def animation(kind="webp", size=(96, 72)):
    """Return the bytes of an image with three frames."""
    frames = [Image.effect_noise(size, sigma).convert("RGB") for sigma in (20, 60, 90)]
    file = io.BytesIO()
    frames[0].save(file, kind, save_all=True, append_images=frames[1:])
    return file.getvalue()


def png_that_claims(width, height):
    """Return a PNG of 69 bytes whose header announces the given size in pixels."""

    def chunk(name, data):
        check = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 100)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )
