"""Scenes with known evidence: bright handwritten digits over dark, colourful clutter, with a mask of their pixels.

They are drawn procedurally, so that nothing has to be licensed or downloaded. Scene i of a seed depends on
(seed, split, i) and the settings, not on how many scenes are drawn.

Axes: n scenes, H = W = size in pixels, 3 = RGB.
"""

from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import numpy as np
from PIL import Image

from dave_fast.models.demo.clutter import blend, draw_clutter, hue, ramp, spline, to_uint8

SPLITS = ("train", "test")
# every fifth glyph is held out; other glyphs of the same writers are in the training split
TEST_EVERY = 5

_REFERENCE_SIZE = 128
_GLYPH_CELLS = 8
_GLYPH_LEVELS = 16
# samples of a refined glyph along each side, so that sampling it under a rotation is smooth
_FINE = 64
_FINE_MARGIN = 8
# level of a refined glyph at its outline, and the range of values over which an antialiased edge extends
_INK_LEVEL, _INK_EDGE = 0.47, 0.16
_LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)


@dataclass(frozen=True)
class Scenes:
    """Scenes with their ground truth.

    Attributes:
        images: uint8 (n, H, W, 3).
        labels: int64 (n,), the digit 0..9 that is the class.
        masks: bool (n, H, W), the pixels that the labelled digit covers by at least half.
        other_labels: int64 (n,), the second digit, -1 without one; not equal to the label.
        other_masks: bool (n, H, W), its pixels, disjoint from masks.
    """

    images: np.ndarray
    labels: np.ndarray
    masks: np.ndarray
    other_labels: np.ndarray
    other_masks: np.ndarray


@dataclass(frozen=True)
class DemoScene:
    """One scene with two digits.

    Attributes:
        image: RGB.
        label: class of the first digit.
        mask: bool (H, W), its pixels.
        other_label: class of the second digit.
        other_mask: bool (H, W), its pixels.
    """

    image: Image.Image
    label: int
    mask: np.ndarray
    other_label: int
    other_mask: np.ndarray


def demo_scene() -> DemoScene:
    """Draw the scene of the examples: held-out glyphs, a four and, below it to the right, a six."""
    scenes = draw_scenes(1, 2, n_digits=2, split="test", start=30)
    return DemoScene(
        Image.fromarray(scenes.images[0]),
        int(scenes.labels[0]),
        scenes.masks[0],
        int(scenes.other_labels[0]),
        scenes.other_masks[0],
    )


def draw_scenes(
    n: int,
    seed: int,
    *,
    size: int = 128,
    n_digits: int = 1,
    clutter: float = 1.0,
    split: str = "train",
    start: int = 0,
) -> Scenes:
    """Draw scenes start .. start + n of a seed.

    Args:
        n: number of scenes.
        seed: non-negative.
        size: pixels along each side, at least 32.
        n_digits: 1, or 2 for a second digit of another class that does not overlap the first.
        clutter: brightness of the background, 0 (black) to 1.
        split: "train" or "test"; they have no glyph in common.
        start: number of the first scene, so that a long series can be drawn in parts.

    Raises:
        ValueError: an argument is outside of these limits.
    """
    _check(n, seed, size, n_digits, clutter, split, start)
    images = np.empty((n, size, size, 3), np.uint8)
    labels = np.full((2, n), -1, np.int64)
    masks = np.zeros((2, n, size, size), bool)
    for i in range(n):
        rng = np.random.default_rng((seed, SPLITS.index(split), start + i))
        # clutter is drawn first, so that the background does not depend on the digits
        scene = draw_clutter(rng, size) * np.float32(clutter)
        for k, (label, mask) in enumerate(write_digits(rng, scene, n_digits, split)):
            labels[k, i], masks[k, i] = label, mask
        images[i] = to_uint8(scene)
    return Scenes(images, labels[0], masks[0], labels[1], masks[1])


def _check(n: int, seed: int, size: int, n_digits: int, clutter: float, split: str, start: int) -> None:
    """Raise ValueError for arguments that no scene can be drawn with."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: expected one of {SPLITS}.")
    if n_digits not in (1, 2):
        raise ValueError(f"n_digits={n_digits!r}: a scene has 1 or 2 digits.")
    if size < 32:
        raise ValueError(f"size={size}: below 32 pixels the digits cannot be read; give 32 or more.")
    if not 0 <= clutter <= 1:
        raise ValueError(f"clutter={clutter}: expected 0 (black background) to 1.")
    if min(n, seed, start) < 0:
        raise ValueError(f"n={n}, seed={seed}, start={start}: none of them may be negative.")


@cache
def glyphs(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return glyphs uint8 (m, 8, 8), ink 0..16, and labels uint8 (m,) of a split."""
    with files(__package__).joinpath("digits.npz").open("rb") as file, np.load(file) as archive:
        images, labels = archive["glyphs"], archive["labels"]
    chosen = (np.arange(len(labels)) % TEST_EVERY == 0) == (split == "test")
    return images[chosen], labels[chosen]


