"""What hostile clients send: pictures that grow, slow ones, JSON, forms, addresses and bytes that are no HTTP.

Each is a table from a name to a function that makes the bytes; large ones are made once.
"""

from __future__ import annotations

import io
import itertools
import random
import struct
import zlib
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import numpy as np
from PIL import Image

# Of JSON: long enough for seconds of parsing and hundreds of megabytes, where nothing bounds them.
JSON_BYTES = 8 << 20
PHOTO_SIZE = 224

Body = Callable[[], bytes]


def _cached(table: Mapping[str, Body]) -> dict[str, Body]:
    """Return a table whose functions make their bytes once."""
    return {name: cache(make) for name, make in table.items()}


# Pictures.


@cache
def photo(kind: str = "PNG") -> bytes:
    """Return an ordinary picture: a PNG, JPEG, … of noise in large patches."""
    small = np.random.default_rng(0).integers(0, 256, (14, 14, 3), np.uint8)
    return _saved(Image.fromarray(small).resize((PHOTO_SIZE, PHOTO_SIZE)), kind)


def _saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return file.getvalue()


def _black(mode: str, width: int, height: int, kind: str, **options: Any) -> bytes:
    return _saved(Image.new(mode, (width, height)), kind, **options)


def _deflated_zeros(count: int) -> bytes:
    """Return zlib's form of zeros, of which it takes a thousandth."""
    packer, block = zlib.compressobj(1), bytes(1 << 20)
    pieces = [packer.compress(block) for _ in range(count >> 20)]
    return b"".join([*pieces, packer.compress(bytes(count & 0xFFFFF)), packer.flush()])


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


# Colour types of PNG, and their channels.
_GREY, _RGB, _PALETTE, _RGBA = 0, 2, 3, 6
_CHANNELS = {_GREY: 1, _RGB: 3, _PALETTE: 1, _RGBA: 4}


def _png(
    width: int, height: int, kind: int = _GREY, bits: int = 8, extra: bytes = b"", zeros: int | None = None
) -> bytes:
    """Return a black PNG; `zeros` says how many bytes its data become, where that is not what the size needs."""
    row = 1 + (width * bits * _CHANNELS[kind] + 7) // 8
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0))
    palette = _chunk(b"PLTE", bytes(3)) if kind == _PALETTE else b""
    data = _chunk(b"IDAT", _deflated_zeros(row * height if zeros is None else zeros))
    return b"\x89PNG\r\n\x1a\n" + header + palette + extra + data + _chunk(b"IEND", b"")


def _tiff(width: int, height: int, data: bytes, **changed: int) -> bytes:
    """Return a grey TIFF of one strip; `changed` are other values of its fields, or `count` of the strips."""
    count = changed.pop("count", 1)
    fields = {"packing": 1, "at": 8 + 2 + 9 * 12 + 4, "rows": height, "length": len(data), "next": 0} | changed
    entries = [(256, 1, width), (257, 1, height), (258, 1, 8), (259, 1, fields["packing"]), (262, 1, 1)]
    entries += [(273, count, fields["at"]), (277, 1, 1), (278, 1, fields["rows"]), (279, count, fields["length"])]
    table = b"".join(struct.pack("<HHII", tag, 4, number, value) for tag, number, value in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + table + struct.pack("<I", fields["next"]) + data


def _gif(width: int, height: int) -> bytes:
    """Return a GIF with a canvas of any size and a frame of one pixel."""
    frame = b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6) + frame + b";"


def _webp_canvas(width: int, height: int) -> bytes:
    """Return the head of an animated WebP with a canvas of any size."""
    size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + size + b"ANIM" + struct.pack("<I", 6) + bytes(6)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _jpeg_of_size(width: int, height: int) -> bytes:
    """Return a JPEG of some bytes that says to be of a size."""
    content = _black("RGB", 16, 16, "JPEG")
    at = content.index(b"\xff\xc0") + 5
    return content[:at] + struct.pack(">HH", height, width) + content[at + 4 :]


def _animated(kind: str, frames: int, size: int) -> bytes:
    images = [Image.new("RGB", (size, size), (number % 256, 0, 0)) for number in range(frames)]
    return _saved(images[0], kind, save_all=True, append_images=images[1:])


