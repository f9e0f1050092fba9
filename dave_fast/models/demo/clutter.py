"""Procedural clutter: the dark, colourful backgrounds of the demo scenes.

Axes: H = W = size in pixels; images are planes, (3, H, W).
"""

from functools import cache

import numpy as np
from PIL import Image, ImageDraw


def draw_clutter(rng: np.random.Generator, size: int) -> np.ndarray:
    """Draw a background, float32 (3, size, size) in [0, 0.5]: noise, textured regions, shapes, shading, grain."""
    palette = _palette(rng)
    scene = _marble(rng, size, palette)
    for _ in range(rng.integers(1, 4)):
        region = np.clip(_octaves(rng, size, (3, 9)) * 6 - rng.uniform(1, 5), 0, 1)
        scene += region * (_texture(rng, size, palette) - scene)
    scene = _shapes(rng, scene, palette)
    light = 1 + 0.5 * _octaves(rng, size, (2, 4)) + 0.9 * (ramp(rng, size) - 0.5)
    scene *= np.clip(light, 0.15, 2)
    scene += rng.standard_normal((size, size), np.float32) * np.float32(rng.uniform(0.01, 0.04))
    np.clip(scene, 0, None, out=scene)
    scene *= np.float32(rng.uniform(0.16, 0.26)) / max(float(scene.mean()), 1e-3)
    # tanh keeps highlights darker than the digits without clipping them to one value
    return 0.5 * np.tanh(2 * scene)


def _palette(rng: np.random.Generator) -> np.ndarray:
    """Draw five colours, float32 (5, 3): shades around one or two hues, and one other."""
    base = rng.uniform()
    turns = base + np.array([0, 0.06, -0.08, rng.choice([0.12, 0.5]), rng.uniform()])
    colours = np.stack([hue(turn) for turn in turns])
    saturation = rng.uniform(0.25, 0.95, (5, 1)).astype(np.float32)
    value = rng.uniform(0.15, 1, (5, 1)).astype(np.float32)
    return value * (1 - saturation * (1 - colours))


def _marble(rng: np.random.Generator, size: int, palette: np.ndarray) -> np.ndarray:
    """Draw smooth noise in colours of the palette, float32 (3, size, size)."""
    field = _octaves(rng, size, (3, 6, 12, 24, 48)) + 1.5 * ramp(rng, size)
    position = np.clip(field * 1.2 + 1, 0, 3)
    shades = palette[rng.permutation(5)[:4]]
    # one table look-up a pixel instead of three interpolations
    steps = np.linspace(0, 3, 256)
    table = np.stack([np.interp(steps, np.arange(4), channel) for channel in shades.T]).astype(np.float32)
    return np.take(table, (position * 85).astype(np.intp), axis=1)


def _texture(rng: np.random.Generator, size: int, palette: np.ndarray) -> np.ndarray:
    """Draw stripes, checks, speckle or a smooth gradient of two palette colours, float32 (3, size, size)."""
    low, high = palette[rng.choice(5, 2, replace=False)]
    kind = rng.integers(4)
    frequency = np.float32(rng.uniform(4, 16) * 2 * np.pi)
    if kind == 0:
        wave = np.sin(ramp(rng, size) * frequency + 2 * _octaves(rng, size, (4, 8)))
    elif kind == 1:
        wave = np.sin(ramp(rng, size) * frequency) * np.sin(ramp(rng, size) * frequency)
    elif kind == 2:
        wave = _octaves(rng, size, (24, 48)) * 2
    else:
        wave = _octaves(rng, size, (4, 16))
    return blend(np.clip(0.5 + 0.8 * wave, 0, 1), low, high)


