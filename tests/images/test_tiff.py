"""Pixels of TIFFs that are made byte by byte: kinds of samples, polarity, planes, tiles, alpha, colour spaces."""

import itertools

import numpy as np
import pytest
from PIL import Image
from PIL.TiffImagePlugin import OPEN_INFO

from dave_fast.errors import ImageError, ImageWarning
from dave_fast.images import as_rgb, decode_image, read_image
from tests.images.files import DEFLATE, NONE, stored, tiff

ORDERS = {b"II": "<", b"MM": ">"}
GREYS, RGB, PALETTE, CMYK, YCBCR, LAB = (0, 1), 2, 3, 5, 6, 8
UNSIGNED, SIGNED, FLOAT = 1, 2, 3


def samples_of(depth, channels, kind, seed=0):
    """Return (5, 7, channels) random samples that reach from the least to the greatest."""
    random = np.random.default_rng(seed)
    if kind == FLOAT:
        values = random.random((5, 7, channels), np.float32)
        values[0, 0], values[0, 1] = 0, 1
        return values
    low, high = (0, 2**depth - 1) if kind == UNSIGNED else (-(2 ** (depth - 1)), 2 ** (depth - 1) - 1)
    values = random.integers(low, high, (5, 7, channels), np.int64, endpoint=True)
    values[0, 0], values[0, 1] = low, high
    return values.astype(np.uint64) if kind == UNSIGNED else values


def wanted(samples, photometric, depth, kind, extra, colours):
    """Return the picture that the TIFF specification defines, (H, W, 3) in 0..255, on white."""
    alpha = samples[..., -len(extra)] / (2**depth - 1) if extra and extra[0] in (1, 2, 999) else None
    if photometric == RGB and samples.shape[2] == 4 and not extra:
        alpha = samples[..., 3] / (2**depth - 1)
    low = float(samples.min()) if kind == SIGNED else 0.0
    full = samples.astype(np.float64).max() - low if kind != UNSIGNED else 2.0**depth - 1
    values = (samples.astype(np.float64) - low) / full
    if photometric in GREYS:
        grey = values[..., :1] if photometric else 1 - values[..., :1]
        result = np.repeat(grey, 3, axis=2) * 255
    elif photometric == RGB:
        result = values[..., :3] * 255
    elif photometric == PALETTE:
        result = (np.array(colours).reshape(3, -1).T / 257)[samples[..., 0].astype(int)]
    elif photometric == CMYK:
        result = 255 * (1 - values[..., :3]) * (1 - values[..., 3:4])
    elif samples.shape[2] == 1:
        result = np.repeat(samples, 3, axis=2).astype(float)
    else:
        y, blue, red = np.moveaxis(samples.astype(np.float64), 2, 0)
        blue, red = blue - 128, red - 128
        result = np.stack([y + 1.402 * red, y - 0.344136 * blue - 0.714136 * red, y + 1.772 * blue], axis=2)
        result = result.clip(0, 255)
    if alpha is None:
        return result
    associated = extra and extra[0] == 1
    return (result if associated else result * alpha[..., None]) + 255 * (1 - alpha[..., None])


def layouts():
    """Yield every combination of what Pillow knows of TIFF with orders, compressions, planes and tiles."""
    for key, planar in itertools.product(OPEN_INFO, (False, True)):
        if key[1] != LAB and not (planar and len(key[4]) == 1):
            yield pytest.param(key, planar, id="-".join(map(str, (*key, "planes" if planar else "pixels"))))


