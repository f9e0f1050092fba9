"""Pictures of attribution maps: the plain map, and the map over the photograph.

All pictures show a map on the same perceptual scale (`shown`); the numbers to compute with are in the .npz files.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from PIL import Image

from dave_fast.errors import InputError, reason_of, suggestion
from dave_fast.files import atomically
from dave_fast.numbers import parse_number

# Of an overlay: that of the photograph, of the model's input, or of the input enlarged for looking at.
Size = Literal["original", "model", "enlarged"]
SIZES: tuple[Size, ...] = get_args(Size)
# left, top, right, bottom
Box = tuple[float, float, float, float]
# Pictures are enlarged by a whole number until their shorter side has this many pixels.
SHORTEST_SIDE = 448
COLORMAP = "inferno"
# From −1 to 1: blue, black at 0 as in inferno, orange: colours that the colour-blind tell apart.
_TWO_COLOURS = ("#c8f0ff", "#35b0ff", "#1040b0", "#000000", "#a03000", "#ff8c1a", "#fff0a0")
# an odd number of colours: zero is exactly the middle one
_ENTRIES = 511
_GAMMA = 0.7
# The photograph under the map is desaturated and dimmed, so that bright colours are the map's alone; what the model was
# not shown is dimmed once more.
_SATURATION, _DIMMING, _LIFT, _UNSEEN = 0.4, 0.62, 0.05, 0.55
_OPAQUE_FROM = 0.75
_LUMINANCE = (0.299, 0.587, 0.114)
# Rows of a picture that are drawn at once, which takes about 50 bytes a pixel.
_BAND = 256


@dataclass(frozen=True)
class Style:
    """How maps are drawn.

    Attributes:
        colormap: a name of matplotlib's; None for "inferno", and for signed maps orange above zero and blue below.
        opacity: of the strongest colour over the photograph, in [0, 1].
        quantile: of a map's values, in [0.5, 1], that is shown as the strongest colour with all above it. The maximum
            is often a few isolated pixels.

    Raises:
        InputError: one of them is out of range, or there is no such colour map.
    """

    colormap: str | None = None
    opacity: float = 0.92
    quantile: float = 0.995

    def __post_init__(self) -> None:
        # they may be given as text
        object.__setattr__(self, "opacity", parse_number(self.opacity, "opacity", 0, 1))
        object.__setattr__(self, "quantile", parse_number(self.quantile, "quantile", 0.5, 1))
        if self.colormap is not None:
            check_colormap(self.colormap)

    def colours(self, values: np.ndarray, *, signed: bool) -> np.ndarray:
        """Return colours, float32 (..., 3) in [0, 1], for values, float32 (...) in [0, 1], or [-1, 1] if signed."""
        if signed:
            return colour_table(self.colormap or "", _ENTRIES)[np.rint(values * 255).astype(np.int16) + 255]
        return colour_table(self.colormap or COLORMAP, 256)[np.rint(values * 255).astype(np.uint8)]


def check_colormap(name: str) -> None:
    """Raise InputError where matplotlib has no such colour map."""
    from matplotlib import colormaps

    if not isinstance(name, str) or name not in colormaps:
        raise InputError(
            f"there is no colour map {name!r}: {suggestion(str(name), list(colormaps), 'matplotlib.colormaps')}"
        )


def check_size(name: str) -> Size:
    """Return the name of a size; raise InputError where there is no such size."""
    for known in SIZES:
        if name == known:
            return known
    raise InputError(f"size is {name!r}; expected one of {', '.join(SIZES)}")


@cache
def colour_table(name: str, entries: int) -> np.ndarray:
    """Return the colours of a colour map from its low end to its high end, float32 (entries, 3); "": blue to orange."""
    from matplotlib import colormaps
    from matplotlib.colors import LinearSegmentedColormap

    found = colormaps[name] if name else LinearSegmentedColormap.from_list("blue to orange", _TWO_COLOURS, N=entries)
    table: np.ndarray = found(np.linspace(0, 1, entries))[:, :3].astype(np.float32)
    return table


STYLE = Style()


def shown(heat: np.ndarray, quantile: float = STYLE.quantile) -> np.ndarray:
    """Return a map on the scale of pictures: divided by its 99.5 % quantile, clipped at 1, to the power 0.7.

    A map so sparse that the quantile is zero is divided by its maximum; an all-zero map stays zero.
    """
    top = float(np.quantile(heat, quantile)) or float(heat.max())
    if top <= 0:
        return np.zeros(heat.shape, np.float32)
    return (np.clip(heat / top, 0, 1) ** _GAMMA).astype(np.float32)


def scaled(heat: np.ndarray, style: Style = STYLE, *, signed: bool = False) -> np.ndarray:
    """Return a map on the scale of `shown`, float32 in [0, 1], or [-1, 1] if signed.

    Both signs have one scale: a side that is weaker than the other is darker.
    """
    if not signed:
        return shown(heat, style.quantile)
    return np.copysign(shown(np.abs(heat), style.quantile), heat).astype(np.float32)


def plain_map(
    heat: np.ndarray,
    style: Style = STYLE,
    *,
    signed: bool = False,
    size: tuple[int, int] | None = None,
    box: Box | None = None,
) -> Image.Image:
    """Draw a map (H, W) in colour: RGB.

    Args:
        heat: the map.
        style: how it is drawn.
        signed: whether it has two signs; zero is then in the middle of the colours, black by default.
        size: (W, H) of the picture; None for that of the map, enlarged by a whole number.
        box: what of the picture the map is of, as for `draw_over`.
    """
    size = size or enlarged_size(*heat.shape[::-1])
    rows, columns, values = _placed(scaled(heat, style, signed=signed), size, box)
    drawn = np.empty((*size[::-1], 3), np.uint8)
    drawn[:] = _bytes(style.colours(np.zeros((), np.float32), signed=signed))
    of_map = drawn[rows, columns]
    for top in range(0, len(values), _BAND):
        band = slice(top, top + _BAND)
        of_map[band] = _bytes(style.colours(values[band], signed=signed))
    return Image.fromarray(drawn)


def overlay(crop: np.ndarray, heat: np.ndarray, style: Style = STYLE, *, signed: bool = False) -> Image.Image:
    """Draw a map (H, W) over the crop that the model saw, uint8 (H, W, 3), enlarged: RGB; see `draw_over`."""
    return draw_over(Image.fromarray(photograph_of(crop)), heat, style=style, signed=signed)


def draw_over(
    photograph: Image.Image,
    heat: np.ndarray,
    box: Box | None = None,
    style: Style = STYLE,
    *,
    signed: bool = False,
) -> Image.Image:
    """Draw a map (H, W) over a photograph, at the photograph's size: RGB.

    The opacity of the map's colour grows with a pixel's contribution. Under a signed map the photograph is grey.

    Args:
        photograph: RGB.
        heat: the map.
        box: what of the photograph the map is of, in its pixels (`Geometry.seen`); None for all of it.
        style: how it is drawn.
        signed: whether the map has two signs.
    """
    rows, columns, values = _placed(scaled(heat, style, signed=signed), photograph.size, box)
    pixels = np.asarray(photograph)
    drawn = np.empty_like(pixels)
    saturation = 0 if signed else _SATURATION
    for top in range(0, len(pixels), _BAND):
        under = _under(pixels[top : top + _BAND], saturation)
        seen = slice(max(rows.start, top), min(rows.stop, top + len(under)))
        if seen.start < seen.stop:
            of_map = values[seen.start - rows.start : seen.stop - rows.start]
            at = slice(seen.start - top, seen.stop - top), columns
            lit = under[at]
            alpha = style.opacity * np.clip(np.abs(of_map) / _OPAQUE_FROM, 0, 1)[..., None]
            lit = lit + alpha * (style.colours(of_map, signed=signed) - lit)
            under *= _UNSEEN
            under[at] = lit
        else:
            under *= _UNSEEN
        drawn[top : top + _BAND] = _bytes(under)
    return Image.fromarray(drawn)


def _placed(values: np.ndarray, size: tuple[int, int], box: Box | None) -> tuple[slice, slice, np.ndarray]:
    """Return the rows and columns of a photograph of `size` (W, H) that a map lies on, and the map resized to them."""
    left, top, right, bottom = box or (0, 0, *size)
    columns, first, last = _covered(left, right, size[0], values.shape[1])
    rows, above, below = _covered(top, bottom, size[1], values.shape[0])
    wide, high = columns.stop - columns.start, rows.stop - rows.start
    return rows, columns, _resized(values, (wide, high), (first, above, last, below))


def _covered(start: float, stop: float, side: int, count: int) -> tuple[slice, float, float]:
    """Return the whole pixels that a map covers along one side, and the part of the map that lies on them.

    Args:
        start: of the map, in pixels of the photograph.
        stop: of the map.
        side: of the photograph, in pixels.
        count: pixels of the map.
    """
    first = min(max(round(start), 0), side - 1)
    last = max(min(round(stop), side), first + 1)
    step = count / (stop - start)
    return slice(first, last), max(0.0, (first - start) * step), min(float(count), (last - start) * step)


def _under(pixels: np.ndarray, saturation: float) -> np.ndarray:
    """Return pixels, uint8 (H, W, 3), dimmed and desaturated: float32 in [0, 1]."""
    colours = pixels / np.float32(255)
    grey = (colours @ np.array(_LUMINANCE, np.float32))[..., None]
    under: np.ndarray = _LIFT + _DIMMING * (grey + saturation * (colours - grey))
    return under


def photograph_of(crop: np.ndarray) -> np.ndarray:
    """Return the crop that the model saw, uint8 (H, W, 3), enlarged like the other pictures."""
    image = Image.fromarray(crop)
    return np.asarray(image.resize(enlarged_size(*image.size), Image.Resampling.BICUBIC))


def enlarged_size(width: int, height: int) -> tuple[int, int]:
    """Return the width and height of an enlarged picture."""
    factor = max(1, math.ceil(SHORTEST_SIDE / min(width, height)))
    return width * factor, height * factor


def _resized(values: np.ndarray, size: tuple[int, int], box: Box | None = None) -> np.ndarray:
    """Return a part of a map, float32 (H, W), resized to (W, H); bicubic overshoot is clipped."""
    made = Image.fromarray(values).resize(size, Image.Resampling.BICUBIC, box)
    return np.clip(np.asarray(made), values.min(), values.max())


def _bytes(colours: np.ndarray) -> np.ndarray:
    """Return colours in [0, 1] as uint8."""
    return np.rint(np.clip(colours, 0, 1) * 255).astype(np.uint8)


def percent(probability: float) -> str:
    """Return a probability for readers: "93.1 %", "< 0.1 %", "–" where there is none (NaN)."""
    if math.isnan(probability):
        return "–"
    return "< 0.1 %" if 0 <= probability < 0.001 else f"{100 * probability:.1f} %"


def save_picture(image: Image.Image, path: str | os.PathLike[str]) -> Path:
    """Write a picture as PNG, atomically, and return its path."""
    with atomically(path) as file:
        image.save(file, format="PNG")
    return Path(path)


def check_suffix(path: str | os.PathLike[str]) -> str:
    """Return Pillow's format for the suffix of a path; raise InputError where it is none of a picture."""
    form = Image.registered_extensions().get(Path(path).suffix.lower())
    if form is None or form not in Image.SAVE:
        raise InputError(
            f"{path} is no picture by its name; expected .png, .jpg, .webp, .pdf, .svg ..., or .npz for arrays."
        )
    return form


def save_as(image: Image.Image, path: str | os.PathLike[str]) -> Path:
    """Write a picture in the format of the suffix, atomically, and return its path.

    Raises:
        InputError: the suffix is none of a picture, or the file cannot be written.
    """
    form = check_suffix(path)
    with atomically(path) as file:
        try:
            image.save(file, format=form, quality=95)
        # a format may have no pictures of this size or kind
        except ValueError as error:
            raise InputError(f"cannot write {path}: {reason_of(error)}; .png and .tif take any picture.") from error
    return Path(path)
