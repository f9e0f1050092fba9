"""Pixels of PNGs that are made byte by byte: every depth, colour type, transparency and interlacing."""

import io
import struct
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from dave_fast.errors import ImageError, ImageWarning
from dave_fast.images import as_rgb, decode_image, read_image, read_mask
from dave_fast.images import png as reading
from dave_fast.images.reading import decoding_bytes
from tests.images.files import CHANNELS, PNG_SIGNATURE, chunk, png

DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
KINDS = [(colour, depth) for colour, depths in DEPTHS.items() for depth in depths]
PALETTE = np.random.default_rng(7).integers(0, 256, (256, 3), np.uint8)


def samples_of(colour, depth, seed=0):
    """Return (9, 11, channels) random samples that reach from black to white."""
    values = np.random.default_rng(seed).integers(0, 2**depth, (9, 11, CHANNELS[colour]), np.uint32)
    values[0, 0], values[0, 1] = 0, 2**depth - 1
    return values


def on_white(colours, alpha):
    """Lay colours (H, W, 3) in 0..255 on white by their opacity (H, W) in 0..1."""
    return colours * alpha[..., None] + 255 * (1 - alpha[..., None])


def wanted(samples, colour, depth, alphas=None):
    """Return the picture that the PNG standard defines, (H, W, 3) in 0..255."""
    if colour == 3:
        index = samples[..., 0]
        alphas = np.ones(256) if alphas is None else alphas
        return on_white(PALETTE[index].astype(float), alphas[index])
    full = 255 * samples.astype(float) / (2**depth - 1)
    colours = full[..., :3] if colour in (2, 6) else np.repeat(full[..., :1], 3, axis=2)
    return on_white(colours, full[..., -1] / 255) if colour in (4, 6) else colours


def chunks_of(colour, depth, key=None, alphas=None):
    """Return the chunks before the pixels: a palette where the colour type needs one, and tRNS."""
    chunks = [(b"PLTE", PALETTE[: 2**depth].tobytes())] if colour == 3 else []
    if key is not None:
        chunks.append((b"tRNS", struct.pack(f">{len(key)}H", *key)))
    if alphas is not None:
        chunks.append((b"tRNS", bytes(alphas)))
    return chunks


def assert_close(content, expected, *, within):
    """Compare with a picture in 0..255: Pillow cuts colours of sixteen bits, and rounds when it composes."""
    found = np.asarray(decode_image(content, "a.png"))
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= within


@pytest.mark.parametrize("interlaced", [False, True], ids=["plain", "interlaced"])
@pytest.mark.parametrize(("colour", "depth"), KINDS)
def test_samples(colour, depth, interlaced):
    samples = samples_of(colour, depth)
    content = png(samples, colour, depth, before=chunks_of(colour, depth), interlaced=interlaced)
    exact = colour == 3 or (depth < 16 and colour not in (4, 6)) or colour == 0
    assert_close(content, wanted(samples, colour, depth), within=0.5 if exact else 1.5)


@pytest.mark.parametrize("interlaced", [False, True], ids=["plain", "interlaced"])
@pytest.mark.parametrize("above", [0, 1], ids=["key", "key-with-unused-bits"])
@pytest.mark.parametrize(("colour", "depth"), [kind for kind in KINDS if kind[0] in (0, 2)])
def test_transparent_sample_is_white(colour, depth, above, interlaced):
    samples = samples_of(colour, depth, seed=1)
    samples[2:5, 3:6] = key = samples[2, 3].copy()
    stated = [(int(each) + (above << depth)) & 0xFFFF for each in key]
    content = png(samples, colour, depth, before=chunks_of(colour, depth, stated), interlaced=interlaced)
    expected = wanted(samples, colour, depth)
    expected[(samples == key).all(axis=2)] = 255
    assert_close(content, expected, within=0.5 if colour == 0 or depth == 8 else 1.5)
    assert (np.asarray(decode_image(content, "a.png"))[2:5, 3:6] == 255).all()


@pytest.mark.parametrize("channel", range(3))
@pytest.mark.parametrize("part", [1, 255, 256], ids=["lowest-bit", "lower-byte", "upper-byte"])
def test_colour_of_sixteen_bits_beside_the_transparent_one_is_kept(channel, part):
    samples = np.full((4, 4, 3), 0x7456, np.uint32)
    samples[:2, :, channel] ^= part
    content = png(samples, 2, 16, before=chunks_of(2, 16, [0x7456] * 3))
    found = np.asarray(decode_image(content, "a.png"))
    assert (found[2:] == 255).all() and (found[:2] < 130).all()