@pytest.mark.filterwarnings("ignore::dave_fast.errors.ImageWarning")
@pytest.mark.parametrize(("key", "planar"), list(layouts()))
def test_layout_is_read_as_it_is_defined_or_refused(key, planar):
    prefix, photometric, (kind,), fill, bits, extra = key
    depth, channels = bits[0], len(bits)
    samples = samples_of(depth, channels, kind)
    if extra and extra[0] == 1:
        # Colours that are multiplied by their alpha are no larger than it.
        place = channels - len(extra)
        samples[..., :place] = np.minimum(samples[..., :place], samples[..., place : place + 1])
    palette = np.random.default_rng(1).integers(0, 256, 3 * 2**depth) * 257 if photometric == PALETTE else None
    expected = wanted(samples, photometric, depth, kind, extra, palette)
    refused = 0
    for compression, tile in itertools.product((NONE, DEFLATE), (None, 16)):
        content = tiff(
            samples,
            photometric,
            depth,
            order=ORDERS[prefix],
            kind=kind,
            compression=compression,
            planar=planar,
            fill=fill,
            extra=extra,
            colours=palette,
            tile=tile,
            tags={530: ("H", [1, 1])} if photometric == YCBCR else None,
        )
        try:
            found = np.asarray(decode_image(content, "a.tif"))
        except ImageError:
            refused += 1
            continue
        # Pillow cuts colours of sixteen bits and divides associated colours by alpha, both in eight bits.
        assert np.abs(found - expected).max() <= 3
    # Only layouts that nearly nobody writes; the last is grey that claims to be YCbCr.
    assert not refused or planar or fill == 2 or (photometric == YCBCR and channels == 1)


def tiff_of(values, photometric=1, depth=16, **settings):
    return tiff(np.asarray(values)[..., None], photometric, depth, **settings)


RAMP = np.arange(256, dtype=np.uint32).reshape(16, 16)


def grey_of(content):
    pixels = np.asarray(decode_image(content, "a.tif"))
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


@pytest.mark.parametrize("bits", [8, 9, 10, 12, 14, 15])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("compression", [NONE, DEFLATE])
def test_greatest_sample_that_is_stated_is_white(bits, order, compression):
    white = 2**bits - 1
    values = np.linspace(0, white, 256).round().astype(np.uint32).reshape(16, 16)
    content = tiff_of(values, order=order, compression=compression, tags={281: ("H", [white])})
    assert np.abs(grey_of(content) - values * 255 / white).max() <= 0.5


@pytest.mark.parametrize("bits", [8, 10, 12, 14])
@pytest.mark.parametrize("compression", [NONE, DEFLATE])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("extra", [(), (2,)], ids=["rgb", "rgba"])
def test_greatest_sample_that_is_stated_is_white_in_colour(bits, compression, order, extra):
    white = 2**bits - 1
    samples = np.random.default_rng(0).integers(0, white + 1, (6, 7, 3 + len(extra)), np.uint32)
    samples[..., 3:] = 65535
    tags = {281: ("H", [white] * samples.shape[2])}
    content = tiff(samples, RGB, 16, order=order, compression=compression, extra=extra, tags=tags)
    assert np.abs(np.asarray(decode_image(content, "a.tif")) - samples[..., :3] * 255 / white).max() <= 0.5


@pytest.mark.parametrize("statistic", [1000, 3000, 4094, 40000])
def test_greatest_sample_that_is_a_statistic_changes_nothing(statistic):
    values = (RAMP * 16).astype(np.uint32)
    with pytest.warns(ImageWarning, match="as data of 12 bits"):
        found = grey_of(tiff_of(values, tags={281: ("H", [statistic])}))
    assert np.abs(found - values / 257).max() <= 0.5


def test_twelve_bits_a_sample():
    values = np.linspace(0, 4095, 256).round().astype(np.uint32).reshape(16, 16)
    assert np.abs(grey_of(tiff_of(values, depth=12)) - values * 255 / 4095).max() <= 0.5


@pytest.mark.parametrize("compression", [NONE, DEFLATE])
@pytest.mark.parametrize(("depth", "kind"), [(1, 1), (2, 1), (4, 1), (8, 1), (16, 1), (32, 3)])
def test_white_is_zero(depth, kind, compression):
    values = samples_of(depth, 1, kind)[..., 0]
    full = 1 if kind == FLOAT else 2**depth - 1
    found = grey_of(tiff_of(values, 0, depth, kind=kind, compression=compression))
    assert np.abs(found - (255 - values * (255 / full))).max() <= 0.5


@pytest.mark.parametrize("loaded", [False, True])
def test_white_is_zero_in_a_picture_opened_with_pillow(tmp_path, loaded):
    (tmp_path / "a.tif").write_bytes(tiff_of(RAMP * 257, 0))
    with Image.open(tmp_path / "a.tif") as image:
        if loaded:
            image.load()
        assert (np.asarray(as_rgb(image))[..., 0] == 255 - RAMP).all()


@pytest.mark.parametrize(("depth", "full"), [(8, 127), (16, 32767), (16, 255)])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("compression", [NONE, DEFLATE])
def test_signed_samples_that_are_not_negative(depth, full, order, compression):
    values = np.linspace(0, full, 128).round().astype(np.int64).reshape(8, 16)
    content = tiff_of(values, depth=depth, kind=SIGNED, order=order, compression=compression)
    assert np.abs(grey_of(content) - values * (255 / full)).max() <= 0.5


@pytest.mark.parametrize(
    ("depth", "low", "high"), [(8, -128, 127), (8, -5, 90), (16, -1024, 3071), (32, -70000, 185000)]
)
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("compression", [NONE, DEFLATE])
def test_negative_samples_are_stretched_with_a_note(depth, low, high, order, compression):
    values = np.linspace(low, high, 128).round().astype(np.int64).reshape(8, 16)
    content = tiff_of(values, depth=depth, kind=SIGNED, order=order, compression=compression)
    with pytest.warns(ImageWarning, match=f"a.tif: its samples run from {low:g} to {high:g}.*stretched"):
        found = grey_of(content)
    assert np.abs(found - (values - low) * (255 / (high - low))).max() <= 0.5


@pytest.mark.parametrize("high", [2**31 - 1, 2**31, 2**32 - 1])
@pytest.mark.parametrize("compression", [NONE, DEFLATE])
def test_unsigned_samples_of_32_bits_do_not_wrap(high, compression):
    values = np.linspace(0, high, 128).round().astype(np.uint64).reshape(8, 16)
    with pytest.warns(ImageWarning, match="stretched"):
        found = grey_of(tiff_of(values, depth=32, compression=compression))
    assert np.abs(found - values * (255 / high)).max() <= 0.5


@pytest.mark.parametrize("compression", [NONE, DEFLATE])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("full", [1.0, 255.0, 65535.0])
def test_floats(order, compression, full):
    values = (RAMP / 255 * full).astype(np.float32)
    assert (grey_of(tiff_of(values, depth=32, kind=FLOAT, order=order, compression=compression)) == RAMP).all()


def test_colour_map_of_eight_bits():
    colours = np.random.default_rng(3).integers(0, 256, (3, 16))
    index = np.arange(16).reshape(4, 4)
    content = tiff(index[..., None], PALETTE, 4, colours=colours.ravel())
    assert (np.asarray(decode_image(content, "a.tif")) == colours.T[index]).all()


def test_missing_photometric_interpretation_is_noted():
    with pytest.warns(ImageWarning, match="does not say whether 0 is black or white"):
        found = grey_of(tiff_of(RAMP, depth=8, tags={262: None}))
    assert (found == 255 - RAMP).all()


def test_fourth_channel_without_a_meaning_is_noted():
    with pytest.warns(ImageWarning, match="fourth channel"):
        decode_image(tiff(samples_of(8, 4, UNSIGNED), RGB, 8), "a.tif")


@pytest.mark.parametrize("subsampling", [None, (2, 2), (2, 1)])
def test_subsampled_colours_without_compression_are_refused(subsampling):
    tags = {530: ("H", list(subsampling))} if subsampling else None
    with pytest.raises(ImageError, match="subsampled YCbCr"):
        decode_image(tiff(samples_of(8, 3, UNSIGNED), YCBCR, 8, tags=tags), "a.tif")


# From XYZ of the white point D50 to linear sRGB.
SRGB = [[3.1338561, -1.6168667, -0.4906146], [-0.9787684, 1.9161415, 0.0334540], [0.0719453, -0.2289914, 1.4052427]]
WHITE = [0.96422, 1.0, 0.82521]


def srgb_of(lightness, a, b):
    """Return the sRGB of a colour of CIE L*a*b*, in 0..255."""
    y = (lightness + 16) / 116
    roots = np.array([y + a / 500, y, y - b / 200])
    linear = SRGB @ (np.where(roots > 6 / 29, roots**3, (roots - 4 / 29) * 108 / 841) * WHITE)
    return 255 * np.where(linear > 0.0031308, 1.055 * linear.clip(0) ** (1 / 2.4) - 0.055, 12.92 * linear)


@pytest.mark.parametrize("a", [-12, 0, 12])
@pytest.mark.parametrize("b", [-12, 0, 12])
@pytest.mark.parametrize("lightness", [102, 153, 204])
def test_lab(lightness, a, b):
    samples = np.broadcast_to(np.array([lightness, a, b]) % 256, (4, 4, 3))
    found = np.asarray(decode_image(tiff(samples, LAB, 8), "a.tif"))[1, 1]
    # The transform goes through a table of eight bits.
    assert np.abs(found - srgb_of(lightness / 2.55, a, b)).max() <= 4


@pytest.mark.parametrize("compression", [NONE, DEFLATE])
@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_first_page_is_turned_upright(tmp_path, orientation, depth, compression):
    upright = np.array([[10, 20, 30], [40, 50, 60]], np.uint32) * 4
    pixels = stored(upright)[orientation]
    content = tiff_of(
        pixels * (257 if depth == 16 else 1), depth=depth, compression=compression, tags={274: ("H", [orientation])}
    )
    (tmp_path / "a.tif").write_bytes(content)
    assert (grey_of(content) == upright).all()
    assert (np.asarray(read_image(tmp_path / "a.tif"))[..., 0] == upright).all()


@pytest.mark.parametrize("most", [0, 1, 127, 2**17 - 1, 2**32 - 1])
def test_greatest_sample_that_cannot_be_changes_nothing(most):
    assert (grey_of(tiff_of(RAMP * 257, tags={281: ("L", [most])})) == RAMP).all()


@pytest.mark.parametrize(("kind", "noted"), [(0, 0), (1, 1), (2, 0), (3, 1)])
def test_first_page_that_is_a_smaller_version_is_noted(kind, noted):
    notes = []
    decode_image(tiff_of(RAMP, depth=8, tags={254: ("L", [kind])}), "a.tif", note=notes.append)
    assert len(notes) == noted


PLANES = [
    (RGB, 8, (), NONE),
    (RGB, 8, (), DEFLATE),
    (RGB, 16, (), DEFLATE),
    (RGB, 8, (2,), NONE),
    (RGB, 8, (2,), DEFLATE),
]
PLANES += [(RGB, 8, (1,), DEFLATE), (CMYK, 8, (), NONE), (CMYK, 8, (), DEFLATE), (CMYK, 16, (), DEFLATE)]


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize(("photometric", "depth", "extra", "compression"), PLANES)
def test_separate_planes_are_read(photometric, depth, extra, compression, order):
    samples = samples_of(depth, (3 if photometric == RGB else 4) + len(extra), UNSIGNED)
    if extra == (1,):
        samples[..., :3] = np.minimum(samples[..., :3], samples[..., 3:])
    content = tiff(samples, photometric, depth, order=order, planar=True, extra=extra, compression=compression)
    expected = wanted(samples, photometric, depth, UNSIGNED, extra, None)
    assert np.abs(np.asarray(decode_image(content, "a.tif")) - expected).max() <= 2


@pytest.mark.parametrize("extra", [(1,), (2,)])
@pytest.mark.parametrize("compression", [NONE, DEFLATE])
def test_grey_and_alpha_in_separate_planes_are_refused(extra, compression):
    content = tiff(samples_of(8, 2, UNSIGNED), 1, 8, planar=True, extra=extra, compression=compression)
    with pytest.raises(ImageError, match="in separate planes, which cannot be read; save it with the channels"):
        decode_image(content, "a.tif")
