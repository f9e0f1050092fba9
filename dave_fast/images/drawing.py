"""Pictures of attribution maps: the plain map, the map over the photograph, and a figure for a paper.

All pictures show a map on the same perceptual scale (`shown`); the numbers to compute with are in the .npz files.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from dave_fast.files import atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Pictures are enlarged by a whole number until their shorter side has this many pixels.
SHORTEST_SIDE = 448
COLORMAP = "inferno"
# From −1 to 1: blue, black at 0 as in inferno, orange: colours that the colour-blind tell apart.
_TWO_COLOURS = ("#c8f0ff", "#35b0ff", "#1040b0", "#000000", "#a03000", "#ff8c1a", "#fff0a0")
# The maximum is often a few isolated pixels: values above this quantile are shown as brightest.
_BRIGHTEST = 0.995
_GAMMA = 0.7
# The photograph under the map is desaturated and dimmed, so that bright colours are the map's alone.
_SATURATION, _DIMMING, _LIFT = 0.4, 0.62, 0.05
_OPACITY, _OPAQUE_FROM = 0.92, 0.75
_LUMINANCE = (0.299, 0.587, 0.114)

DPI = 300
# Inches. A picture of the usual size is printed pixel by pixel.
_SIDE, _GAP, _HEADING, _MARGIN, _BAR, _BAR_LABEL = SHORTEST_SIDE / DPI, 0.07, 0.27, 0.04, 0.07, 0.28
# Points.
_SIZE, SMALL = 8.0, 6.5
GREY = "0.35"


@dataclass(frozen=True)
class Panel:
    """One explained target of a figure.

    Attributes:
        heat: its map, float32 (H, W) in [0, 1].
        name: its caption.
        probability: of a class; None for other targets.
        depth: of the map, where there is something to say about it.
        crop: the model's view, uint8 (H, W, 3), where it differs from the figure's; else None.
    """

    heat: np.ndarray
    name: str
    probability: float | None = None
    depth: str = ""
    crop: np.ndarray | None = None

    def small(self) -> str:
        """Return what stands below the caption."""
        known = "" if self.probability is None else percent(self.probability)
        return " · ".join(filter(None, (known, self.depth)))


def shown(heat: np.ndarray) -> np.ndarray:
    """Return a map on the scale of pictures: divided by its 99.5 % quantile, clipped at 1, to the power 0.7.

    A map so sparse that the quantile is zero is divided by its maximum; an all-zero map stays zero.
    """
    top = float(np.quantile(heat, _BRIGHTEST)) or float(heat.max())
    if top <= 0:
        return np.zeros(heat.shape, np.float32)
    return (np.clip(heat / top, 0, 1) ** _GAMMA).astype(np.float32)


def plain_map(heat: np.ndarray) -> Image.Image:
    """Draw a map (H, W) in colour, enlarged: RGB."""
    return _picture(_colours(_enlarge(shown(heat))))


def overlay(crop: np.ndarray, heat: np.ndarray) -> Image.Image:
    """Draw a map (H, W) over the crop that the model saw, uint8 (H, W, 3), enlarged: RGB.

    The opacity of the map's colour grows with a pixel's contribution.
    """
    strength = _enlarge(shown(heat))
    return _over(crop, strength, _colours(strength), _SATURATION)


def signed_map(heat: np.ndarray) -> Image.Image:
    """Draw a signed map (H, W), enlarged: RGB; orange above zero, blue below, black at zero, on the scale of `shown`.

    Both signs have one scale: a side that is weaker than the other is darker.
    """
    return _picture(_signed_colours(_signed(heat)))


def signed_overlay(crop: np.ndarray, heat: np.ndarray) -> Image.Image:
    """Draw a signed map (H, W), in the colours of `signed_map`, over the crop in grey, uint8 (H, W, 3): RGB."""
    values = _signed(heat)
    return _over(crop, np.abs(values), _signed_colours(values), saturation=0)


def _over(crop: np.ndarray, strength: np.ndarray, colours: np.ndarray, saturation: float) -> Image.Image:
    """Draw colours (H, W, 3) over the crop, the stronger (H, W) the more opaque; all but the crop are enlarged."""
    photograph = photograph_of(crop) / np.float32(255)
    grey = (photograph @ np.array(_LUMINANCE, np.float32))[..., None]
    under = _LIFT + _DIMMING * (grey + saturation * (photograph - grey))
    alpha = _OPACITY * np.clip(strength / _OPAQUE_FROM, 0, 1)[..., None]
    return _picture(under + alpha * (colours - under))


def photograph_of(crop: np.ndarray) -> np.ndarray:
    """Return the crop that the model saw, uint8 (H, W, 3), enlarged like the other pictures."""
    return np.asarray(_resized(Image.fromarray(crop)))


def _resized(image: Image.Image) -> Image.Image:
    factor = max(1, math.ceil(SHORTEST_SIDE / min(image.size)))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)


def _enlarge(values: np.ndarray) -> np.ndarray:
    """Return values in [0, 1], float32 (H, W), enlarged; bicubic overshoot is clipped."""
    return np.clip(np.asarray(_resized(Image.fromarray(values))), 0, 1)


def _signed(heat: np.ndarray) -> np.ndarray:
    """Return a signed map on the scale of `shown`, float32 in [-1, 1], enlarged; bicubic overshoot is clipped."""
    values = np.copysign(shown(np.abs(heat)), heat).astype(np.float32)
    return np.clip(np.asarray(_resized(Image.fromarray(values))), -1, 1)


def _signed_colours(values: np.ndarray) -> np.ndarray:
    """Return colours, float32 (H, W, 3) in [0, 1], for values in [-1, 1], float32 (H, W)."""
    from matplotlib.colors import LinearSegmentedColormap

    # an odd number of colours: zero is exactly black
    table = LinearSegmentedColormap.from_list("blue to orange", _TWO_COLOURS, N=511)(np.arange(511))
    return table[:, :3].astype(np.float32)[np.rint(values * 255).astype(np.int16) + 255]


def _colours(values: np.ndarray) -> np.ndarray:
    """Return colours, float32 (H, W, 3) in [0, 1], for values in [0, 1], float32 (H, W)."""
    return _colour_table()[np.rint(values * 255).astype(np.uint8)]


@cache
def _colour_table() -> np.ndarray:
    from matplotlib import colormaps

    return colormaps[COLORMAP](np.linspace(0, 1, 256))[:, :3].astype(np.float32)


def _picture(colours: np.ndarray) -> Image.Image:
    return Image.fromarray(np.rint(np.clip(colours, 0, 1) * 255).astype(np.uint8))


def figure(crop: np.ndarray, panels: Sequence[Panel], probabilities: Sequence[tuple[str, float]] = ()) -> Figure:
    """Draw a figure at print size: the input, and the targets that it was explained for.

    One target makes a row: input, map, overlay. Several make a column each, overlay above map. The figure is not
    registered with pyplot and needs no closing.

    Args:
        crop: the model's view, uint8 (H, W, 3).
        panels: one target or more.
        probabilities: (name, probability) of the most probable classes, drawn as bars beside several panels.
    """
    grid = _Grid(3 if len(panels) == 1 else 1 + len(panels), 1 if len(panels) == 1 else 2, crop.shape)
    grid.image(0, 0, photograph_of(crop), "input")
    if len(panels) == 1:
        (panel,) = panels
        grid.image(0, 1, np.asarray(plain_map(panel.heat)), "map")
        grid.image(0, 2, np.asarray(overlay(crop, panel.heat)), panel.name, panel.small())
        grid.colorbar(0)
        return grid.figure
    for column, panel in enumerate(panels, 1):
        seen = crop if panel.crop is None else panel.crop
        grid.image(0, column, np.asarray(overlay(seen, panel.heat)), panel.name, panel.small())
        grid.image(1, column, np.asarray(plain_map(panel.heat)))
    grid.colorbar(1)
    if probabilities:
        _bars(grid.cell(1, 0), probabilities, {panel.name for panel in panels})
    return grid.figure


class _Grid:
    """Cells of one size in a figure, placed in inches, so that figures of any shape match in print."""

    def __init__(self, columns: int, rows: int, shape: Sequence[int]) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.cell_height = _SIDE * shape[0] / shape[1]
        self.columns = columns
        self.width = 2 * _MARGIN + columns * (_SIDE + _GAP) + _BAR + _BAR_LABEL
        self.height = 2 * _MARGIN + _HEADING + rows * self.cell_height + (rows - 1) * _GAP
        self.figure = Figure(figsize=(self.width, self.height), dpi=DPI)
        FigureCanvasAgg(self.figure)

    def cell(self, row: int, column: int, width: float = _SIDE) -> Axes:
        left = _MARGIN + column * (_SIDE + _GAP)
        top = _MARGIN + _HEADING + row * (self.cell_height + _GAP)
        left, width = left / self.width, width / self.width
        bottom, height = (self.height - top - self.cell_height) / self.height, self.cell_height / self.height
        return self.figure.add_axes((left, bottom, width, height))

    def image(self, row: int, column: int, pixels: np.ndarray, name: str = "", small: str = "") -> None:
        """Draw pixels in a cell, with a heading where a name is given, and small words below it."""
        axes = self.cell(row, column)
        axes.imshow(pixels, interpolation="antialiased", aspect="auto")
        axes.set_axis_off()
        if small:
            axes.set_title(small, fontsize=SMALL, color=GREY, pad=2.5)
        if name:
            weight, above = ("bold", 0.155) if small else ("normal", 0.04)
            text = axes.text(0.5, 1 + above / self.cell_height, _short(name), transform=axes.transAxes)
            text.set(ha="center", fontsize=_SIZE, fontweight=weight)

    def colorbar(self, row: int) -> None:
        """Draw the colour scale to the right of a row's last cell."""
        axes = self.cell(row, self.columns, _BAR)
        axes.imshow(_colour_table()[::-1, None], aspect="auto", interpolation="antialiased")
        axes.set_axis_off()
        for y, text, side in ((0.99, "high", "top"), (0.01, "low", "bottom")):
            axes.text(1.5, y, text, transform=axes.transAxes, va=side, fontsize=SMALL, color=GREY)