@pytest.mark.parametrize("beside", [1, 2, 16, 255])
def test_grey_of_sixteen_bits_beside_the_transparent_one_is_kept(beside):
    samples = np.full((4, 4, 1), 0x7456, np.uint32)
    samples[:2] += beside
    found = np.asarray(decode_image(png(samples, 0, 16, before=chunks_of(0, 16, [0x7456])), "a.png"))
    assert (found[2:] == 255).all() and (found[:2] < 130).all()


TABLES = {
    "one": [255, 0],
    "first": [0],
    "all": [0, 0],
    "steps": [0, 80],
    "ends-in-a-line-feed": [0, 10],
    "one-then-a-line-feed": [255, 0, 255, 10],
    "full": list(range(256)),
}


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_transparency_of_a_palette(depth, table):
    alphas = TABLES[table][: 2**depth]
    samples = samples_of(3, depth, seed=2)
    content = png(samples, 3, depth, before=chunks_of(3, depth, alphas=alphas))
    opacities = np.ones(256)
    opacities[: len(alphas)] = np.array(alphas) / 255
    assert_close(content, wanted(samples, 3, depth, opacities), within=1)


@pytest.mark.parametrize("alpha", [0, 1, 127, 128, 254, 255])
@pytest.mark.parametrize(("colour", "depth"), [kind for kind in KINDS if kind[0] in (4, 6)])
def test_alpha(colour, depth, alpha):
    samples = samples_of(colour, depth, seed=3)
    samples[..., -1] = alpha * (257 if depth == 16 else 1)
    assert_close(png(samples, colour, depth), wanted(samples, colour, depth), within=1.5)


def test_transparency_that_is_cut_off_is_refused():
    with pytest.raises(ImageError, match="tRNS"):
        decode_image(png(samples_of(2, 8), 2, 8, before=[(b"tRNS", b"\0\0")]), "a.png")


@pytest.mark.parametrize("colour_depth", [(0, 1), (0, 2), (0, 4), (0, 8), (0, 16), (2, 8)], ids=str)
def test_picture_opened_with_pillow_keeps_its_transparency(tmp_path, colour_depth):
    colour, depth = colour_depth
    samples = samples_of(colour, depth, seed=4)
    key = samples[3, 3].copy()
    (tmp_path / "a.png").write_bytes(png(samples, colour, depth, before=chunks_of(colour, depth, key)))
    expected = wanted(samples, colour, depth)
    expected[(samples == key).all(axis=2)] = 255
    with Image.open(tmp_path / "a.png") as image:
        assert np.abs(np.asarray(as_rgb(image)) - expected).max() <= 0.5


# Depth.

TWELVE = np.linspace(0, 4095, 12 * 16).round().astype(np.uint32).reshape(12, 16)


def deep(colour, bits=12):
    """Return (12, 16, channels) samples of so many bits in sixteen, with an alpha channel that is opaque."""
    ramp = np.linspace(0, 2**bits - 1, 12 * 16).round().astype(np.uint32).reshape(12, 16)
    channels = {0: 1, 2: 3, 4: 1, 6: 3}[colour]
    colours = np.stack([np.roll(ramp, i, axis=1) for i in range(channels)], axis=2)
    return np.concatenate([colours, np.full((12, 16, 1), 65535, np.uint32)], axis=2) if colour in (4, 6) else colours


def expected_of(samples, colour, white):
    colours = samples[..., : {0: 1, 2: 3, 4: 1, 6: 3}[colour]] * 255 / white
    return np.broadcast_to(colours, (*samples.shape[:2], 3))


@pytest.mark.parametrize("bits", [9, 10, 12, 14, 15])
@pytest.mark.parametrize("colour", [0, 2, 4, 6])
def test_stated_depth_of_samples_in_the_lower_bits_sets_white(colour, bits):
    samples = deep(colour, bits)
    content = png(samples, colour, 16, before=[(b"sBIT", bytes([bits] * samples.shape[2]))])
    assert_close(content, expected_of(samples, colour, 2**bits - 1), within=0.5)


