"""Tests that photographs are resized and cropped bit for bit as timm's own transforms do it, and within limits."""

import numpy as np
import pytest
from PIL import Image

from dave_fast.errors import InputError, TooLargeError
from dave_fast.images.geometry import CROP_FLOOR, Geometry
from dave_fast.images.preprocess import from_config

CONFIGS = [
    {"crop_pct": pct, "crop_mode": mode, "interpolation": interpolation, "input_size": (3, *size)}
    for pct, mode, interpolation, size in [
        (0.875, "center", "bicubic", (32, 32)),
        (1.0, "center", "bilinear", (32, 32)),
        (None, None, "bicubic", (30, 31)),
        (0.9, "center", "bicubic", (24, 40)),
        (1.0, "squash", "bicubic", (32, 24)),
        (0.8, "squash", "lanczos", (32, 32)),
        (1.0, "border", "bicubic", (32, 32)),
        (0.9, "border", "nearest", (33, 21)),
        (0.95, "center", "box", (31, 31)),
        (0.95, "center", "hamming", (17, 17)),
    ]
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_crops_equal_timms(config):
    config = config | {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    prepare, generator = from_config(config), np.random.default_rng(0)
    for _ in range(12):
        height, width = (int(side) for side in generator.integers(1, 120, 2))
        picture = Image.fromarray(generator.integers(0, 256, (height, width, 3), np.uint8))
        made = prepare.normalised(prepare.crop(picture))
        assert (made == prepare.transform(picture)).all(), (width, height)


def test_offsets_are_rounded_down_where_the_configuration_says_so():
    config = {"input_size": (3, 4, 4), "crop_pct": 4 / 7.5, "interpolation": "nearest", "mean": (0,) * 3}
    picture = Image.fromarray(np.arange(49, dtype=np.uint8).reshape(7, 7)).convert("RGB")
    first = [
        np.asarray(Geometry.from_config(config | more).crop(picture))[0, 0, 0] for more in ({}, {CROP_FLOOR: True})
    ]
    assert first == [2 * 7 + 2, 1 * 7 + 1]


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1), (1, 25_000_000), (3, 700_000), (60_000, 2)])
@pytest.mark.parametrize("mode", ["center", "border", "squash"])
def test_a_thin_picture_is_refused_where_it_would_grow(mode, size):
    config = {"input_size": (3, 224, 224), "crop_pct": 0.9, "crop_mode": mode, "mean": (0,) * 3}
    geometry, most = Geometry.from_config(config | {"interpolation": "bicubic"}), 25_000_000
    # squashed, a picture is as high as before on its way
    if mode == "center" or (mode == "squash" and 248 * size[1] > most):
        with pytest.raises(TooLargeError, match="less thin"):
            geometry.resizing_bytes(*size, most)
    else:
        assert geometry.resizing_bytes(*size, most) <= 4 * 2 * most + 60 * max(size)


@pytest.mark.parametrize("size", [(1, 1000), (1000, 1), (1, 600), (2, 1200), (1, 60_000), (60_000, 1)], ids=str)
@pytest.mark.parametrize("input_size", [(224, 224), (160, 224), (224, 32)], ids=str)
@pytest.mark.parametrize("pct", [0.9, 1.0])
def test_a_thin_picture_within_a_border_keeps_a_row_or_column(size, input_size, pct):
    config = {"input_size": (3, *input_size), "crop_pct": pct, "crop_mode": "border", "interpolation": "bicubic"}
    prepare = from_config(config | {"mean": (0.5,) * 3, "std": (0.5,) * 3})
    inputs, crop = prepare(Image.new("RGB", size, "white"))
    assert inputs.shape[1:] == crop.shape[:2] == input_size
    middle = crop[input_size[0] // 2 - 1 :, input_size[1] // 2 - 1 :][:3, :3]
    assert (middle == 255).any() and (crop[0, 0] == 128).all()


def test_an_unknown_interpolation_is_named():
    with pytest.raises(InputError, match="'best' is unknown; expected one of nearest"):
        Geometry.from_config({"input_size": (3, 8, 8), "interpolation": "best"})


@pytest.mark.parametrize(
    "config", [each for each in CONFIGS if each["interpolation"] not in ("nearest", "box")], ids=str
)
@pytest.mark.parametrize("size", [(60, 40), (40, 60), (101, 97), (220, 45)], ids=str)
def test_seen_says_where_in_the_photograph_each_pixel_of_the_crop_lies(config, size):
    geometry = Geometry.from_config(config | {"mean": (0,) * 3})
    across, down = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    picture = Image.fromarray(np.stack([across, down, 0 * across + 255], 2).astype(np.uint8))
    crop = np.asarray(geometry.crop(picture), float)
    left, top, right, bottom = geometry.seen(*size)
    height, width = geometry.size
    x = left + (np.arange(width) + 0.5) * (right - left) / width - 0.5
    y = top + (np.arange(height) + 0.5) * (bottom - top) / height - 0.5
    # away from the edges, where a ramp stays one
    step = 2 * max(1, (right - left) / width, (bottom - top) / height)
    inside = np.ix_((y > step) & (y < size[1] - 1 - step), (x > step) & (x < size[0] - 1 - step))
    assert crop[inside].size > 100
    np.testing.assert_allclose(crop[..., 0][inside], np.broadcast_to(x, crop.shape[:2])[inside], atol=0.6)
    np.testing.assert_allclose(crop[..., 1][inside], np.broadcast_to(y[:, None], crop.shape[:2])[inside], atol=0.6)
