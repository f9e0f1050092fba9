"""Tests of the report's drawings."""

import xml.etree.ElementTree as ET

import pytest

from dave_fast.evaluate.plots import Line, forest, lines
from dave_fast.evaluate.statistics import Interval

# Equal but for rounding, so that their ticks are equal.
CLOSE = [0.3, 0.1 + 0.2]


@pytest.mark.parametrize("values", [CLOSE, [0.5, 0.5], [-1e-17, 1e-17], [0.0, 1e6]])
def test_values_of_any_spread_are_drawn_inside_the_picture(values):
    rows = [("a", 0, Interval(values[0], min(values), max(values), 2)), ("b", 1, Interval(values[1], *values, 2))]
    curves = [Line("a", 0, [0.0, 1.0], values)]
    for picture in (forest(rows, None), lines(curves, "x", "y")):
        svg = ET.fromstring(picture)
        _, _, width, height = map(float, svg.attrib["viewBox"].split())
        for element in svg.iter():
            for name, value in element.attrib.items():
                if name in ("x", "x1", "x2", "cx"):
                    assert 0 <= float(value) <= width
                if name in ("y", "y1", "y2", "cy"):
                    assert 0 <= float(value) <= height
