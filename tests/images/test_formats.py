"""Every mode that Pillow writes, in every format that takes it, against pixels known beforehand."""

import io
import struct

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageFile

from dave_fast.errors import ImageError
from dave_fast.images import as_rgb, decode_image, is_image, read_image, read_mask
from dave_fast.images.finding import readable_formats
from dave_fast.images.reading import decoding_bytes
from tests.images.files import png, tiff

# Squares of one colour, of this side: formats that lose detail keep them.
SIDE = 16
ROWS, COLUMNS = 4, 5
RANDOM = np.random.default_rng(5)
GREY = RANDOM.integers(0, 256, (ROWS, COLUMNS), np.uint8)
COLOUR = RANDOM.integers(0, 256, (ROWS, COLUMNS, 4), np.uint8)
ALPHA = RANDOM.integers(0, 256, (ROWS, COLUMNS), np.uint8)
ALPHA[0, :3] = 0, 255, 128
GREY[0, :4] = 0, 255, 1, 254
PALETTE = RANDOM.integers(0, 256, (ROWS * COLUMNS, 3), np.uint8)
INDEX = np.arange(ROWS * COLUMNS, dtype=np.uint8).reshape(ROWS, COLUMNS)


def squares(values):
    return np.ascontiguousarray(np.repeat(np.repeat(values, SIDE, axis=0), SIDE, axis=1))


def on_white(colours, alpha):
    share = alpha[..., None] / 255
    return colours * share + 255 * (1 - share)


def grey3(values):
    return np.repeat(np.asarray(values, np.float64)[..., None], 3, axis=2)


def palette_image(mode="P"):
    image = Image.fromarray(squares(INDEX), "P")
    image.putpalette(PALETTE.ravel().tolist())
    if mode == "PA":
        image = image.convert("PA")
        image.putalpha(Image.fromarray(squares(ALPHA)))
    return image


def channels(mode, *arrays):
    return Image.merge(mode, [Image.fromarray(squares(each)) for each in arrays])


def pictures():
    """Return {mode: (the image, the picture that it is, (ROWS, COLUMNS, 3) in 0..255)}."""
    c, m, y, k = (COLOUR[..., i].astype(float) for i in range(4))
    blue, red = m - 128, y - 128
    of_ycc = np.stack([c + 1.402 * red, c - 0.344136 * blue - 0.714136 * red, c + 1.772 * blue], axis=2)
    rgb = COLOUR[..., :3].astype(float)
    return {
        "1": (Image.fromarray(squares(GREY > 100)), grey3((GREY > 100) * 255)),
        "L": (Image.fromarray(squares(GREY)), grey3(GREY)),
        "LA": (channels("LA", GREY, ALPHA), on_white(grey3(GREY), ALPHA)),
        "RGB": (channels("RGB", *np.moveaxis(COLOUR[..., :3], 2, 0)), rgb),
        "RGBA": (channels("RGBA", *np.moveaxis(COLOUR[..., :3], 2, 0), ALPHA), on_white(rgb, ALPHA)),
        "RGBX": (channels("RGBX", *np.moveaxis(COLOUR, 2, 0)), rgb),
        "CMYK": (
            channels("CMYK", *np.moveaxis(COLOUR, 2, 0)),
            np.stack([(255 - v) * (255 - k) / 255 for v in (c, m, y)], 2),
        ),
        "YCbCr": (channels("YCbCr", *np.moveaxis(COLOUR[..., :3], 2, 0)), of_ycc.clip(0, 255)),
        "P": (palette_image(), PALETTE[INDEX].astype(float)),
        "PA": (palette_image("PA"), on_white(PALETTE[INDEX].astype(float), ALPHA)),
        "I;16": (Image.fromarray(squares(GREY.astype(np.uint16) * 257)), grey3(GREY)),
        "I": (Image.fromarray(squares(GREY.astype(np.int32))), grey3(GREY)),
        "F": (Image.fromarray(squares(GREY.astype(np.float32) / 255)), grey3(GREY)),
        "RGBa": (channels("RGBa", *np.minimum(np.moveaxis(COLOUR[..., :3], 2, 0), ALPHA), ALPHA), None),
        "La": (channels("La", np.minimum(GREY, ALPHA), ALPHA), None),
    }


