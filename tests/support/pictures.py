"""Small test images of every format, whole and broken."""

import io
import struct
import zlib

from PIL import Image


def picture(kind="jpeg", mode="RGB", size=(96, 72), **how):
    """The bytes of a noisy image: with noise, no cut goes unnoticed by luck."""
    file = io.BytesIO()
    Image.effect_noise(size, 60).convert(mode).save(file, kind, **how)
    return file.getvalue()


def animation(kind="webp", size=(96, 72)):
    frames = [Image.effect_noise(size, sigma).convert("RGB") for sigma in (20, 60, 90)]
    file = io.BytesIO()
    frames[0].save(file, kind, save_all=True, append_images=frames[1:])
    return file.getvalue()


def png_that_claims(width, height):
    """A tiny PNG whose header claims the given size."""

    def chunk(name, data):
        check = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 100)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )
