"""Samples whose white the file does not say, or says doubtfully: how they are read, and the note on it."""

import io
import struct
import warnings

import numpy as np
import pytest
from PIL import Image

from dave_fast.errors import ImageWarning
from dave_fast.images import as_rgb, decode_image, read_image
from tests.images.files import png, tiff


def ramp(high, kind=np.uint16):
    """Return (16, 16) samples from 0 to high."""
    return np.linspace(0, high, 256).round().astype(kind).reshape(16, 16)


def as_png(values):
    return png(values[..., None], 0, 16)


def as_png_rgb(values):
    return png(np.stack([values, values, values[::-1]], axis=2), 2, 16)


def as_png_la(values):
    return png(np.stack([values, np.full_like(values, 65535)], axis=2), 4, 16)


def as_png_rgba(values):
    return png(np.stack([values, values, values, np.full_like(values, 65535)], axis=2), 6, 16)


def as_tiff(values, order="<"):
    return tiff(values[..., None], 1, 16, order=order)


def as_big_tiff(values):
    return as_tiff(values, ">")


def as_tiff_rgb(values):
    return tiff(np.stack([values, values, values[::-1]], axis=2), 2, 16)


def as_pgm(values):
    return b"P5 16 16 65535\n" + values.astype(">u2").tobytes()


def as_plain_pgm(values):
    return b"P2 16 16 65535\n" + " ".join(map(str, values.ravel())).encode()


def as_jpeg_2000(values):
    file = io.BytesIO()
    Image.fromarray(values).save(file, "JPEG2000")
    return file.getvalue()


def as_sgi(values):
    header = struct.pack(">HBBHHHHII", 474, 0, 2, 2, 16, 16, 1, 0, 65535)
    return header.ljust(512, b"\0") + values[::-1].astype(">u2").tobytes()


CONTAINERS = [
    as_png,
    as_png_rgb,
    as_png_la,
    as_png_rgba,
    as_tiff,
    as_big_tiff,
    as_tiff_rgb,
    as_pgm,
    as_plain_pgm,
    as_jpeg_2000,
    as_sgi,
]
named = pytest.mark.parametrize("container", CONTAINERS, ids=lambda each: each.__name__.removeprefix("as_"))
# Of an SGI Pillow reads the upper byte alone, and the lower one may hold a picture.
named_whole = pytest.mark.parametrize("container", CONTAINERS[:-1], ids=lambda each: each.__name__.removeprefix("as_"))


@named
@pytest.mark.parametrize("bits", [9, 10, 11, 12, 13, 14])
def test_fewer_bits_in_sixteen_are_read_as_the_format_says_with_a_note(container, bits):
    values = ramp(2**bits - 1)
    with pytest.warns(
        ImageWarning, match=f"^scan: its samples run from 0 to .* as data of {bits} bits would.*65535"
    ) as said:
        found = np.asarray(decode_image(container(values), "scan"))
    assert len(said) == 1
    assert np.abs(found[..., 0] - values / 257).max() <= 1


@named
@pytest.mark.parametrize("high", [16384, 20000, 40000, 65535])
def test_samples_that_use_the_upper_bits_get_no_note(container, high):
    values = ramp(high)
    assert np.abs(np.asarray(decode_image(container(values), "a"))[..., 0] - values / 257).max() <= 1


@named_whole
@pytest.mark.parametrize("value", [0, 1, 255, 4095])
def test_picture_of_one_value_gets_no_note(container, value):
    found = np.asarray(decode_image(container(np.full((16, 16), value, np.uint16)), "a"))
    assert np.abs(found - value / 257.0).max() <= 1


@named_whole
@pytest.mark.parametrize("factor", [256, 257])
def test_dark_picture_that_was_made_of_eight_bits_gets_no_note(container, factor):
    values = (ramp(60) * factor).astype(np.uint16)
    assert np.abs(np.asarray(decode_image(container(values), "a"))[..., 0] - values / 257.0).max() <= 1


@pytest.mark.parametrize("most", [255, 256, 1000, 1023, 4095, 16383, 65534])
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("brightest", [1.0, 0.05])
def test_white_of_a_pgm_is_what_it_says(most, plain, brightest):
    values = ramp(int(most * brightest))
    head = f"{'P2' if plain else 'P5'} 16 16 {most}\n".encode()
    body = (
        " ".join(map(str, values.ravel())).encode() if plain else values.astype(">u2" if most > 255 else "u1").tobytes()
    )
    found = np.asarray(decode_image(head + body, "a.pgm"))[..., 0]
    assert np.abs(found - values * (255 / most)).max() <= 0.51


@pytest.mark.parametrize("most", [255, 1000, 4095, 65535])
def test_white_of_a_ppm_is_what_it_says(most):
    values = np.stack([ramp(most), ramp(most)[::-1], ramp(most).T], axis=2)
    content = b"P6 16 16 %d\n" % most + values.astype(">u2" if most > 255 else "u1").tobytes()
    assert np.abs(np.asarray(decode_image(content, "a.ppm")) - values * (255 / most)).max() <= 1


