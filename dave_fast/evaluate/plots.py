"""Charts as inline SVG, for a page without scripts; colours are CSS classes c0 … c9, so that themes may differ."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from dave_fast.evaluate.statistics import Interval

COLOURS = 9
# of DAVE's maps of the pixels beside those of a block
OTHER_DAVE = 9
_ROW, _LABEL, _PLOT, _VALUE = 22, 160, 200, 178
_WIDTH, _HEIGHT = 420, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 42, 10, 10, 34


@dataclass(frozen=True)
class Line:
    """A curve.

    Attributes:
        name: of the method.
        colour: 0 to 9.
        x: abscissae.
        y: ordinates; values that are not finite are left out.
        dashed: whether the line is dashed, as those of controls are.
    """

    name: str
    colour: int
    x: Sequence[float]
    y: Sequence[float]
    dashed: bool = False


def forest(rows: Sequence[tuple[str, int, Interval]], best: str | None) -> str:
    """Draw means and intervals of one metric.

    Args:
        rows: (name, colour, interval) of each method.
        best: name of the method to set in bold, or None.

    Returns:
        The SVG element.
    """
    low, high = min(each.low for _, _, each in rows), max(each.high for _, _, each in rows)
    ticks = _ticks(low, high, 4)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    # Ticks are rounded: those of values that differ by rounding alone are equal.
    span = (high - low) or 1.0

    def place(value: float) -> float:
        return _LABEL + (value - low) / span * _PLOT

    height = _ROW * len(rows) + 24
    parts = [f'<svg viewBox="0 0 {_LABEL + _PLOT + _VALUE} {height}" role="img">']
    for tick in ticks:
        x = place(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height - 20}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{height - 6}" text-anchor="middle">{tick:g}</text>')
    for number, (name, colour, interval) in enumerate(rows):
        y = _ROW * number + _ROW / 2
        weight = ' class="best"' if name == best else ""
        parts.append(f'<text{weight} x="{_LABEL - 12}" y="{y + 4}" text-anchor="end">{html.escape(name)}</text>')
        x1, x2 = place(interval.low), place(interval.high)
        parts.append(f'<line class="s c{colour}" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y}" y2="{y}"/>')
        parts.append(f'<circle class="f c{colour}" cx="{place(interval.mean):.1f}" cy="{y}" r="4.5"/>')
        parts.append(f'<text{weight} x="{_LABEL + _PLOT + 12}" y="{y + 4}">{interval.text()}</text>')
    return "".join([*parts, "</svg>"])


def lines(curves: Sequence[Line], x_title: str, y_title: str, x_names: Sequence[str] = ()) -> str:
    """Draw curves over one pair of axes.

    Args:
        curves: the curves.
        x_title: of the horizontal axis.
        y_title: of the vertical axis.
        x_names: labels of x = 0, 1, 2, ... in place of numbers.

    Returns:
        The SVG element.
    """
    xs = [x for curve in curves for x in curve.x]
    ys = [y for curve in curves for y in curve.y if math.isfinite(y)]
    x_low, x_high = min(xs), max(xs)
    y_ticks = _ticks(min(ys), max(ys), 5)
    y_low, y_high = min(*ys, y_ticks[0]), max(*ys, y_ticks[-1])

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / ((x_high - x_low) or 1)
        up = (y - y_low) / ((y_high - y_low) or 1)
        return _LEFT + across * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM)

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">']
    for tick in y_ticks:
        x, y = at(x_low, tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{x - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    named = list(enumerate(x_names)) if x_names else [(tick, f"{tick:g}") for tick in _ticks(x_low, x_high, 5)]
    for tick, name in named:
        x, y = at(tick, y_low)
        parts.append(f'<text class="tick" x="{x:.1f}" y="{y + 15:.1f}" text-anchor="middle">{html.escape(name)}</text>')
    for curve in curves:
        points = [at(x, y) for x, y in zip(curve.x, curve.y, strict=True) if math.isfinite(y)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dashes = ' stroke-dasharray="5 4"' if curve.dashed else ""
        parts.append(f'<polyline class="l c{curve.colour}" points="{path}"{dashes}/>')
    right, below = _WIDTH - _RIGHT, _HEIGHT - 4
    parts.append(f'<text class="tick" x="{right}" y="{below}" text-anchor="end">{html.escape(x_title)}</text>')
    parts.append(f'<text class="tick" x="{_LEFT + 4}" y="{_TOP + 4}">{html.escape(y_title)}</text></svg>')
    return "".join(parts)


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Return round numbers that enclose low and high, about `about` of them."""
    span = (high - low) or abs(high) or 1.0
    raw = span / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, max(last, first + 1) + 1)]
