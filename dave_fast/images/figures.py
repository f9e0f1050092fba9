"""Figures of attribution maps at print size: one image with its targets, and grids of many images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dave_fast.files import atomically
from dave_fast.images.drawing import (
    COLORMAP,
    SHORTEST_SIDE,
    STYLE,
    Style,
    colour_table,
    overlay,
    percent,
    photograph_of,
    plain_map,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 300
# Inches. A picture of the usual size is printed pixel by pixel.
_SIDE, _GAP, _HEADING, _MARGIN, _BAR, _BAR_LABEL = SHORTEST_SIDE / DPI, 0.07, 0.27, 0.04, 0.07, 0.36
# Points.
_SIZE, SMALL = 8.0, 6.5
GREY = "0.35"
# Cells of a grid's row, where one image has fewer.
_ROW = 6


@dataclass(frozen=True)
class Panel:
    """One explained target of a figure.

    Attributes:
        heat: its map, float32 (H, W) in [0, 1], or in [-1, 1] where it is signed.
        name: its caption.
        probability: of a class; None for other targets.
        depth: of the map, where there is something to say about it.
        crop: the model's view, uint8 (H, W, 3), where it differs from the figure's; else None.
        signed: whether the map has two signs.
    """

    heat: np.ndarray
    name: str
    probability: float | None = None
    depth: str = ""
    crop: np.ndarray | None = None
    signed: bool = False

    def small(self) -> str:
        """Return what stands below the caption."""
        known = "" if self.probability is None else percent(self.probability)
        return " · ".join(filter(None, (known, self.depth)))

    def over(self, crop: np.ndarray, style: Style) -> np.ndarray:
        """Return the map over the model's view."""
        return np.asarray(overlay(crop if self.crop is None else self.crop, self.heat, style, signed=self.signed))


def figure(
    crop: np.ndarray,
    panels: Sequence[Panel],
    probabilities: Sequence[tuple[str, float]] = (),
    style: Style = STYLE,
) -> Figure:
    """Draw a figure at print size: the input, and the targets that it was explained for.

    One target makes a row: input, map, overlay. Several make a column each, overlay above map. The figure is not
    registered with pyplot and needs no closing.

    Args:
        crop: the model's view, uint8 (H, W, 3).
        panels: one target or more.
        probabilities: (name, probability) of the most probable classes, drawn as bars beside several panels.
        style: how the maps are drawn.
    """
    grid = _Grid(3 if len(panels) == 1 else 1 + len(panels), 1 if len(panels) == 1 else 2, crop.shape)
    grid.image(0, 0, photograph_of(crop), "input")
    maps = [np.asarray(plain_map(panel.heat, style, signed=panel.signed)) for panel in panels]
    if len(panels) == 1:
        (panel,) = panels
        grid.image(0, 1, maps[0], "map")
        grid.image(0, 2, panel.over(crop, style), panel.name, panel.small())
        grid.colorbar(0, style, signed=panel.signed)
        return grid.figure
    for column, (panel, plain) in enumerate(zip(panels, maps, strict=True), 1):
        grid.image(0, column, panel.over(crop, style), panel.name, panel.small())
        grid.image(1, column, plain)
    # one scale for each kind of map
    for row, signed in enumerate(sorted({panel.signed for panel in panels}), 1):
        grid.colorbar(2 - row, style, signed=signed)
    if probabilities:
        _bars(grid.cell(1, 0), probabilities, {panel.name for panel in panels}, style)
    return grid.figure


class Row(NamedTuple):
    """An image of a grid.

    Attributes:
        name: of the image.
        crop: the model's view, uint8 (H, W, 3).
        panels: its targets.
        small: words below the name.
    """

    name: str
    crop: np.ndarray
    panels: Sequence[Panel]
    small: str = ""