@pytest.mark.parametrize("bits", [9, 10, 12, 14, 15])
@pytest.mark.parametrize("colour", [0, 2, 4, 6])
@pytest.mark.parametrize("brightest", [1.0, 0.02], ids=["bright", "dark"])
@pytest.mark.parametrize("spread", ["moved", "repeated", "scaled"])
def test_stated_depth_of_samples_in_the_upper_bits_changes_nothing(colour, bits, brightest, spread):
    few = np.floor(deep(colour, bits) * brightest).astype(np.uint32)
    if spread == "moved":
        samples = few << (16 - bits)
    elif spread == "repeated":
        samples = few << (16 - bits) | few >> (2 * bits - 16)
    else:
        samples = np.rint(few * (65535 / (2**bits - 1))).astype(np.uint32)
    if colour in (4, 6):
        samples[..., -1] = 65535
    content = png(samples, colour, 16, before=[(b"sBIT", bytes([bits] * samples.shape[2]))])
    assert_close(content, expected_of(samples, colour, 65535), within=1)


def test_stated_depth_of_eight_bits_changes_nothing():
    samples = samples_of(2, 8) // 8
    content = png(samples, 2, 8, before=[(b"sBIT", b"\5\5\5")])
    assert (np.asarray(decode_image(content, "a.png")) == samples).all()


def test_transparent_colour_of_twelve_bits():
    samples = deep(2)
    key = samples[5, 5].copy()
    content = png(samples, 2, 16, before=[(b"sBIT", b"\x0c" * 3), *chunks_of(2, 16, key)])
    expected = expected_of(samples, 2, 4095).copy()
    expected[(samples == key).all(axis=2)] = 255
    assert_close(content, expected, within=0.5)


def test_animation_gives_the_default_image(tmp_path):
    frames = [Image.new("RGBA", (4, 4), colour) for colour in ((255, 0, 0, 0), (0, 0, 255, 255))]
    for default, expected in ((True, (255, 255, 255)), (False, (255, 255, 255))):
        frames[0].save(tmp_path / "a.png", save_all=True, default_image=default, append_images=frames[1:] * 2)
        assert decode_image((tmp_path / "a.png").read_bytes(), "a.png").getpixel((1, 1)) == expected


@pytest.mark.parametrize("bits", [0, 17, 200, 255])
@pytest.mark.parametrize("colour", [0, 2, 4, 6])
def test_stated_depth_that_cannot_be_is_left_out(colour, bits):
    samples = samples_of(colour, 16)
    content = png(samples, colour, 16, before=[(b"sBIT", bytes([bits] * samples.shape[2]))])
    assert_close(content, wanted(samples, colour, 16), within=1.5)


def test_depth_of_a_transparent_colour_is_noted_where_it_is_lost(tmp_path):
    (tmp_path / "a.png").write_bytes(png(samples_of(2, 8), 2, 8, before=chunks_of(2, 8, [1, 2, 3])))
    with Image.open(tmp_path / "a.png") as image:
        image.load()
        with pytest.warns(ImageWarning, match="how many bits"):
            as_rgb(image)


# Very many chunks.

READERS = {
    "image": read_image,
    "mask": read_mask,
    "bytes": lambda path: decode_image(path.read_bytes(), "a.png"),
    "header": lambda path: decoding_bytes(path.read_bytes(), "a.png"),
}


def with_chunks(chunks):
    """Return a PNG with bytes behind its header, and its pixels."""
    content, head = png(samples_of(2, 8), 2, 8), len(PNG_SIGNATURE) + 25
    return content[:head] + chunks + content[head:], wanted(samples_of(2, 8), 2, 8)


@pytest.mark.parametrize("kind", [b"aaAa", b"tEXt", b"zTXt", b"iTXt", b"pHYs", b"iCCP", b"gAMA"], ids=bytes.decode)
def test_chunks_that_are_left_out_take_no_memory_each(kind):
    content, expected = with_chunks(8_000 * chunk(kind, b""))
    tracemalloc.start()
    _, found = reading.read_header(io.BytesIO(content))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found.read()) < 1000
    assert peak < 1.5 * len(content)
    assert_close(content, expected, within=0.5)


@pytest.mark.parametrize("kind", [b"aaAa", b"tEXt", b"IDAT", b"fdAT"], ids=bytes.decode)
@pytest.mark.parametrize("read", READERS)
def test_more_chunks_than_a_picture_has_are_refused(tmp_path, monkeypatch, read, kind):
    (tmp_path / "a.png").write_bytes(with_chunks(99 * chunk(kind, b""))[0])
    monkeypatch.setattr(reading, "_MOST_CHUNKS", 99)
    with pytest.raises(ImageError, match="it has more than 99 chunks; save it again"):
        READERS[read](tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes(with_chunks(b"")[0])
    READERS[read](tmp_path / "a.png")
