"""Tests of the demo scenes: they are reproducible, and masks cover the digits' pixels."""

import json
import subprocess
import sys

import numpy as np
import pytest

from dave_fast.models.demo import demo_scene, draw_scenes
from dave_fast.models.demo.clutter import draw_clutter, to_uint8
from dave_fast.models.demo.scenes import SPLITS, TEST_EVERY, glyphs

FIELDS = ("images", "labels", "masks", "other_labels", "other_masks")


@pytest.mark.parametrize("n_digits", [1, 2])
def test_scene_does_not_depend_on_how_many_are_drawn(n_digits):
    many = draw_scenes(5, 7, n_digits=n_digits)
    few = draw_scenes(2, 7, n_digits=n_digits)
    last = draw_scenes(1, 7, n_digits=n_digits, start=4)
    for field in FIELDS:
        np.testing.assert_array_equal(getattr(many, field)[:2], getattr(few, field))
        np.testing.assert_array_equal(getattr(many, field)[4:], getattr(last, field))


def test_seed_and_split_change_every_scene():
    base = draw_scenes(4, 7).images
    for other in (draw_scenes(4, 8).images, draw_scenes(4, 7, split="test").images):
        assert (base != other).mean(axis=(1, 2, 3)).min() > 0.5


def test_global_generator_is_untouched():
    before = np.random.get_state()[1:3]  # noqa: NPY002 - the legacy generator is what is watched
    draw_scenes(2, 0, n_digits=2)
    after = np.random.get_state()[1:3]  # noqa: NPY002
    np.testing.assert_array_equal(after[0], before[0])
    assert after[1] == before[1]


@pytest.mark.parametrize("size", [32, 97, 128])
def test_shapes_and_dtypes(size):
    scenes = draw_scenes(3, 1, size=size)
    assert scenes.images.shape == (3, size, size, 3)
    assert scenes.images.dtype == np.uint8
    assert scenes.masks.shape == scenes.other_masks.shape == (3, size, size)
    assert scenes.masks.dtype == scenes.other_masks.dtype == bool
    assert scenes.labels.shape == scenes.other_labels.shape == (3,)
    assert scenes.labels.dtype == scenes.other_labels.dtype == np.int64
    assert (scenes.other_labels == -1).all()
    assert not scenes.other_masks.any()


@pytest.mark.parametrize("n_digits", [1, 2])
def test_mask_is_where_the_digits_changed_the_background(n_digits):
    seed, split = 11, "test"
    scenes = draw_scenes(12, seed, n_digits=n_digits, split=split)
    for i in range(12):
        rng = np.random.default_rng((seed, SPLITS.index(split), i))
        background = to_uint8(draw_clutter(rng, 128))
        change = np.abs(scenes.images[i].astype(int) - background).sum(axis=-1)
        mask = scenes.masks[i] | scenes.other_masks[i]
        assert (change[mask] > 0).all()
        # The rest is the antialiased edge, and a trace of ink where a glyph is faint.
        assert change[mask].sum() > 0.9 * change.sum()
        assert change[~_grown(mask, 2)].sum() < 0.02 * change.sum()


def test_masks_have_the_size_of_a_digit():
    areas = draw_scenes(100, 3).masks.sum(axis=(1, 2))
    assert areas.min() > 150
    assert areas.max() < 0.25 * 128 * 128


def test_digits_are_brighter_than_any_clutter():
    scenes = draw_scenes(30, 5)
    luminance = scenes.images @ np.array([0.299, 0.587, 0.114])
    for values, mask in zip(luminance, scenes.masks, strict=True):
        assert np.median(values[mask]) > 1.3 * np.quantile(values[~mask], 0.95)


def test_two_digits_differ_and_do_not_overlap():
    scenes = draw_scenes(50, 9, n_digits=2)
    assert (scenes.labels != scenes.other_labels).all()
    assert scenes.masks.any(axis=(1, 2)).all()
    assert scenes.other_masks.any(axis=(1, 2)).all()
    for mask, other in zip(scenes.masks, scenes.other_masks, strict=True):
        assert not (_grown(mask, 1) & other).any()


@pytest.mark.parametrize("split", SPLITS)
def test_no_class_is_rare(split):
    shares = np.bincount(glyphs(split)[1], minlength=10) / len(glyphs(split)[1])
    assert shares.min() > 0.06
    assert shares.max() < 0.14


def test_splits_share_no_glyph():
    train, test = ({glyph.tobytes() for glyph in glyphs(split)[0]} for split in SPLITS)
    assert not train & test
    assert len(train) + len(test) == 1797
    assert len(test) == -(-1797 // TEST_EVERY)


def test_no_clutter_is_black():
    scenes = draw_scenes(3, 2, clutter=0.0)
    for image, mask in zip(scenes.images, scenes.masks, strict=True):
        assert image[~_grown(mask, 2)].sum() < 0.005 * image.sum()
        assert image[mask].max() > 200


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"split": "val"}, "split"),
        ({"n_digits": 3}, "n_digits"),
        ({"size": 16}, "size"),
        ({"clutter": 2.0}, "clutter"),
        ({"start": -1}, "start"),
    ],
)
def test_impossible_settings_are_named(settings, named):
    with pytest.raises(ValueError, match=named):
        draw_scenes(1, 0, **settings)


def test_demo_scene_is_the_described_one():
    scene = demo_scene()
    assert scene.image.size == (128, 128)
    assert scene.image.mode == "RGB"
    assert (scene.label, scene.other_label) == (4, 6)
    columns = {scene.label: _centre_column(scene.mask), scene.other_label: _centre_column(scene.other_mask)}
    assert columns[4] < 64 < columns[6]


def test_import_is_cheap():
    code = (
        "import sys, json, dave_fast.models.demo.scenes; "
        "print(json.dumps([m in sys.modules for m in ('timm', 'sklearn')]))"
    )
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert json.loads(output) == [False, False]


def _centre_column(mask: np.ndarray) -> float:
    """Return the mean column of a mask bool (H, W)."""
    return float(np.nonzero(mask)[1].mean())


def _grown(mask: np.ndarray, steps: int) -> np.ndarray:
    """Return a mask bool (H, W) grown by this many pixels on all sides, diagonals included."""
    for _ in range(steps):
        wide = np.pad(mask, 1)
        h, w = mask.shape
        mask = np.any([wide[y : y + h, x : x + w] for y in range(3) for x in range(3)], axis=0)
    return mask