def _shapes(rng: np.random.Generator, scene: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Draw ellipses, polygons and curved strokes over a scene, float32 (3, size, size), at twice its resolution."""
    wide = 2 * scene.shape[-1]
    canvas = Image.fromarray(to_uint8(scene)).resize((wide, wide), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(canvas)

    def colour() -> tuple[int, ...]:
        shade = palette[rng.integers(5)] * rng.uniform(0.6, 1.1)
        return tuple(int(min(255, 255 * channel)) for channel in shade)

    for _ in range(rng.integers(1, 7)):
        x, y = rng.uniform(0, wide, 2)
        radii = rng.uniform(0.02, 0.16, 2) * wide
        draw.ellipse((x - radii[0], y - radii[1], x + radii[0], y + radii[1]), fill=colour())
    for _ in range(rng.integers(0, 4)):
        corners = rng.uniform(0, wide, 2) + rng.uniform(-0.2, 0.2, (rng.integers(3, 6), 2)) * wide
        draw.polygon(corners.ravel().tolist(), fill=colour())
    along = np.linspace(0, 1, 12)[:, None]
    for _ in range(rng.integers(2, 9)):
        start, bend, end = rng.uniform(-0.1, 1.1, (3, 2)) * wide
        curve = (1 - along) ** 2 * start + 2 * along * (1 - along) * bend + along**2 * end
        draw.line(curve.ravel().tolist(), fill=colour(), width=int(rng.integers(2, 11)), joint="curve")
    return np.asarray(canvas.reduce(2)).transpose(2, 0, 1) / np.float32(255)


def _octaves(rng: np.random.Generator, size: int, cells: tuple[int, ...]) -> np.ndarray:
    """Draw smooth noise of about unit variance, float32 (size, size): random grids of `cells`, amplitude ∝ 1/cells."""
    total = np.zeros((size, size), np.float32)
    weights = np.array([cells[0] / c for c in cells], np.float32)
    # a cubic B-spline of a grid of unit normals has a variance of about 0.23
    weights *= 2.1 / np.sqrt(np.sum(weights**2))
    for count, weight in zip(cells, weights, strict=True):
        weights_1d = spline(count, size)
        total += weight * (weights_1d @ rng.standard_normal((count, count), np.float32) @ weights_1d.T)
    return total


def blend(share: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Interpolate from colour low to colour high, both (3,), by a share (H, W): float32 (3, H, W)."""
    return low[:, None, None] + share * (high - low)[:, None, None]


def ramp(rng: np.random.Generator, size: int) -> np.ndarray:
    """Draw a linear gradient in a random direction, float32 (size, size), 0 to 1 across the scene's diagonal."""
    angle = rng.uniform(0, 2 * np.pi)
    line = np.linspace(-0.5, 0.5, size, dtype=np.float32)
    across = np.float32(np.cos(angle)) * line + np.float32(np.sin(angle)) * line[:, None]
    return across / np.float32(np.sqrt(2)) + np.float32(0.5)


def hue(turn: float) -> np.ndarray:
    """Return the saturated colour at a hue in turns, float32 (3,)."""
    phase = 6 * (turn + np.array([0, 2 / 3, 1 / 3])) % 6
    return np.clip(np.abs(phase - 3) - 1, 0, 1).astype(np.float32)


def to_uint8(scene: np.ndarray) -> np.ndarray:
    """Convert planes float32 (3, H, W) in [0, 1] to pixels uint8 (H, W, 3)."""
    return np.clip(scene * 255 + 0.5, 0, 255).astype(np.uint8).transpose(1, 2, 0)


@cache
def spline(cells: int, samples: int, *, cardinal: bool = False) -> np.ndarray:
    """Return weights of cubic interpolation from cell centres to sample centres; values beyond the edge are zero.

    Args:
        cells: number of cells.
        samples: number of samples.
        cardinal: whether weights are Catmull-Rom's, which interpolate the values, instead of the smoother B-spline's.

    Returns:
        float32 (samples, cells).
    """
    position = (np.arange(samples) + 0.5) * cells / samples - 0.5
    d = np.abs(position[:, None] - np.arange(cells))
    if cardinal:
        near, far = 1.5 * d**3 - 2.5 * d**2 + 1, -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2
    else:
        near, far = 2 / 3 - d**2 + d**3 / 2, (2 - d) ** 3 / 6
    weights = np.where(d < 1, near, np.where(d < 2, far, 0))
    if not cardinal:
        # so that noise does not fade towards the edges of the scene
        weights /= weights.sum(axis=1, keepdims=True)
    return weights.astype(np.float32)