def _words(width: int, height: int) -> bytes:
    """Return a PPM whose samples are written as decimal numbers."""
    return b"P3 %d %d 255\n" % (width, height) + b"0 " * (3 * width * height)


# Few pixels by the limit of 25 megapixels, but resized with their shorter side to 128 they would be gigabytes.
THIN = _cached(
    {
        "png 1x20000": partial(_png, 1, 20_000),
        "png 20000x1": partial(_png, 20_000, 1),
        "png 1x400000 rgb": partial(_png, 1, 400_000, _RGB),
        "png 2x50000 rgba": partial(_png, 2, 50_000, _RGBA),
        "png 1x100000 palette": partial(_png, 1, 100_000, _PALETTE),
        "png 1x50000 16 bits": partial(_png, 1, 50_000, bits=16),
        "png 1000000x1 1 bit": partial(_png, 1_000_000, 1, bits=1),
        "png 1x25000000": partial(_png, 1, 25_000_000),
        "png 25000000x1": partial(_png, 25_000_000, 1),
        "jpeg 1x65500": partial(_black, "RGB", 1, 65_500, "JPEG"),
        "jpeg 65500x1": partial(_black, "L", 65_500, 1, "JPEG"),
        "gif 1x65535": partial(_black, "L", 1, 65_535, "GIF"),
        "webp 16383x1": partial(_black, "RGB", 16_383, 1, "WEBP"),
        "bmp 1x200000": partial(_black, "L", 1, 200_000, "BMP"),
        "tiff 1x500000": partial(_tiff, 1, 500_000, _deflated_zeros(500_000), packing=8),
        "pgm 1000000x1": partial(_black, "L", 1_000_000, 1, "PPM"),
        "pbm 1x100000": lambda: b"P4 1 100000\n" + bytes(100_000),
    }
)

# Files that say to be larger than they are, or that unpack to more than they say.
BOMBS = _cached(
    {
        "png 2147483647x2147483647": partial(_png, 2**31 - 1, 2**31 - 1, zeros=1000),
        "png 65535x65535": partial(_png, 65_535, 65_535, zeros=1000),
        "png 5001x5000": partial(_png, 5001, 5000, zeros=1000),
        "png without data": partial(_png, 64, 64, zeros=0),
        "png 0x0": partial(_png, 0, 0, zeros=10),
        "gif canvas 65535x65535": partial(_gif, 65_535, 65_535),
        "webp canvas 16384x16384": partial(_webp_canvas, 16_384, 16_384),
        "jpeg 65535x65535": partial(_jpeg_of_size, 65_535, 65_535),
        "bmp height -2147483648": lambda: b"BM" + struct.pack("<IIIIiiHH24x", 54, 0, 54, 40, 1, -(2**31), 1, 24),
        "tiff 100000x100000": partial(_tiff, 100_000, 100_000, bytes(1000)),
        "tiff strip far away": partial(_tiff, 64, 64, bytes(4096), at=2**32 - 8),
        "tiff of a million strips": partial(_tiff, 64, 64, bytes(4096), count=1_000_000),
        "tiff of four billion strips": partial(_tiff, 64, 64, bytes(4096), count=2**32 - 1),
        "ppm 99999x99999": lambda: b"P6 99999 99999 255\n",
        "ppm with endless digits": lambda: b"P6 " + b"9" * 100_000 + b" 1 255\n",
        "zip of zeros": lambda: b"PK\x03\x04" + _deflated_zeros(100 << 20),
    }
)

# Files that unpack to more than they need, or point in circles, and may yet be pictures.
ODD = _cached(
    {
        "png of 256 MiB of zeros": partial(_png, 64, 64, zeros=256 << 20),
        "png text of 100 MiB": partial(_png, 64, 64, extra=_chunk(b"zTXt", b"a\0\0" + _deflated_zeros(100 << 20))),
        "png profile of 100 MiB": partial(_png, 64, 64, extra=_chunk(b"iCCP", b"a\0\0" + _deflated_zeros(100 << 20))),
        "tiff of 256 MiB of zeros": partial(_tiff, 64, 64, _deflated_zeros(256 << 20), packing=8),
        "tiff in a circle": partial(_tiff, 64, 64, bytes(4096), next=8),
        "tiff rows 0": partial(_tiff, 64, 64, bytes(4096), rows=0),
        "tiff strip too long": partial(_tiff, 64, 64, bytes(4096), length=2**32 - 1),
        "animated webp": partial(_animated, "WEBP", 200, 64),
        "animated gif": partial(_animated, "GIF", 500, 64),
    }
)

