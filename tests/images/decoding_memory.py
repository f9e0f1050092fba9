"""Measure the memory that decoding takes, each picture in a process of its own: prints a line of JSON.

A process that has decoded something has room that it uses again, so that a second picture would seem to take less.
"""

from __future__ import annotations

import ctypes
import io
import json
import os
import struct
import sys
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from dave_fast.images.reading import decode_image, decoding_bytes

SIDE = 2000
_generator = np.random.default_rng(0)
_rgb = Image.fromarray(_generator.integers(0, 256, (40, 40, 3), np.uint8)).resize((SIDE, SIDE))
_grey = _rgb.convert("L")
_alpha = _rgb.copy()
_alpha.putalpha(_grey)
_palette = _rgb.convert("P")
_turned = Image.Exif()
_turned[0x112] = 6


def _file(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return file.getvalue()


def _png16(colour: int, channels: int, top: int = 255, extra: bytes = b"") -> bytes:
    """Return a PNG of sixteen bits; its samples are below 256 · top."""

    def chunk(content: bytes) -> bytes:
        return struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))

    row = b"\0" + _generator.integers(0, top, SIDE * channels * 2, dtype=np.uint8).tobytes()
    head = b"IHDR" + struct.pack(">IIBBBBB", SIDE, SIDE, 16, colour, 0, 0, 0)
    pixels = b"IDAT" + zlib.compress(row * SIDE, 1)
    return b"\x89PNG\r\n\x1a\n" + b"".join(map(chunk, filter(None, (head, extra, pixels, b"IEND"))))


# The pictures of each kind that take most, by name.
PICTURES: dict[str, Callable[[], bytes]] = {
    "png rgb": lambda: _file(_rgb, "PNG", compress_level=1),
    "png grey": lambda: _file(_grey, "PNG", compress_level=1),
    "png rgba": lambda: _file(_alpha, "PNG", compress_level=1),
    "png transparent palette": lambda: _file(_palette, "PNG", compress_level=1, transparency=3),
    "png transparent colour": lambda: _file(_rgb, "PNG", compress_level=1, transparency=(1, 2, 3)),
    "png grey of 16 bits, dark": lambda: _png16(0, 1, 20),
    "png rgb of 16 bits, dark": lambda: _png16(2, 3, 20),
    "png rgb of 16 bits, transparent colour": lambda: _png16(2, 3, 255, b"tRNS" + struct.pack(">HHH", 1, 2, 3)),
    "png rgba of 16 bits, dark": lambda: _png16(6, 4, 20),
    "jpeg, turned": lambda: _file(_rgb, "JPEG", exif=_turned),
    "jpeg, progressive cmyk": lambda: _file(_rgb.convert("CMYK"), "JPEG", progressive=True, subsampling=0),
    "webp rgb": lambda: _file(_rgb, "WEBP", lossless=True, method=0, quality=0),
    "webp rgba": lambda: _file(_alpha, "WEBP", quality=10, method=0),
    "gif": lambda: _file(_palette, "GIF"),
    "bmp": lambda: _file(_rgb, "BMP"),
    "tiff rgba": lambda: _file(_alpha, "TIFF"),
    "tiff of floats": lambda: _file(_grey.convert("F"), "TIFF"),
    "ppm of words": lambda: b"P3 %d %d 255\n" % (SIDE, SIDE) + b"0 " * (3 * SIDE * SIDE),
    "pfm": lambda: b"Pf\n%d %d\n-1.0\n" % (SIDE, SIDE) + _generator.random(SIDE * SIDE).astype("<f4").tobytes(),
}


def _status(key: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))


def _peak(content: bytes) -> int:
    """Return the bytes that decoding takes at its peak."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        before = _status("VmRSS")
        decode_image(content, "the image", note=lambda note: None)
        os.write(write, str(_status("VmHWM") - before).encode())
        os._exit(0)
    os.close(write)
    told = os.read(read, 100)
    os.close(read)
    os.waitpid(pid, 0)
    return int(told)


if __name__ == "__main__":
    measured = {}
    for name, make in PICTURES.items():
        picture = make()
        measured[name] = (_peak(picture), decoding_bytes(picture, "the image")[2])
    json.dump(measured, sys.stdout)