def write_digits(
    rng: np.random.Generator, scene: np.ndarray, n_digits: int, split: str
) -> list[tuple[int, np.ndarray]]:
    """Write digits over a scene float32 (3, H, W), in place; return their labels and masks bool (H, W)."""
    size = scene.shape[-1]
    placed = _place_digits(rng, size, n_digits, split)
    for _, coverage in placed:
        scene += coverage * (_ink(rng, size) - scene)
    return [(label, coverage >= 0.5) for label, coverage in placed]


def _place_digits(rng: np.random.Generator, size: int, n_digits: int, split: str) -> list[tuple[int, np.ndarray]]:
    """Place the digits: (label, coverage float32 (H, W) in [0, 1]) of each; their coverages do not overlap."""
    images, labels = glyphs(split)
    first = int(rng.integers(len(labels)))
    if n_digits == 1:
        height = rng.uniform(40, 72) * size / _REFERENCE_SIZE
        return [(int(labels[first]), _coverage(rng, images[first], height, _somewhere(rng, size, height), size))]
    others = np.flatnonzero(labels != labels[first])
    second = int(others[rng.integers(len(others))])
    while True:
        heights = rng.uniform(40, 58, 2) * size / _REFERENCE_SIZE
        centres = [_somewhere(rng, size, height) for height in heights]
        # digits with centres this far apart rarely overlap, so few coverages are drawn in vain
        if np.abs(centres[0] - centres[1]).max() < 0.45 * heights.sum():
            continue
        placed = [
            (int(labels[g]), _coverage(rng, images[g], height, centre, size))
            for g, height, centre in zip((first, second), heights, centres, strict=True)
        ]
        if not np.any((placed[0][1] > 0) & (placed[1][1] > 0)):
            return placed


def _somewhere(rng: np.random.Generator, size: int, height: float) -> np.ndarray:
    """Draw a centre (x, y) in pixels that keeps a digit of this height inside the scene."""
    margin = 0.54 * height
    return rng.uniform(margin, size - margin, 2)


def _coverage(rng: np.random.Generator, glyph: np.ndarray, height: float, centre: np.ndarray, size: int) -> np.ndarray:
    """Draw the antialiased coverage of a glyph, slightly rotated and sheared: float32 (size, size)."""
    refine = spline(_GLYPH_CELLS, _FINE, cardinal=True)
    fine = np.zeros((_FINE + 2 * _FINE_MARGIN,) * 2, np.float32)
    ink = glyph.astype(np.float32) / _GLYPH_LEVELS
    fine[_FINE_MARGIN:-_FINE_MARGIN, _FINE_MARGIN:-_FINE_MARGIN] = refine @ ink @ refine.T
    angle, shear, aspect = rng.uniform(-0.2, 0.2), rng.uniform(-0.2, 0.2), rng.uniform(0.85, 1.1)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    # Pillow takes the map from output to input: scene pixels to refined glyph samples
    matrix = np.array([[1 / aspect, shear], [0, 1]]) @ turn * (_FINE / height)
    offset = np.full(2, _FINE / 2 + _FINE_MARGIN) - matrix @ centre
    coefficients = np.column_stack([matrix, offset]).ravel()
    warped = Image.fromarray(fine).transform(
        (size, size), Image.Transform.AFFINE, tuple(coefficients), Image.Resampling.BILINEAR
    )
    return np.clip((np.asarray(warped) - _INK_LEVEL) / _INK_EDGE + 0.5, 0, 1)


def _ink(rng: np.random.Generator, size: int) -> np.ndarray:
    """Draw a bright tint that varies a little across the scene, float32 (3, size, size)."""
    tint = _tint(rng)
    return blend(ramp(rng, size), tint, 0.6 * tint + 0.4 * _tint(rng))


def _tint(rng: np.random.Generator) -> np.ndarray:
    """Draw a colour of any hue, lightened to a luminance of at least 0.72, float32 (3,)."""
    colour = hue(rng.uniform())
    luminance = float(colour @ _LUMINANCE)
    lowest = max(0.0, (0.72 - luminance) / (1 - luminance))
    return colour + np.float32(rng.uniform(lowest, max(lowest, 0.75))) * (1 - colour)