PICTURES = pictures()
# The modes whose pixels a format keeps, and how it is written.
FORMATS = {
    "BMP": ("1 L RGB P", {}),
    "DIB": ("1 L RGB P", {}),
    "DDS": ("L LA RGB RGBA", {}),
    "GIF": ("1 L P RGB", {}),
    "ICO": ("1 L LA RGB RGBA P I;16", {"sizes": [(COLUMNS * SIDE, ROWS * SIDE)]}),
    "JPEG": ("L RGB CMYK", {"quality": 97, "subsampling": 0}),
    "JPEG2000": ("L LA RGB RGBA CMYK I;16", {}),
    "MPO": ("L RGB CMYK", {"quality": 97}),
    "MSP": ("1", {}),
    "PCX": ("1 L RGB P", {}),
    "PNG": ("1 L LA RGB RGBA P I;16", {}),
    "PPM": ("1 L RGB I;16 F", {}),
    "QOI": ("RGB RGBA", {}),
    "SGI": ("L RGB RGBA", {}),
    "SPIDER": ("L F", {}),
    "TGA": ("1 L LA RGB RGBA P", {}),
    "TIFF": ("1 L LA RGB RGBA RGBX CMYK YCbCr P PA I;16 I F", {}),
    "WEBP": ("1 L LA RGB RGBA P", {"lossless": True, "exact": True}),
    "AVIF": ("L LA RGB RGBA P", {"quality": 95, "subsampling": "4:4:4"}),
    "XBM": ("1", {}),
    "BLP": ("P", {}),
}
LOSSY = {"JPEG": 5, "MPO": 8, "AVIF": 12}
CASES = [(kind, mode) for kind, (modes, _) in FORMATS.items() for mode in modes.split()]


def written(image, kind, **settings):
    file = io.BytesIO()
    image.save(file, kind, **FORMATS[kind][1], **settings)
    return file.getvalue()


def colours_of(image):
    """Return the colour in the middle of each square."""
    pixels = np.asarray(image)
    assert pixels.shape == (ROWS * SIDE, COLUMNS * SIDE, 3) and image.mode == "RGB"
    return pixels[SIDE // 2 :: SIDE, SIDE // 2 :: SIDE].astype(float)


@pytest.mark.parametrize(("kind", "mode"), CASES)
def test_mode_of_a_format(kind, mode):
    image, expected = PICTURES[mode]
    found = colours_of(decode_image(written(image, kind), "a"))
    assert np.abs(found - expected).max() <= LOSSY.get(kind, 1)


# Pillow writes colour differences uncompressed only.
COMPRESSED = [
    (mode, compression)
    for mode in FORMATS["TIFF"][0].split()
    for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits")
    if mode != "YCbCr" or compression == "raw"
]


@pytest.mark.parametrize(("mode", "compression"), COMPRESSED)
def test_mode_of_a_compressed_tiff(mode, compression):
    image, expected = PICTURES[mode]
    found = colours_of(decode_image(written(image, "TIFF", compression=compression), "a"))
    assert np.abs(found - expected).max() <= 1


@pytest.mark.parametrize("compression", ["group3", "group4", "tiff_ccitt"])
def test_fax(compression):
    image, expected = PICTURES["1"]
    assert (colours_of(decode_image(written(image, "TIFF", compression=compression), "a")) == expected).all()


@pytest.mark.parametrize("mode", PICTURES)
def test_picture_from_memory(mode):
    image, expected = PICTURES[mode]
    if expected is None:
        # Colours that are multiplied by their alpha only need what is missing.
        premultiplied = np.asarray(image)[SIDE // 2 :: SIDE, SIDE // 2 :: SIDE].astype(float)
        colours = premultiplied[..., :-1]
        colours = np.repeat(colours, 3, axis=2) if mode == "La" else colours
        expected = colours + 255 - premultiplied[..., -1:]
    assert np.abs(colours_of(as_rgb(image)) - expected).max() <= 2


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "ICO", "TIFF"])
@pytest.mark.parametrize("index", [0, 7, ROWS * COLUMNS - 1])
def test_transparent_entry_of_a_palette(kind, index):
    image, expected = palette_image(), PALETTE[INDEX].astype(float)
    if kind in ("TIFF", "WEBP"):
        # They have no transparent entry.
        image.info["transparency"] = index
        image = image.convert("RGBA")
        content = written(image, kind)
    else:
        content = written(image, kind, transparency=index)
    expected[index == INDEX] = 255
    assert np.abs(colours_of(decode_image(content, "a")) - expected).max() <= 1


