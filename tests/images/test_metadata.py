"""Orientation in every place where a file can state it, and metadata that must not stop a picture from being read."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from dave_fast.errors import ImageError, ImageWarning
from dave_fast.images import as_rgb, decode_image, read_mask
from dave_fast.images.png import read_header
from tests.images.files import png, stored, tiff

UPRIGHT = np.array([[20, 60, 100], [140, 180, 220]], np.uint8)
STORED = stored(UPRIGHT)
# Pixels are squares of this side, so that JPEG keeps them.
SIDE = 16
XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF><rdf:Description {}</rdf:RDF></x:xmpmeta>'
XMPS = {
    "attribute": XMP.format('tiff:Orientation="{}"/>'),
    "element": XMP.format("><tiff:Orientation>{}</tiff:Orientation></rdf:Description>"),
}


def stored(orientation):
    return np.ascontiguousarray(np.kron(STORED[orientation], np.ones((SIDE, SIDE), np.uint8)))


def exif_of(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def written(pixels, kind, **settings):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **settings)
    return file.getvalue()


def squares_of(content):
    """Return the grey of the middle of each square, and check the size."""
    pixels = np.asarray(decode_image(content, "a"))[..., 1].astype(int)
    return pixels[SIDE // 2 :: SIDE, SIDE // 2 :: SIDE]


def assert_upright(content, *, within=0):
    found = squares_of(content)
    assert found.shape == UPRIGHT.shape
    assert np.abs(found - UPRIGHT).max() <= within


WRITERS = {
    "JPEG": {"quality": 95},
    "MPO": {"quality": 95},
    "PNG": {},
    "TIFF": {},
    "WEBP": {"lossless": True},
    "AVIF": {"quality": 95},
}
LOSSY = ("JPEG", "MPO", "AVIF")


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("kind", WRITERS)
def test_exif_orientation(kind, orientation):
    content = written(stored(orientation), kind, exif=exif_of(orientation), **WRITERS[kind])
    assert_upright(content, within=6 if kind in LOSSY else 0)


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("form", XMPS)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_xmp_orientation(kind, form, orientation):
    xmp = XMPS[form].format(orientation).encode()
    if kind == "PNG":
        text = b"XML:com.adobe.xmp\0\0\0\0\0" + xmp
        content = png(stored(orientation)[..., None], 0, 8, before=[(b"iTXt", text)])
    elif kind == "TIFF":
        content = tiff(stored(orientation)[..., None], 1, 8, tags={700: ("B", list(xmp))})
    else:
        content = written(stored(orientation), kind, xmp=xmp, **WRITERS[kind])
    assert_upright(content, within=6 if kind in LOSSY else 0)


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("depth", [8, 16])
def test_exif_of_a_png(orientation, place, depth):
    block = exif_of(orientation).tobytes().removeprefix(b"Exif\0\0")
    pixels = stored(orientation)[..., None].astype(np.uint32) * (257 if depth == 16 else 1)
    assert_upright(png(pixels, 0, depth, **{place: [(b"eXIf", block)]}))


@pytest.mark.parametrize("orientation", STORED)
def test_transparent_sample_of_a_turned_png(orientation):
    block = exif_of(orientation).tobytes().removeprefix(b"Exif\0\0")
    samples = np.repeat(stored(orientation)[..., None].astype(np.uint32) * 257, 3, axis=2)
    key = struct.pack(">3H", *[180 * 257] * 3)
    found = squares_of(png(samples, 2, 16, before=[(b"tRNS", key), (b"eXIf", block)]))
    assert (found == np.where(UPRIGHT == 180, 255, UPRIGHT)).all()


@pytest.mark.parametrize("orientation", [0, 9, 10, 255, 65535])
@pytest.mark.parametrize("kind", WRITERS)
def test_orientation_that_does_not_exist_is_none(kind, orientation):
    content = written(stored(1), kind, exif=exif_of(orientation), **WRITERS[kind])
    assert_upright(content, within=6 if kind in LOSSY else 0)


@pytest.mark.parametrize(
    "value", [("B", [6]), ("H", [6]), ("L", [6]), ("f", [6.0])], ids=["byte", "short", "long", "float"]
)
def test_orientation_of_another_type(value):
    assert_upright(tiff(stored(6)[..., None], 1, 8, tags={274: value}))


@pytest.mark.parametrize("value", [("s", b"6\0"), ("s", b"up\0"), ("f", [0.5])], ids=["digit", "word", "half"])
def test_orientation_that_is_no_number_is_none(value):
    assert_upright(tiff(stored(1)[..., None], 1, 8, tags={274: value}))


@pytest.mark.parametrize("value", [("s", b"<x/>\0"), ("L", [1, 2, 3]), ("B", [7]), ("f", [0.5])])
def test_xmp_of_a_wrong_type_is_left_out(value):
    assert_upright(tiff(stored(1)[..., None], 1, 8, tags={700: value}))


@pytest.mark.parametrize("block", [b"", b"x", b"no exif at all", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff"])
def test_broken_exif_leaves_the_picture_as_it_is(block):
    content = png(stored(1)[..., None], 0, 8, before=[(b"eXIf", block)])
    notes = []
    found = np.asarray(decode_image(content, "a.png", note=notes.append))
    assert (found[..., 0] == stored(1)).all()
    assert all("EXIF data cannot be read" in each for each in notes)


def test_unreadable_exif_is_noted():
    content = png(stored(1)[..., None], 0, 8, before=[(b"eXIf", b"no exif at all")])
    with pytest.warns(ImageWarning, match=r"^a.png: its EXIF data cannot be read \(.+\): it is taken to be upright\.$"):
        decode_image(content, "a.png")


# Long texts and profiles.

MEBIBYTE = 1 << 20


def text(kind, key, value):
    """Return a chunk of text: as it is, or in zTXt and with key "zip" in iTXt compressed."""
    if kind == "tEXt":
        return b"tEXt", key + b"\0" + value
    if kind == "zTXt":
        return b"zTXt", key + b"\0\0" + zlib.compress(value)
    if kind == "iCCP":
        return b"iCCP", key + b"\0\0" + zlib.compress(value)
    packed = kind == "iTXt-compressed"
    return b"iTXt", key + b"\0" + bytes([packed, 0]) + b"\0\0" + (zlib.compress(value) if packed else value)


TEXTS = ["tEXt", "zTXt", "iTXt", "iTXt-compressed", "iCCP"]
SIZES = [10, 2000, MEBIBYTE, MEBIBYTE + 1, 3 * MEBIBYTE]


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", TEXTS)
def test_long_text_does_not_stop_a_picture(kind, size, place):
    content = png(stored(1)[..., None], 0, 8, **{place: [text(kind, b"Comment", b"a" * size)]})
    assert_upright(content)


@pytest.mark.parametrize("kind", ["tEXt", "zTXt"])
def test_many_texts_do_not_stop_a_picture(kind):
    chunks = [text(kind, b"Comment", b"a" * 1_000_000)] * 70
    assert_upright(png(stored(1)[..., None], 0, 8, before=chunks))


@pytest.mark.parametrize("kind", ["iTXt", "iTXt-compressed"])
@pytest.mark.parametrize("form", XMPS)
@pytest.mark.parametrize("padding", [0, 1500, 50_000, 900_000])
def test_orientation_stands_beside_long_texts(kind, form, padding):
    xmp = XMPS[form].format(6).encode() + b" " * padding
    long = text("zTXt", b"Comment", b"a" * 3 * MEBIBYTE)
    chunks = [long, text(kind, b"XML:com.adobe.xmp", xmp), long]
    assert_upright(png(stored(6)[..., None], 0, 8, before=chunks))


@pytest.mark.parametrize("kind", ["tEXt", "zTXt"])
def test_orientation_in_a_raw_profile(kind):
    block = exif_of(6).tobytes() + bytes(2000)
    value = f"\nexif\n{len(block):8}\n{block.hex()}\n".encode()
    chunks = [text(kind, b"Raw profile type exif", value), text("zTXt", b"Comment", b"a" * 3 * MEBIBYTE)]
    assert_upright(png(stored(6)[..., None], 0, 8, before=chunks))


def test_xmp_that_expands_beyond_the_limit_is_left_out():
    xmp = text("iTXt-compressed", b"XML:com.adobe.xmp", b"x" * 20 * MEBIBYTE)
    assert_upright(png(stored(1)[..., None], 0, 8, before=[xmp]))


def test_file_without_texts_is_not_copied():
    file = io.BytesIO(png(stored(1)[..., None], 0, 8))
    header, same = read_header(file)
    assert header.depth == 8 and same is file


DAMAGED = [
    (b"gAMA", b""),
    (b"cHRM", b"\0" * 4),
    (b"sRGB", b""),
    (b"pHYs", b"\0\0"),
    (b"bKGD", b""),
    (b"iCCP", b"name\0\7data"),
    (b"iCCP", b"name"),
    (b"zTXt", b"key\0\7data"),
    (b"zTXt", b"key"),
    (b"zTXt", b""),
    (b"iTXt", b"key\0\1\7\0\0data"),
    (b"iTXt", b"XML:com.adobe.xmp\0"),
    (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0no zlib"),
    (b"zTXt", b"Raw profile type exif\0"),
    (b"tEXt", b"Raw profile type exif\0not hexadecimal"),
    (b"tEXt", b"no end of the keyword"),
    (b"prVt", b"a private chunk"),
]


@pytest.mark.filterwarnings("ignore::dave_fast.errors.ImageWarning")
@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("damaged", DAMAGED, ids=str)
def test_malformed_chunk_without_pixels_does_not_stop_a_picture(damaged, place):
    assert_upright(png(stored(1)[..., None], 0, 8, **{place: [damaged]}))


@pytest.mark.parametrize("kind", [b"gAMA", b"pHYs", b"tEXt", b"iTXt", b"eXIf", b"iCCP", b"tIME", b"prVt"])
def test_wrong_checksum_of_a_chunk_without_pixels_does_not_stop_a_picture(kind):
    content = png(stored(1)[..., None], 0, 8, before=[(kind, b"12345678\0")])
    at = content.index(kind) + 4
    assert_upright(content[:at] + b"x" + content[at + 1 :])


@pytest.mark.parametrize("kind", [b"IHDR", b"tRNS", b"IDAT"])
def test_wrong_checksum_of_a_chunk_with_pixels_is_refused(kind):
    content = png(stored(1)[..., None], 0, 8, before=[(b"tRNS", b"\0\7")])
    end = content.index(kind) + 4 + {b"IHDR": 13, b"tRNS": 2}.get(kind, 0)
    damaged = content[:end] + bytes([content[end] ^ 1]) + content[end + 1 :]
    with pytest.raises(ImageError, match=r"^cannot read a\.png: "):
        decode_image(damaged, "a.png")


def test_limits_of_pillow_are_left_as_they_were():
    before = PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
    decode_image(png(stored(1)[..., None], 0, 8, before=[text("zTXt", b"a", b"a" * 3 * MEBIBYTE)]), "a.png")
    assert before == (PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG", "TIFF", "AVIF"])
@pytest.mark.parametrize("size", [100, 100_000, 3 * MEBIBYTE])
def test_long_profile_does_not_stop_a_picture(kind, size):
    content = written(stored(1), kind, icc_profile=bytes(range(256)) * (size // 256), **WRITERS[kind])
    assert_upright(content, within=6 if kind in LOSSY else 0)


@pytest.mark.parametrize("kind", ["JPEG", "GIF"])
def test_long_comment_does_not_stop_a_picture(kind):
    content = written(stored(1), kind, comment=b"a" * 60_000, **WRITERS.get(kind, {}))
    assert_upright(content, within=6 if kind in LOSSY else 0)


def test_long_description_of_a_tiff_does_not_stop_a_picture():
    assert_upright(tiff(stored(1)[..., None], 1, 8, tags={270: ("s", b"a" * 3 * MEBIBYTE + b"\0")}))


@pytest.mark.parametrize("cut", [20, 40, 60, -30])
def test_png_that_is_cut_off_is_refused_in_words(cut):
    content = png(stored(1)[..., None], 0, 8, before=[text("zTXt", b"a", b"a" * 3 * MEBIBYTE)])
    with pytest.raises(ImageError, match=r"^cannot read a\.png: .+\.$"):
        decode_image(content[:cut], "a.png")


def test_picture_opened_with_pillow_is_turned_upright():
    with Image.open(io.BytesIO(written(stored(6), "PNG", exif=exif_of(6)))) as image:
        assert (np.asarray(as_rgb(image))[..., 0] == stored(1)).all()


def test_mask_with_a_long_text_is_read(tmp_path):
    samples = np.array([[[0], [1]]], np.uint32)
    (tmp_path / "a.png").write_bytes(png(samples, 0, 16, before=[text("zTXt", b"a", b"a" * 3 * MEBIBYTE)]))
    assert read_mask(tmp_path / "a.png").tolist() == [[False, True]]


def test_bytes_behind_the_end_of_a_png_are_no_chunks():
    assert_upright(png(stored(1)[..., None], 0, 8) + struct.pack(">I", 1 << 20) + b"zTXt" + bytes(100))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_with_two_headers(kind):
    content = written(stored(6), kind, exif=b"Exif\0\0" + exif_of(6).tobytes(), **WRITERS[kind])
    assert_upright(content, within=6 if kind in LOSSY else 0)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_does_not_stop_a_picture(kind, seed):
    random = np.random.default_rng(seed)
    exif = exif_of(1)
    exif[271] = "maker"
    exif.get_ifd(0x8769)[33434] = 0.5
    block = bytearray(exif.tobytes())
    for place in random.integers(6, len(block), 5):
        block[place] = random.integers(0, 256)
    content = written(stored(1), kind, exif=bytes(block[: random.integers(20, len(block))]), **WRITERS[kind])
    with warnings.catch_warnings():
        # Pillow's own words on damaged data.
        warnings.simplefilter("ignore")
        decode_image(content, "a")