def grid_of(images: Sequence[Row], style: Style = STYLE) -> Figure:
    """Draw many images: each with its overlays beside it, several of them in a row, or one in several rows.

    Args:
        images: with views of one size, and each with as many targets as the others.
        style: how the maps are drawn.
    """
    count = 1 + len(images[0].panels)
    # rows of about equal length for an image of many targets; else as many images as fit into a row
    lines = -(-count // _ROW)
    width = -(-count // lines)
    groups = min(max(1, _ROW // width), len(images)) if lines == 1 else 1
    grid = _Grid(groups * width, lines * -(-len(images) // groups), images[0].crop.shape, headings=True)
    kinds = {panel.signed for row in images for panel in row.panels}
    for number, image in enumerate(images):
        row, first = number // groups * lines, number % groups * width
        grid.image(row, first, photograph_of(image.crop), image.name, image.small)
        for place, panel in enumerate(image.panels, 1):
            at = row + place // width, first + place % width
            grid.image(*at, panel.over(image.crop, style), panel.name, panel.small())
    for row, signed in enumerate(sorted(kinds)):
        if row < grid.rows:
            grid.colorbar(row, style, signed=signed)
    return grid.figure


class _Grid:
    """Cells of one size in a figure, placed in inches, so that figures of any shape match in print.

    Args:
        columns: of cells.
        rows: of cells.
        shape: (H, W) of the pictures.
        headings: whether every row has room for headings, not only the first.
    """

    def __init__(self, columns: int, rows: int, shape: Sequence[int], *, headings: bool = False) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.cell_height = _SIDE * shape[0] / shape[1]
        self.columns, self.rows = columns, rows
        self._step = self.cell_height + _GAP + (_HEADING if headings else 0)
        self.width = 2 * _MARGIN + columns * (_SIDE + _GAP) + _BAR + _BAR_LABEL
        self.height = 2 * _MARGIN + _HEADING + (rows - 1) * self._step + self.cell_height
        self.figure = Figure(figsize=(self.width, self.height), dpi=DPI)
        FigureCanvasAgg(self.figure)

    def cell(self, row: int, column: int, width: float = _SIDE) -> Axes:
        left = _MARGIN + column * (_SIDE + _GAP)
        top = _MARGIN + _HEADING + row * self._step
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

    def colorbar(self, row: int, style: Style, *, signed: bool) -> None:
        """Draw the colour scale to the right of a row's last cell."""
        axes = self.cell(row, self.columns, _BAR)
        table = colour_table(style.colormap or ("" if signed else COLORMAP), 256)
        axes.imshow(table[::-1, None], aspect="auto", interpolation="antialiased")
        axes.set_axis_off()
        for y, text, side in (
            (0.99, "for" if signed else "high", "top"),
            (0.01, "against" if signed else "low", "bottom"),
        ):
            axes.text(1.5, y, text, transform=axes.transAxes, va=side, fontsize=SMALL, color=GREY)


def _bars(axes: Axes, probabilities: Sequence[tuple[str, float]], explained: set[str], style: Style) -> None:
    """Draw probabilities as bars under their names, those of explained classes in the colour of the map."""
    strong, faint = colour_table(style.colormap or COLORMAP, 256)[150], "0.75"
    for row, (name, probability) in enumerate(probabilities):
        axes.barh(row + 0.28, probability, height=0.3, color=strong if name in explained else faint, lw=0)
        axes.text(0, row - 0.06, _short(name), va="center", fontsize=SMALL)
        axes.text(1, row - 0.06, percent(probability), va="center", ha="right", fontsize=SMALL, color=GREY)
    axes.set_xlim(0, 1)
    # The same thickness for any number of bars up to five.
    axes.set_ylim(max(len(probabilities), 5) - 0.45, -0.45)
    axes.set_axis_off()


def _short(name: str, limit: int = 22) -> str:
    return name if len(name) <= limit else name[: limit - 1].rstrip() + "…"


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Write a figure in the format of the suffix (png, pdf, svg), atomically, and return its path."""
    from matplotlib import rc_context

    # Type 42 embeds TrueType fonts, which journals require.
    with atomically(path) as file, rc_context({"pdf.fonttype": 42, "svg.hashsalt": "dave-fast"}):
        figure.savefig(file, format=Path(path).suffix.lstrip(".") or "png", dpi=DPI)
    return Path(path)