# Pictures within the limits that take long to decode.
SLOW = _cached(
    {
        "png 4990x4990 16 bits": partial(_png, 4990, 4990, bits=16),
        "png 4990x4990 rgba": partial(_png, 4990, 4990, _RGBA),
        "png 4990x4990 rgb 16 bits": partial(_png, 4990, 4990, _RGB, bits=16),
        "ppm in words": partial(_words, 1_800, 1_800),
        "ppm in words, cut short": lambda: b"P3 4990 4990 255\n" + b"0 " * 9_000_000,
        "jpeg 4990x4990": partial(_black, "RGB", 4990, 4990, "JPEG", progressive=True),
        "gif 4990x4990": partial(_black, "L", 4990, 4990, "GIF"),
        "tiff 4990x4990": lambda: _tiff(4990, 4990, _deflated_zeros(4990 * 4990), packing=8),
    }
)


def mutated(rng: random.Random) -> bytes:
    """Return a picture that is cut short, with some bytes changed, or both."""
    content = bytearray(photo(rng.choice(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])))
    if rng.random() < 0.5:
        del content[rng.randrange(len(content)) :]
    for _ in range(rng.choice([0, 1, 8, 64])):
        if content:
            # the heads of the formats are where most can go wrong
            most = len(content) if rng.random() < 0.5 else min(len(content), 200)
            content[rng.randrange(most)] = rng.randrange(256)
    return bytes(content)


# JSON near the limit of a body.


def _filled(head: bytes, item: bytes, tail: bytes) -> bytes:
    """Return JSON that repeats an item until the body has JSON_BYTES."""
    count = (JSON_BYTES - 100 - len(head) - len(tail)) // (len(item) + 1)
    return head + (item + b",") * (count - 1) + item + tail


def _data(item: bytes) -> bytes:
    return _filled(b'{"inputs":[{"name":"image","shape":[1],"datatype":"UINT8","data":[', item, b"]}]}")


def _numbered(head: bytes, tail: bytes, count: int) -> bytes:
    return head + b",".join(b'"%x":0' % number for number in range(count)) + tail