@pytest.mark.parametrize("high", [256, 1000, 4095, 16000])
@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_wide_samples_far_below_white_are_noted(high, kind):
    values = ramp(high, kind)
    content = tiff(values[..., None], 1, 32, kind=3 if kind is np.float32 else 2)
    with pytest.warns(ImageWarning, match=f"from 0 to {high:g}, .*65535 is taken") as said:
        found = np.asarray(decode_image(content, "a.tif"))[..., 0]
    assert len(said) == 1
    assert np.abs(found - values / 257).max() <= 0.5


@pytest.mark.parametrize("high", [1.5, 2.0, 10.0, 60.0])
def test_floats_above_one_and_far_below_255_are_noted(high):
    values = np.linspace(0, high, 256, dtype=np.float32).reshape(16, 16)
    with pytest.warns(ImageWarning, match="255 is taken"):
        found = np.asarray(decode_image(tiff(values[..., None], 1, 32, kind=3), "a.tif"))[..., 0]
    assert np.abs(found - values).max() <= 0.5


@pytest.mark.parametrize(("low", "high"), [(-1, 1), (-1024, 3071), (0, 70000), (-0.5, 0.2), (1e6, 2e6)])
def test_samples_without_a_white_are_stretched_with_a_note(low, high):
    values = np.linspace(low, high, 256, dtype=np.float32).reshape(16, 16)
    with pytest.warns(ImageWarning, match="stretched, from black at the least to white at the greatest") as said:
        found = np.asarray(decode_image(tiff(values[..., None], 1, 32, kind=3), "a.tif"))[..., 0]
    assert len(said) == 1
    assert np.abs(found - np.arange(256).reshape(16, 16)).max() <= 1


@pytest.mark.parametrize("values", [[0.0, 0.5, 1.0], [0.0, 0.01, 0.02]], ids=["bright", "dark"])
def test_floats_from_zero_to_one_get_no_note(values):
    content = tiff(np.array(values, np.float32).reshape(1, 3, 1), 1, 32, kind=3)
    assert np.abs(np.asarray(decode_image(content, "a.tif"))[0, :, 0] - 255 * np.array(values)).max() <= 0.5


# FITS: signed, big-endian, from the bottom up.


def fits(values, bits, **cards):
    header = {"SIMPLE": "T", "BITPIX": bits, "NAXIS": 2, "NAXIS1": values.shape[1], "NAXIS2": values.shape[0], **cards}
    lines = "".join(f"{key:8}= {value!s:>20}".ljust(80) for key, value in header.items()) + "END".ljust(80)
    kind = {8: "u1", 16: ">i2", 32: ">i4", -32: ">f4"}[bits]
    return lines.ljust(2880).encode() + values[::-1].astype(kind).tobytes()


@pytest.mark.parametrize(
    ("bits", "full"), [(8, 255), (16, 255), (16, 32767), (32, 255), (32, 65535), (-32, 1), (-32, 255)]
)
def test_fits(bits, full):
    values = ramp(full, np.float64 if bits < 0 and full == 1 else np.int64)
    if full == 1:
        values = np.arange(256).reshape(16, 16) / 255
    assert np.abs(np.asarray(decode_image(fits(values, bits), "a.fits"))[..., 0] - values * (255 / full)).max() <= 0.51


@pytest.mark.parametrize("cards", [{}, {"BZERO": 32768}])
def test_negative_samples_of_a_fits_are_stretched(cards):
    values = np.linspace(-32768, 32767, 256).round().reshape(16, 16)
    with pytest.warns(ImageWarning, match="stretched"):
        found = np.asarray(decode_image(fits(values, 16, **cards), "a.fits"))[..., 0]
    assert np.abs(found - np.arange(256).reshape(16, 16)).max() <= 1


# Where notes go.


def test_note_is_called_instead_of_a_warning(tmp_path):
    (tmp_path / "a.png").write_bytes(as_png(ramp(4095)))
    said = []
    read_image(tmp_path / "a.png", note=said.append)
    decode_image(as_png(ramp(4095)), "b.png", note=said.append)
    as_rgb(Image.fromarray(ramp(4095)), note=said.append)
    names = [str(tmp_path / "a.png"), "b.png", "the picture"]
    assert [each.split(": ")[0] for each in said] == names


def test_warning_can_be_turned_into_an_error_that_names_its_class(tmp_path):
    (tmp_path / "a.png").write_bytes(as_png(ramp(4095)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageWarning, match=r"a\.png"):
            read_image(tmp_path / "a.png")


def test_warning_stands_where_the_picture_was_read(tmp_path):
    (tmp_path / "a.png").write_bytes(as_png(ramp(4095)))
    with pytest.warns(ImageWarning) as said:
        read_image(tmp_path / "a.png")
    assert said[0].filename == __file__


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I", "F"])
def test_picture_from_memory_is_scaled_not_clipped(mode):
    values = np.arange(256).reshape(16, 16) * 257
    image = Image.frombytes(
        mode, (16, 16), values.astype({"I;16": "<u2", "I;16B": ">u2", "I": "i4", "F": "f4"}[mode]).tobytes()
    )
    assert (np.asarray(as_rgb(image))[..., 0] == np.arange(256).reshape(16, 16)).all()