def _bars(axes: Axes, probabilities: Sequence[tuple[str, float]], explained: set[str]) -> None:
    """Draw probabilities as bars under their names, those of explained classes in the colour of the map."""
    strong, faint = _colour_table()[150], "0.75"
    for row, (name, probability) in enumerate(probabilities):
        axes.barh(row + 0.28, probability, height=0.3, color=strong if name in explained else faint, lw=0)
        axes.text(0, row - 0.06, _short(name), va="center", fontsize=SMALL)
        axes.text(1, row - 0.06, percent(probability), va="center", ha="right", fontsize=SMALL, color=GREY)
    axes.set_xlim(0, 1)
    # The same thickness for any number of bars up to five.
    axes.set_ylim(max(len(probabilities), 5) - 0.45, -0.45)
    axes.set_axis_off()


def percent(probability: float) -> str:
    """Return a probability for readers: "93.1 %", "< 0.1 %", "–" where there is none (NaN)."""
    if math.isnan(probability):
        return "–"
    return "< 0.1 %" if 0 <= probability < 0.001 else f"{100 * probability:.1f} %"


def _short(name: str, limit: int = 22) -> str:
    return name if len(name) <= limit else name[: limit - 1].rstrip() + "…"


def save_picture(image: Image.Image, path: str | os.PathLike[str]) -> Path:
    """Write a picture as PNG, atomically, and return its path."""
    with atomically(path) as file:
        image.save(file, format="PNG")
    return Path(path)


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Write a figure in the format of the suffix (png, pdf, svg), atomically, and return its path."""
    from matplotlib import rc_context

    # Type 42 embeds TrueType fonts, which journals require.
    with atomically(path) as file, rc_context({"pdf.fonttype": 42, "svg.hashsalt": "dave-fast"}):
        figure.savefig(file, format=Path(path).suffix.lstrip(".") or "png", dpi=DPI)
    return Path(path)
