"""Damaged picture files: small whole ones of every format, and mutations of them by a seed."""

from __future__ import annotations

import io
import random
import struct
import zlib
from functools import cache

import numpy as np
from PIL import Image

from tests.images.files import PNG_SIGNATURE, chunk, png, tiff

EXTREMES = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)
SIZE = (19, 13)


def _save(image, kind, **settings):
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


@cache
def seeds() -> dict[str, bytes]:
    """Return whole files by name."""
    random_ = np.random.default_rng(1)
    colours = random_.integers(0, 256, (SIZE[1], SIZE[0], 4), np.uint8)
    rgba = Image.fromarray(colours)
    rgb, grey = rgba.convert("RGB"), rgba.convert("L")
    by_mode = {
        "1": grey.convert("1"),
        "L": grey,
        "LA": rgba.convert("LA"),
        "P": rgb.quantize(16),
        "RGB": rgb,
        "RGBA": rgba,
        "CMYK": rgb.convert("CMYK"),
        "YCbCr": rgb.convert("YCbCr"),
        "I;16": Image.fromarray(random_.integers(0, 65536, SIZE[::-1], np.uint16)),
        "I": Image.fromarray(random_.integers(0, 1 << 30, SIZE[::-1], np.int32)),
        "F": Image.fromarray(random_.random(SIZE[::-1], np.float32)),
    }
    written = {
        "BMP": "1 L RGB RGBA P",
        "DDS": "L RGB RGBA",
        "GIF": "1 L P RGB",
        "ICO": "RGBA P",
        "ICNS": "RGBA",
        "JPEG": "L RGB CMYK",
        "JPEG2000": "L RGB RGBA I;16",
        "MSP": "1",
        "PCX": "1 L RGB P",
        "PPM": "1 L RGB I;16 F",
        "QOI": "RGB RGBA",
        "SGI": "L RGB RGBA",
        "SPIDER": "F",
        "TGA": "1 L LA RGB RGBA P",
        "WEBP": "RGB RGBA P",
        "AVIF": "RGB RGBA",
        "XBM": "1",
        "BLP": "P",
    }
    found = {f"{kind} {mode}": _save(by_mode[mode], kind) for kind, modes in written.items() for mode in modes.split()}
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x9286] = b"comment" * 4
    oriented = {"exif": exif.tobytes(), "icc_profile": bytes(200)}
    for kind in ("JPEG", "WEBP", "PNG", "AVIF"):
        found[f"{kind} oriented"] = _save(rgb, kind, **oriented)
    found["JPEG progressive"] = _save(rgb, "JPEG", progressive=True, optimize=True)
    found["MPO"] = _save(rgb, "MPO", save_all=True, append_images=[rgb])
    found["GIF animated"] = _save(by_mode["P"], "GIF", save_all=True, append_images=[grey.convert("P")], duration=9)
    found["WEBP lossless"] = _save(rgba, "WEBP", lossless=True)
    found["PNG animated"] = _save(rgba, "PNG", save_all=True, append_images=[rgba.rotate(180)])
    found["TGA packed"] = _save(rgb, "TGA", compression="tga_rle")
    found["DDS packed"] = _save(rgba.resize((16, 16)), "DDS", pixel_format="DXT5")
    for mode in ("1", "L", "LA", "RGB", "RGBA", "CMYK", "YCbCr", "P", "I;16", "I", "F"):
        found[f"TIFF {mode}"] = _save(by_mode[mode], "TIFF")
    for packing in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "zstd", "lzma"):
        found[f"TIFF {packing}"] = _save(rgb, "TIFF", compression=packing)
    for packing in ("group3", "group4"):
        found[f"TIFF {packing}"] = _save(by_mode["1"], "TIFF", compression=packing)
    deep = random_.integers(0, 65536, (SIZE[1], SIZE[0], 4)).astype(np.uint16)
    found["TIFF tiles"] = tiff(colours[..., :3], 2, 8, tile=16)
    found["TIFF planes"] = tiff(colours[..., :3], 2, 8, planar=True, order=">")
    found["TIFF deep"] = tiff(deep[..., :3], 2, 16, compression=8)
    for colour, depths, channels in (
        (0, (1, 2, 4, 8, 16), 1),
        (2, (8, 16), 3),
        (3, (1, 2, 4, 8), 1),
        (4, (8, 16), 2),
        (6, (8, 16), 4),
    ):
        for depth in depths:
            for interlaced in (False, True):
                samples = deep[..., :channels] & ((1 << depth) - 1)
                before = [(b"PLTE", bytes(range(3 << min(depth, 6)))), (b"tRNS", b"\0\x80")] if colour == 3 else []
                if colour in (0, 2) and depth != 4:
                    before = [(b"tRNS", bytes(2 * channels))]
                found[f"PNG {colour} {depth} {interlaced}"] = png(
                    samples, colour, depth, before=before, interlaced=interlaced
                )
    text = [(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n  8\n4d4d002a00000008"))]
    text += [(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation='3'/>"), (b"eXIf", exif.tobytes()[6:])]
    text += [(b"iCCP", b"a\0\0" + zlib.compress(bytes(99))), (b"sBIT", b"\5\5\5"), (b"gAMA", b"\0\0\1\1")]
    found["PNG text"] = png(colours[..., :3].astype(np.uint16), 2, 8, before=text)
    found["PPM plain"] = b"P3\n# a\n3 2 255\n" + b" ".join(b"%d" % each for each in range(18))
    found["PGM plain"] = b"P2 4 2 65535 1 2 3 4 5 6 7 65535"
    found["PBM plain"] = b"P1 4 2 1 0 1 0 0 1 0 1"
    found["PFM"] = b"PF\n2 2\n-1.0\n" + struct.pack("<12f", *range(12))
    found["PAM"] = b"P7\nWIDTH 2\nHEIGHT 2\nDEPTH 3\nMAXVAL 255\nTUPLTYPE RGB\nENDHDR\n" + bytes(12)
    found["XPM"] = b'/* XPM */\nstatic char *a[] = {\n"2 2 2 1",\n"a c #ff0000",\n"b c #00ff00",\n"ab",\n"ba"\n};\n'
    cards = ("SIMPLE  = T", "BITPIX  = 8", "NAXIS   = 2", "NAXIS1  = 4", "NAXIS2  = 3", "END")
    found["FITS"] = b"".join(card.ljust(80).encode() for card in cards).ljust(2880) + bytes(range(12)).ljust(2880)
    found["SUN"] = struct.pack(">8I", 0x59A66A95, 8, 4, 24, 96, 1, 0, 0) + bytes(96)
    found["PSD"] = b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 4, 4, 8, 3) + bytes(12) + b"\0\0" + bytes(48)
    return found


@cache
def bombs() -> dict[str, bytes]:
    """Return small files that claim or unpack to very much."""
    pixels = np.zeros((4, 4, 3), np.uint16)
    zeros = zlib.compress(bytes(200 << 20), 9)
    found = {
        f"PNG bomb {kind.decode()}": png(pixels, 2, 8, before=[(kind, head + zeros)])
        for kind, head in (
            (b"zTXt", b"a\0\0"),
            (b"zTXt", b"Raw profile type exif\0\0"),
            (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0"),
            (b"iCCP", b"a\0\0"),
        )
    }
    exif_loop = b"MM\0*\0\0\0\x08" + struct.pack(">HHHII", 1, 0x8769, 4, 1, 8) + struct.pack(">I", 8)
    found["PNG exif loop"] = png(pixels, 2, 8, before=[(b"eXIf", exif_loop)])
    found["PNG many texts"] = png(pixels, 2, 8, before=[(b"tEXt", b"Raw profile type exif\0" + bytes(30))] * 20_000)
    found["PNG idat bomb"] = PNG_SIGNATURE + b"".join(
        chunk(kind, body)
        for kind, body in (
            (b"IHDR", struct.pack(">IIBBBBB", 4, 4, 8, 2, 0, 0, 0)),
            (b"IDAT", zeros),
            (b"IEND", b""),
        )
    )
    grey = np.zeros((4, 4, 1), np.uint16)
    one = tiff(grey, 1, 8)
    # The next directory is the first again.
    found["TIFF loop"] = one[:-4] + one[4:8]
    found["TIFF sub loop"] = tiff(grey, 1, 8, tags={330: ("L", [8]), 34665: ("L", [8])})
    for tag in (256, 257, 258, 273, 277, 278, 279, 320, 330, 338, 700, 34675):
        for code, values in (("L", [0xFFFFFFFF]), ("L", [0]), ("H", [65535] * 5), ("B", [1] * 100_000)):
            found[f"TIFF tag {tag} {code} {len(values)} {values[0]}"] = tiff(grey, 1, 8, tags={tag: (code, values)})
    found["TIFF 65535 samples"] = tiff(grey, 1, 8, tags={277: ("H", [65535]), 258: ("H", [8] * 65535)})
    for width, height in ((65535, 65535), (1, 65535), (65535, 1)):
        found[f"GIF canvas {width}×{height}"] = b"GIF89a" + struct.pack("<HH", width, height) + seeds()["GIF P"][10:]
        found[f"JPEG {width}×{height}"] = _sized_jpeg(width, height)
    found["GIF many empty blocks"] = seeds()["GIF P"][:13] + b"!\xfe\1a\0" * 200_000
    found["PPM wide"] = b"P6 999999999999999999999 1 255\n" + bytes(99)
    found["PPM long number"] = b"P6 " + b"1" * 1_000_000
    found["PPM long comment"] = b"P6 #" + b"a" * 5_000_000
    found["XPM colours"] = b'/* XPM */\n"2 2 999999999 1",\n' + b'"a c #000000",\n' * 100_000
    found["PPM many comments"] = b"P3\n" + b"#\n" * 500_000 + b"1 1 255 1 1 1"
    return found


def _sized_jpeg(width, height):
    content = bytearray(seeds()["JPEG RGB"])
    at = content.index(b"\xff\xc0")
    content[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(content)


def mutant(seed: int) -> tuple[str, bytes]:
    """Return the name and the bytes of a damaged file."""
    random_ = random.Random(seed)
    # One format after the other, so that few mutants meet all of them.
    names = sorted(seeds())
    name = names[seed % len(names)]
    content = bytearray(seeds()[name])
    for _ in range(random_.choice((1, 1, 2, 4))):
        change = random_.choice(_CHANGES)
        content = change(content, random_) if content else content
    repaired = _repaired(bytes(content)) if name.startswith("PNG") and random_.random() < 0.8 else bytes(content)
    return name, repaired


def _flip(content, random_):
    for _ in range(random_.randint(1, 8)):
        content[random_.randrange(len(content))] ^= 1 << random_.randrange(8)
    return content


def _run(content, random_):
    start, length = random_.randrange(len(content)), random_.randint(1, 40)
    part = content[start : start + length]
    content[start : start + length] = bytes([random_.choice((0, 255))]) * len(part)
    return content


def _cut(content, random_):
    return content[: random_.randrange(len(content))]


def _splice(content, random_):
    other = random_.choice(list(seeds().values()))
    return content[: random_.randrange(len(content))] + other[random_.randrange(len(other)) :]


def _repeat(content, random_):
    start = random_.randrange(len(content))
    part = content[start : start + random_.randint(1, 200)]
    return content[:start] + part * random_.choice((2, 3, 300)) + content[start:]


def _field(content, random_):
    """Set a number, in the header more often than elsewhere, to an extreme."""
    form = random_.choice(("<H", ">H", "<I", ">I", "B"))
    length = struct.calcsize(form)
    start = random_.randrange(min(len(content), random_.choice((30, 60, len(content)))))
    if start + length <= len(content):
        struct.pack_into(form, content, start, random_.choice(EXTREMES) & ((1 << 8 * length) - 1))
    return content


def _digits(content, random_):
    """Set a number in text to an extreme."""
    places = [place for place in range(min(len(content), 3000)) if chr(content[place]).isdigit()]
    if not places:
        return _field(content, random_)
    place = random_.choice(places)
    return content[:place] + str(random_.choice((-1, *EXTREMES, 10**30))).encode() + content[place + 1 :]


_CHANGES = (_flip, _run, _cut, _splice, _repeat, _field, _field, _field, _digits)


def _repaired(content):
    """Return a PNG with the checksums that its chunks should have."""
    fixed, place = bytearray(content), 8
    while place + 12 <= len(fixed):
        (length,) = struct.unpack_from(">I", fixed, place)
        end = place + 8 + length
        if end + 4 > len(fixed):
            break
        struct.pack_into(">I", fixed, end, zlib.crc32(fixed[place + 4 : end]))
        place = end + 4
    return bytes(fixed)