_ONE_INPUT = b'{"inputs":[{"name":"image","shape":[1],"datatype":"UINT8","data":[1]}]'
_IN_DATA = b'{"inputs":[{"name":"image","shape":[1],"datatype":"BYTES","data":['
JSON = _cached(
    {
        "floats": partial(_data, b"0.5"),
        "integers": partial(_data, b"0"),
        "empty lists": partial(_data, b"[]"),
        "empty objects": partial(_data, b"{}"),
        "empty strings": partial(_data, b'""'),
        "escapes": partial(_data, b'"\\u0000"'),
        "nulls": partial(_data, b"null"),
        "numbers of 4,000 digits": partial(_data, b"9" * 4000),
        "one long number": lambda: _IN_DATA + b"9" * (JSON_BYTES - 200) + b"]}]}",
        "one long string": lambda: _IN_DATA + b'"' + b"A" * (JSON_BYTES - 200) + b'"]}]}',
        "lists in lists": lambda: _IN_DATA + b"[" * (JSON_BYTES - 200),
        "objects in objects": lambda: _IN_DATA + b'{"":' * ((JSON_BYTES - 200) // 4),
        "many parameters": partial(_numbered, _ONE_INPUT + b',"parameters":{', b"}}", 600_000),
        "many fields": partial(_numbered, _ONE_INPUT + b",", b"}", 600_000),
        "many inputs": partial(_filled, b'{"inputs":[', b"{}", b"]}"),
        "a long shape": partial(
            _filled, b'{"inputs":[{"name":"image","datatype":"UINT8","data":[1],"shape":[', b"1", b"]}]}"
        ),
        "spaces": lambda: _ONE_INPUT + b" " * (JSON_BYTES - 200) + b"}",
        "nothing but commas": lambda: _IN_DATA + b"," * (JSON_BYTES - 200),
    }
)


# Forms: a content type and a body.


def _part(disposition: bytes, content: bytes = b"0", extra: bytes = b"") -> bytes:
    return b"--b\r\nContent-Disposition: " + disposition + b"\r\n" + extra + b"\r\n" + content + b"\r\n"


_END = b"--b--\r\n"
_PLAIN = "multipart/form-data; boundary=b"


def _fields(name: bytes, count: int) -> bytes:
    return _part(b'form-data; name="%s"' % name) * count


def _with_image(*parts: bytes) -> bytes:
    return _part(b'form-data; name="image"; filename="x.png"', photo()) + b"".join(parts) + _END


FORMS: dict[str, tuple[str, Body]] = {
    "100,000 fields": (_PLAIN, cache(lambda: _with_image(*(_fields(b"f%d" % n, 1) for n in range(100_000))))),
    "100,000 targets": (_PLAIN, cache(lambda: _with_image(_fields(b"target", 100_000)))),
    "100,000 depths": (_PLAIN, cache(lambda: _with_image(_fields(b"depth", 100_000)))),
    "a field twice": (_PLAIN, lambda: _with_image(_fields(b"seed", 2))),
    "10,000 files": (_PLAIN, cache(lambda: _part(b'form-data; name="image"; filename="x"') * 10_000 + _END)),
    "a file of another name": (_PLAIN, lambda: _part(b'form-data; name="picture"; filename="x"', photo()) + _END),
    "a name of a megabyte": (_PLAIN, cache(lambda: _with_image(_fields(b"n" * (1 << 20), 1)))),
    "a value of ten megabytes": (_PLAIN, cache(lambda: _with_image(_part(b'form-data; name="seed"', b"1" * 10**7)))),
    "a header of a megabyte": (_PLAIN, cache(lambda: _with_image(_part(b"form-data", extra=b"X: " + b"x" * 10**6)))),
    "100,000 headers": (_PLAIN, cache(lambda: _with_image(_part(b"form-data", extra=b"X: y\r\n" * 100_000)))),
    "no name": (_PLAIN, lambda: _with_image(_part(b"form-data"))),
    "a name that is no UTF-8": (_PLAIN, lambda: _with_image(_fields(b"\xff\xfe\x00", 1))),
    "no boundary": ("multipart/form-data", lambda: _with_image()),
    "another boundary": ("multipart/form-data; boundary=c", lambda: _with_image()),
    "a boundary of 10,000 letters": ("multipart/form-data; boundary=" + "b" * 10_000, lambda: _with_image()),
    "nothing but dashes": (_PLAIN, cache(lambda: b"--b\r\n" * 1_000_000)),
    "a form in a form": (_PLAIN, lambda: _part(b'form-data; name="image"', _with_image()) + _END),
    "no end": (_PLAIN, lambda: _part(b'form-data; name="image"; filename="x.png"', photo()[:100])),
    "image as a field": (_PLAIN, lambda: _part(b'form-data; name="image"', b"0" * 65) + _END),
    "another type": ("text/plain; charset=\xff", photo),
}

# What follows /v1/explain?, where no value is one that may be.
QUERIES: dict[str, str] = {
    **{f"target {value[:12]}": f"target={value}" for value in ("--5", "%2B-5", "-%2B0", "%2B%2B1", "-11", "10", "1e0")},
    **{
        f"target {name}": f"target={value}"
        for name, value in (("²", "%C2%B2"), ("①", "%E2%91%A0"), ("no UTF-8", "%FF"))
    },
    "target NUL": "target=%00",
    "target of 150 digits": "target=" + "9" * 150,
    "target of 5,000 digits": "target=" + "9" * 5000,
    "target empty": "target=",
    "target twice": "target=1&target=1",
    "targets beyond the most": "&".join(f"target={n}" for n in range(11)),
    "1,000 targets": "&".join(f"target={n}" for n in range(1000)),
    **{
        f"n_samples {value[:8]}": f"n_samples={value}"
        for value in ("0", "-1", "1025", "1e3", "nan", "0x10", "9" * 5000)
    },
    **{f"top_k {value[:8]}": f"top_k={value}" for value in ("0", "-1", "11", "nan", "9" * 5000)},
    **{f"seed {value[:8]}": f"seed={value}" for value in (str(2**63), "-" + "9" * 5000, "1.5", "inf")},
    **{f"tolerance {value[:8]}": f"tolerance={value}" for value in ("nan", "inf", "-inf", "0", "1e999", "-0.0")},
    **{f"deadline {value[:8]}": f"deadline_ms={value}" for value in ("0", "-1", "nan", "1e9", "9" * 5000)},
    **{
        f"depth {value[:12]}": f"depth={value}"
        for value in (
            "nan",
            "inf",
            "-inf",
            "1e999",
            "--1",
            "5",
            "-6",
            "3-1",
            "0-99999999",
            "0-" + "9" * 400,
            "%00",
            ",",
        )
    },
    "depths beyond the most": "depth=" + ",".join(["0"] * 450),
    "10,000 depths": "depth=0&" * 5000 + "depth=1",
    "model that is a path": "model=../../../../etc/passwd",
    "model of 5,000 letters": "model=" + "m" * 5000,
    "an option that is none": "__class__=1",
    "image and body": "image=abc",
    "view that is none": "view=%F0%9F%98%80",
    "encoding that is none": "encoding=float64",
}


# Bytes that are no HTTP, or two requests in one.

_POST = b"POST /v1/explain HTTP/1.1\r\nhost: x\r\n"
_CHUNKED = _POST + b"transfer-encoding: chunked\r\n\r\n"
_SECOND = b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n"
GARBAGE: dict[str, Body] = {
    "TLS": lambda: b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "no method": lambda: b"/ HTTP/1.1\r\n\r\n",
    "no version": lambda: b"GET /\r\n\r\n",
    "version 9": lambda: b"GET / HTTP/9.9\r\nhost: x\r\n\r\n",
    "HTTP 2": lambda: b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "zeros": lambda: bytes(100) + b"\r\n\r\n",
    "a path of 200 kB": lambda: b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n",
    "a header of 200 kB": lambda: b"GET / HTTP/1.1\r\nx: " + b"a" * 200_000 + b"\r\n\r\n",
    "10,000 headers": lambda: b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 10_000 + b"\r\n",
    "a header without a colon": lambda: b"GET / HTTP/1.1\r\nhost\r\n\r\n",
    "a folded header": lambda: b"GET / HTTP/1.1\r\n x: y\r\nhost: x\r\n\r\n",
    "no host": lambda: b"GET / HTTP/1.1\r\n\r\n",
    "two hosts": lambda: b"GET / HTTP/1.1\r\nhost: x\r\nhost: y\r\n\r\n",
    "length of letters": lambda: _POST + b"content-length: abc\r\n\r\n",
    "length below 0": lambda: _POST + b"content-length: -1\r\n\r\n",
    "length +5": lambda: _POST + b"content-length: +5\r\n\r\nhello",
    "length of 5,000 digits": lambda: _POST + b"content-length: " + b"9" * 5000 + b"\r\n\r\n",
    "two lengths": lambda: _POST + b"content-length: 1\r\ncontent-length: 2\r\n\r\nxx",
    "chunk of no number": lambda: _CHUNKED + b"zz\r\nhello\r\n0\r\n\r\n",
    "chunk below 0": lambda: _CHUNKED + b"-1\r\nhello\r\n0\r\n\r\n",
    "chunk beyond all": lambda: _CHUNKED + b"f" * 40 + b"\r\nhello\r\n",
    "chunk without its end": lambda: _CHUNKED + b"2\r\nhello\r\n0\r\n\r\n",
    "a length and chunks": lambda: (
        _POST + b"content-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n" + _SECOND
    ),
    "chunks twice": lambda: _POST + b"transfer-encoding: chunked, chunked\r\n\r\n0\r\n\r\n" + _SECOND,
    "an encoding that is none": lambda: _POST + b"transfer-encoding: xchunked\r\n\r\n0\r\n\r\n" + _SECOND,
    "a method of 10,000 letters": lambda: b"A" * 10_000 + b" / HTTP/1.1\r\nhost: x\r\n\r\n",
    "CONNECT": lambda: b"CONNECT 127.0.0.1:22 HTTP/1.1\r\nhost: x\r\n\r\n",
    "an address elsewhere": lambda: b"GET http://127.0.0.1:1/x HTTP/1.1\r\nhost: x\r\n\r\n",
    "upgrade": lambda: b"GET /v1/explain HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n",
}


def cycle_of(table: Mapping[str, Any]) -> itertools.cycle[tuple[str, Any]]:
    """Return the rows of a table, again and again."""
    return itertools.cycle(list(table.items()))