@pytest.mark.parametrize("bpc", [1, 2])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_sgi(mode, bpc):
    image, expected = PICTURES[mode]
    assert np.abs(colours_of(decode_image(written(image, "SGI", bpc=bpc), "a")) - expected).max() <= 1


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P"])
def test_icns(mode):
    image, expected = PICTURES[mode]
    if mode == "P":
        image = image.copy()
        image.info["transparency"] = 3
        expected = np.where((INDEX == 3)[..., None], 255.0, expected)
    file = io.BytesIO()
    image.resize((128, 128), Image.Resampling.NEAREST).save(file, "PNG")
    content = file.getvalue()
    # One picture of 128 x 128, as PNG.
    icon = b"icns" + struct.pack(">I", 16 + len(content)) + b"ic07" + struct.pack(">I", 8 + len(content)) + content
    pixels = np.asarray(decode_image(icon, "a")).astype(float)
    rows, columns = ((np.arange(n) + 0.5) * 128 // n for n in (ROWS, COLUMNS))
    assert np.abs(pixels[rows.astype(int)][:, columns.astype(int)] - expected).max() <= 1


@pytest.mark.parametrize("adobe", [True, False], ids=["adobe", "plain"])
def test_cmyk_of_a_jpeg_is_inverted(adobe):
    image, expected = PICTURES["CMYK"]
    content = written(image, "JPEG")
    at = content.index(b"\xff\xee")
    if not adobe:
        content = content[:at] + content[at + 2 + struct.unpack(">H", content[at + 2 : at + 4])[0] :]
    assert np.abs(colours_of(decode_image(content, "a")) - expected).max() <= 5


# GIF: pixels that the first frame does not cover.


def gif(background, transparent=None, *, palette=True):
    """Return a GIF of 4 x 4 pixels whose frame covers the middle four, with colour 1."""
    colours = bytes([255, 0, 0, 0, 255, 0, 0, 0, 255, 10, 20, 30])
    screen = struct.pack("<HHBBB", 4, 4, 0x81 if palette else 0, background, 0) + (colours if palette else b"")
    control = b"" if transparent is None else b"\x21\xf9\x04" + bytes([1, 0, 0, transparent, 0])
    frame = b"," + struct.pack("<HHHHB", 1, 1, 2, 2, 0 if palette else 0x81) + (b"" if palette else colours)
    # Clear, four ones, end: codes of three bits, and of four once eight codes are known.
    codes = [(4, 3), (1, 3), (1, 3), (1, 3), (1, 4), (5, 4)]
    bits = "".join(f"{code:0{width}b}" for code, width in reversed(codes))
    data = int(bits, 2).to_bytes((len(bits) + 7) // 8, "little")
    return b"GIF89a" + screen + control + frame + b"\2" + bytes([len(data)]) + data + b"\0;"


@pytest.mark.parametrize(("background", "colour"), [(0, (255, 0, 0)), (2, (0, 0, 255)), (3, (10, 20, 30))])
def test_uncovered_part_of_a_gif_has_the_background_colour(background, colour):
    image = decode_image(gif(background), "a.gif")
    assert image.getpixel((0, 0)) == image.getpixel((3, 1)) == colour
    assert image.getpixel((1, 1)) == image.getpixel((2, 2)) == (0, 255, 0)


@pytest.mark.parametrize("transparent", [0, 2, 3])
def test_uncovered_part_of_a_transparent_gif_is_white(transparent):
    image = decode_image(gif(0, transparent), "a.gif")
    assert image.getpixel((0, 0)) == (255, 255, 255)
    assert image.getpixel((1, 1)) == (0, 255, 0)


def test_uncovered_part_of_a_gif_without_a_palette_for_it_is_white():
    image = decode_image(gif(0, palette=False), "a.gif")
    assert image.getpixel((0, 0)) == (255, 255, 255)
    assert image.getpixel((1, 1)) == (0, 255, 0)


# TGA: a fourth channel that the header calls no alpha.


@pytest.mark.parametrize("alpha", [0, 100, 255])
@pytest.mark.parametrize("attribute_bits", [0, 8])
def test_fourth_channel_of_a_tga(attribute_bits, alpha):
    header = struct.pack("<BBBHHBHHHHBB", 0, 0, 2, 0, 0, 0, 0, 0, 2, 2, 32, attribute_bits)
    found = decode_image(header + bytes([10, 20, 30, alpha]) * 4, "a.tga").getpixel((0, 0))
    opacity = alpha / 255 if attribute_bits else 1
    assert np.abs(np.array(found) - [v * opacity + 255 * (1 - opacity) for v in (30, 20, 10)]).max() <= 1


# Icons hold pictures with transparency of their own.


@pytest.mark.parametrize("transparent", [b"\0", b"\xff\0", b"\xff\xff\x40"])
def test_palette_of_a_png_inside_an_icon(transparent):
    samples = np.arange(256, dtype=np.uint32).reshape(16, 16, 1) % 3
    colours = np.array([[200, 0, 0], [0, 200, 0], [0, 0, 200]], np.uint8)
    content = png(samples, 3, 8, before=[(b"PLTE", colours.tobytes()), (b"tRNS", transparent)])
    entry = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 8, len(content), 22)
    found = np.asarray(decode_image(struct.pack("<HHH", 0, 1, 1) + entry + content, "a.ico"))
    opacity = np.array([*transparent, 255, 255, 255][:3]) / 255
    expected = colours * opacity[:, None] + 255 * (1 - opacity[:, None])
    assert np.abs(found - expected[samples[..., 0]]).max() <= 1


def test_layout_that_pillow_cannot_decode_is_refused_in_words():
    content = tiff(
        INDEX[..., None], 3, 8, colours=[0] * 768, planar=False, fill=1, tags={258: ("H", [4]), 266: ("H", [2])}
    )
    with pytest.raises(ImageError, match=r"^cannot read a\.tif: .*Pillow cannot decode .*; save it as PNG\.$"):
        decode_image(content, "a.tif")


def test_background_beyond_the_palette_of_a_gif_is_white():
    assert decode_image(gif(200), "a.gif").getpixel((0, 0)) == (255, 255, 255)


def test_later_frame_of_a_gif_that_was_opened_with_pillow_is_whole():
    frames = [Image.new("RGB", (6, 6), "red"), Image.new("RGB", (6, 6), "red")]
    frames[1].paste("blue", (1, 1, 3, 3))
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    with Image.open(file) as image:
        image.seek(1)
        found = as_rgb(image)
    assert found.getpixel((5, 5)) == (255, 0, 0) and found.getpixel((1, 1)) == (0, 0, 255)


@pytest.mark.parametrize("mode", PICTURES)
def test_picture_that_was_read_is_not_changed_by_another_reading(mode):
    once = as_rgb(PICTURES[mode][0])
    assert not once.info and (np.asarray(as_rgb(once)) == np.asarray(once)).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_picture_that_was_turned_is_not_turned_again(kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    once = decode_image(written(PICTURES["RGB"][0], kind, exif=exif), "a")
    assert once.size == (ROWS * SIDE, COLUMNS * SIDE) == as_rgb(once).size
    assert (np.asarray(as_rgb(once)) == np.asarray(once)).all()


def test_transparent_colour_is_not_heeded_twice():
    samples = np.array([[[1, 2, 3], [255, 255, 255], [4, 5, 6]]], np.uint32)
    once = decode_image(png(samples, 2, 8, before=[(b"tRNS", struct.pack(">3H", 4, 5, 6))]), "a")
    assert np.asarray(as_rgb(once)).tolist() == [[[1, 2, 3], [255, 255, 255], [255, 255, 255]]]


# Formats for which Pillow starts a program, or has none.

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"


def iptc(content):
    """Return an IPTC file that holds a picture of 9×9."""
    fields = [(60, b"\1\0"), (20, b"\0\x09"), (30, b"\0\x09"), (120, b"\5")]
    head = b"".join(bytes([0x1C, 3, tag]) + struct.pack(">H", len(value)) + value for tag, value in fields)
    return head + bytes([0x1C, 8, 10]) + struct.pack(">H", len(content)) + content


STUBS = {
    "EPS": EPS,
    "EPS in DOS's form": struct.pack("<6L", 0xC6D3D0C5, 32, len(EPS), 0, 0, 0) + bytes(8) + EPS,
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(99),
    "GRIB": b"GRIB\0\0\x63\1" + bytes(99),
    "BUFR": b"BUFR" + bytes(99),
    "MPEG": b"\0\0\1\xb3\x01\0\x10\x13" + bytes(99),
    "WMF": b"\xd7\xcd\xc6\x9a\0\0" + struct.pack("<4hH", 0, 0, 9, 9, 72) + bytes(6) + b"\1\0\x09\0" + bytes(99),
    "IPTC": iptc(EPS),
}


def refusal_of(kind):
    # how an IPTC file begins is not fixed
    return "not an image that" if kind == "IPTC" else f"it is {kind.split()[0]}, which is not read here; save it as PNG"


@pytest.fixture
def started(monkeypatch):
    """Return the list of what Ghostscript was started for."""
    calls = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *given: calls.append(given))
    return calls


@pytest.mark.parametrize("suffix", ["png", "jpg", "eps", "tif"])
@pytest.mark.parametrize("kind", STUBS)
@pytest.mark.parametrize("read", [read_image, read_mask], ids=lambda read: read.__name__)
def test_files_that_need_a_program_are_refused_whatever_their_suffix(tmp_path, started, read, kind, suffix):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(STUBS[kind])
    with pytest.raises(ImageError, match=refusal_of(kind)):
        read(path)
    assert not started


@pytest.mark.parametrize("kind", STUBS)
@pytest.mark.parametrize("read", [decode_image, decoding_bytes], ids=lambda read: read.__name__)
def test_bytes_that_need_a_program_are_refused(started, read, kind):
    with pytest.raises(ImageError, match=refusal_of(kind)):
        read(STUBS[kind], "a.png")
    assert not started


def test_no_format_that_is_read_is_a_stub():
    stubs = {each.format for each in ImageFile.StubImageFile.__subclasses__()}
    assert stubs and not stubs & set(readable_formats())
    assert not any(map(is_image, ("a.eps", "a.ps", "a.iim", "a.mpg", "a.h5", "a.wmf")))
    assert {"PNG", "JPEG", "TIFF", "WEBP", "TGA"} <= set(readable_formats())
