"""Tests of reading images in all of Pillow's modes, errors for broken files, finding files, and preprocessing."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from dave_fast.errors import ImageError, InputError
from dave_fast.images import as_rgb, find_images, preprocessing, read_image
from tests.images.files import stored

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def rgb(path):
    image = read_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


def grey(path):
    """Return the pixels of one channel; fail if the image is not grey."""
    pixels = rgb(path)
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


# Modes.


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "gif", "webp"])
def test_grey(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(RAMP).save(path, **({"lossless": True} if suffix == "webp" else {}))
    assert (grey(path) == RAMP).all()


def test_rgb_is_unchanged(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert (rgb(tmp_path / "a.png") == pixels).all()


def test_grey_with_alpha_lies_on_white(tmp_path):
    alpha = np.array([[0, 255]], np.uint8)
    Image.merge("LA", [Image.new("L", (2, 1), 10), Image.fromarray(alpha)]).save(tmp_path / "a.png")
    assert grey(tmp_path / "a.png").tolist() == [[255, 10]]


def test_alpha_lies_on_white(tmp_path):
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[0, :, 3] = 0, 128, 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert grey(tmp_path / "a.png")[0].tolist() == [255, 127, 0]


def palette_image():
    image = Image.fromarray(np.array([[0, 1]], np.uint8), mode=None).convert("P")
    image.putdata([0, 1])
    image.putpalette([200, 10, 20, 30, 210, 40])
    return image


@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_palette(tmp_path, suffix):
    palette_image().save(tmp_path / f"a.{suffix}")
    assert rgb(tmp_path / f"a.{suffix}").tolist() == [[[200, 10, 20], [30, 210, 40]]]


@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_transparent_palette_entry_is_white(tmp_path, suffix):
    palette_image().save(tmp_path / f"a.{suffix}", transparency=1)
    assert rgb(tmp_path / f"a.{suffix}").tolist() == [[[200, 10, 20], [255, 255, 255]]]


def test_colour_marked_as_transparent_is_white(tmp_path):
    pixels = np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png", transparency=(1, 2, 3))
    assert rgb(tmp_path / "a.png").tolist() == [[[255, 255, 255], [4, 5, 6]]]


def test_one_bit(tmp_path):
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "a.png")
    assert grey(tmp_path / "a.png").tolist() == [[255, 0]]


def test_cmyk(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.tif")
    assert rgb(tmp_path / "a.tif")[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_keep_the_upper_eight(tmp_path, suffix):
    Image.fromarray(RAMP.astype(np.uint16) * 257).save(tmp_path / f"a.{suffix}")
    assert (grey(tmp_path / f"a.{suffix}") == RAMP).all()


def test_dark_sixteen_bits_stay_dark(tmp_path):
    Image.fromarray(np.full((4, 4), 2570, np.uint16)).save(tmp_path / "a.png")
    assert (grey(tmp_path / "a.png") == 10).all()


def test_big_endian_sixteen_bits(tmp_path):
    (tmp_path / "a.pgm").write_bytes(b"P5 16 16 65535\n" + (RAMP.astype(">u2") * 257).tobytes())
    assert (grey(tmp_path / "a.pgm") == RAMP).all()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (RAMP.astype(np.int32), RAMP),
        (RAMP.astype(np.int32) * 257, RAMP),
        (RAMP.astype(np.float32) / 255, RAMP),
        (RAMP.astype(np.float32), RAMP),
        (RAMP.astype(np.float32) * 257, RAMP),
        (np.full((2, 2), -3.0, np.float32), np.zeros((2, 2))),
        (np.full((2, 2), 0.0, np.float32), np.zeros((2, 2))),
    ],
    ids=["int-8", "int-16", "unit", "float-8", "float-16", "constant", "zero"],
)
def test_wide_pixels_are_scaled_not_clipped(tmp_path, values, expected):
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert (grey(tmp_path / "a.tif") == expected).all()


def test_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert (rgb(tmp_path / "a.gif") == (255, 0, 0)).all()


UPRIGHT = np.array([[10, 20, 30], [40, 50, 60]], np.uint8)
STORED = stored(UPRIGHT)


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_exif_orientation(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(STORED[orientation])).save(tmp_path / f"a.{suffix}", exif=exif)
    assert (grey(tmp_path / f"a.{suffix}") == UPRIGHT).all()


def test_sixteen_bits_are_turned_too(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.ascontiguousarray(STORED[6].astype(np.uint16) * 257)).save(tmp_path / "a.png", exif=exif)
    assert (grey(tmp_path / "a.png") == UPRIGHT).all()


# Files that are no images.


def photograph(kind):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format=kind)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "GIF", "WEBP", "BMP"])
def test_truncated(tmp_path, kind):
    content = photograph(kind)
    path = tmp_path / "cut.img"
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ImageError, match=r"cannot read .*cut\.img: .+\."):
        read_image(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"hello, world\n" * 9, "not an image"),
        (b"\x89PNG\r\n\x1a\n", "not an image|PNG"),
    ],
    ids=["empty", "text", "signature-alone"],
)
def test_not_an_image(tmp_path, content, reason):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(ImageError, match=reason):
        read_image(tmp_path / "a.jpg")


@pytest.mark.parametrize("comment", [b"", b"# of a camera\n", b"#" + 40_000 * b"a" + b"\n" + b"# b\r\n" * 4000])
def test_pnm_files_of_any_magic_number_are_read_with_their_comments(tmp_path, comment):
    file, white = tmp_path / "a.pnm", bytes(255 for _ in range(300 * 300 * 3))
    for magic, largest, body in (
        (b"P4", b"", bytes(300 * 38)),
        (b"P5", b"255", white[: 300 * 300]),
        (b"P6", b"255", white),
    ):
        file.write_bytes(b"%s\n%s300 300\n%s%s" % (magic, comment, largest and largest + b"\n", body))
        assert (rgb(file) == 255).all()
    file.write_bytes(b"P3\n" + comment + b"30 30 255\n" + b"255 # white\n" * 30 * 30 * 3)
    assert (rgb(file) == 255).all()


@pytest.mark.parametrize("magic", [b"P1", b"P3", b"P6", b"Pf", b"PyRGBA", b"P0CMYK"])
@pytest.mark.parametrize("comments", [b"# no end" + b"a" * 70_000, b"#\n" * 40_000, b"#\n" * 40_000 + b"1 1 255 aaa"])
def test_pnm_header_beyond_64_kib_is_refused(tmp_path, comments, magic):
    file = tmp_path / "a.ppm"
    file.write_bytes(magic + b" " + comments)
    with pytest.raises(ImageError, match=r"a\.ppm: its header takes more than 64 KiB; save it without the comments"):
        read_image(file)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(ImageError, match="no such file"):
        read_image(tmp_path / "none.png")
    with pytest.raises(ImageError, match="directory"):
        read_image(tmp_path)


def test_bomb_is_refused_before_it_is_decoded(tmp_path):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(bomb)
    with pytest.raises(ImageError, match="too large"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_pixels(tmp_path, bad):
    Image.fromarray(np.array([[0.5, bad]], np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ImageError, match="not finite"):
        read_image(tmp_path / "a.tif")


# Finding files.


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def test_folders_are_searched_and_sorted(tmp_path):
    wanted = [tmp_path / name for name in ("a/1.JPEG", "a/2.png", "b.tif", "c.webp")]
    touch(*reversed(wanted), tmp_path / "notes.txt", tmp_path / ".hidden.png", tmp_path / ".git/d.png")
    assert find_images([tmp_path]) == wanted


def test_given_files_come_first_whatever_their_suffix_and_once(tmp_path):
    touch(tmp_path / "a.png", tmp_path / "b.data")
    assert find_images([tmp_path / "b.data", tmp_path]) == [tmp_path / "b.data", tmp_path / "a.png"]
    assert find_images([tmp_path / "a.png", tmp_path, tmp_path / "." / "a.png"]) == [tmp_path / "a.png"]


def test_folder_of_results_is_skipped(tmp_path):
    touch(tmp_path / "a.png", tmp_path / "maps/a.overlay.png")
    assert find_images([tmp_path], skip=tmp_path / "maps") == [tmp_path / "a.png"]


def test_results_beside_the_photographs_are_no_photographs(tmp_path):
    for name in ("a.png", "a.overlay.png", "a.map.png", "a.figure.png", "a.4-four.overlay.png"):
        Image.new("RGB", (2, 2)).save(tmp_path / name)
    assert find_images([tmp_path], skip=tmp_path) == [tmp_path / "a.png"]


@pytest.mark.parametrize("files", [[], ["notes.txt"]])
def test_folder_without_images(tmp_path, files):
    touch(*(tmp_path / name for name in files))
    with pytest.raises(InputError, match="no image to explain"):
        find_images([tmp_path])


def test_path_that_does_not_exist(tmp_path):
    with pytest.raises(InputError, match=f"no file or folder {tmp_path / 'none'}"):
        find_images([tmp_path / "none"])


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root can list every folder")
def test_folder_that_cannot_be_listed(tmp_path):
    (tmp_path / "locked").mkdir(mode=0)
    with pytest.raises(InputError, match="cannot list"):
        find_images([tmp_path])


# Preprocessing.


class Model:
    def __init__(self, **config):
        self.pretrained_cfg = config


CONFIG = {
    "input_size": (3, 32, 32),
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.3, 0.5),
    "crop_pct": 0.8,
    "interpolation": "bicubic",
}


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (50, 70, 3), np.uint8))


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
def test_crop_is_what_the_model_sees(picture, mode):
    prepare = preprocessing(Model(**CONFIG, crop_mode=mode))
    inputs, crop = prepare(picture)
    assert torch.equal(inputs, prepare.transform(picture))
    assert inputs.shape == (3, 32, 32) and crop.shape == (32, 32, 3) and crop.dtype == np.uint8
    # Resize and crop, without the normalisation that follows them.
    geometry = prepare.transform.transforms[:2]
    expected = geometry[1](geometry[0](picture))
    assert (crop == np.asarray(expected)).all()
    again = (crop / 255 - np.array(CONFIG["mean"])) / np.array(CONFIG["std"])
    np.testing.assert_allclose(inputs.permute(1, 2, 0), again, atol=1e-6)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16"])
def test_picture_of_any_mode_is_prepared_as_rgb(picture, mode):
    prepare = preprocessing(Model(**CONFIG))
    if mode in ("I", "F", "I;16"):
        kind = {"I": np.int32, "F": np.float32, "I;16": np.uint16}[mode]
        given = Image.fromarray(np.asarray(picture.convert("L")).astype(kind) * kind(257))
    elif mode == "PA":
        given = picture.convert("P").convert("PA")
    else:
        given = picture.convert(mode)
    inputs, crop = prepare(given)
    truth, expected = prepare(as_rgb(given))
    assert torch.equal(inputs, truth) and (crop == expected).all() and crop.std() > 10


def test_picture_is_prepared_upright(picture):
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    picture.rotate(90, expand=True).save(file, "PNG", exif=exif)
    prepare = preprocessing(Model(**CONFIG))
    with Image.open(file) as given:
        assert (prepare.crop(given) == prepare.crop(picture)).all()


def test_every_pixel_value_survives_the_way_there_and_back():
    ramp = Image.fromarray(np.repeat(RAMP[..., None], 3, axis=2))
    prepare = preprocessing(Model(**{**CONFIG, "crop_pct": 1.0}), image_size=(16, 16))
    inputs, crop = prepare(ramp)
    assert (crop == RAMP[..., None]).all() and (prepare.pixels(inputs).numpy() == crop).all()


def test_size_can_be_that_of_the_model(picture):
    inputs, crop = preprocessing(Model(**CONFIG), image_size=(24, 40))(picture)
    assert inputs.shape == (3, 24, 40) and crop.shape == (24, 40, 3)


@pytest.mark.parametrize("model", [object(), Model()], ids=["none", "empty"])
def test_model_without_configuration_gets_imagenet_and_a_note(picture, model):
    prepare = preprocessing(model)
    assert prepare(picture)[0].shape == (3, 224, 224)
    assert prepare.mean == pytest.approx((0.485, 0.456, 0.406))
    assert "names no preprocessing" in prepare.note
    assert preprocessing(Model(**CONFIG)).note is None


def test_model_of_another_number_of_channels():
    with pytest.raises(InputError, match="takes 4 channels"):
        preprocessing(Model(input_size=(4, 32, 32)))
