"""Tests of figures: panels of matching sizes in print, names, colour scales, grids of images."""

import numpy as np
import pytest

from dave_fast.images import figures
from dave_fast.images.figures import Panel, Row, figure, grid_of, save_figure


@pytest.fixture
def crop():
    return np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)


@pytest.fixture
def heat():
    values = np.random.default_rng(1).exponential(size=(64, 64)).astype(np.float32)
    return values / values.max()


@pytest.mark.parametrize("classes", [1, 2, 5])
def test_figures_have_panels_of_one_size(crop, heat, classes):
    panels = [Panel(heat, f"class {i}", 0.1) for i in range(classes)]
    made = figure(crop, panels, [("class 0", 0.1), ("other", 0.05)])
    made.canvas.draw()
    sizes = {
        tuple(np.round(axes.get_position().size * made.get_size_inches() * made.dpi).astype(int))
        for axes in made.axes
        if axes.images and axes.images[0].get_array().shape[1] > 1
    }
    assert sizes == {(figures.SHORTEST_SIDE, figures.SHORTEST_SIDE)}


def test_figure_says_names_and_probabilities(crop, heat):
    panels = [Panel(heat, "tiger", 0.931), Panel(heat, "a name that is much too long for its panel", 0.0004)]
    made = figure(crop, panels)
    said = " ".join(text.get_text() for axes in made.axes for text in (*axes.texts, axes.title))
    assert "tiger" in said and "93.1 %" in said and "< 0.1 %" in said and "a name that is much t…" in said


def test_text_stays_inside_the_figure(crop, heat):
    wide = "W" * 30
    made = figure(crop, [Panel(heat, wide.lower(), 1.0)] * 2, [("x", 0.5)] * 5)
    renderer = made.canvas.get_renderer()
    for axes in made.axes:
        for text in (*axes.texts, axes.title):
            box = text.get_window_extent(renderer)
            assert box.y1 <= made.bbox.y1 and box.y0 >= 0 and box.x1 <= made.bbox.x1


def test_rectangular_figure(heat):
    made = figure(np.zeros((64, 32, 3), np.uint8), [Panel(heat[:, :32], "tall", 0.5)])
    width, height = made.get_size_inches()
    assert height > 2 * figures._SIDE and width < 4 * figures._SIDE


def test_figure_is_no_global_state(crop, heat):
    assert figure(crop, [Panel(heat, "tiger", 0.9)]).canvas.manager is None


@pytest.mark.parametrize(("suffix", "signature"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_figure_files(tmp_path, crop, heat, suffix, signature):
    path = save_figure(figure(crop, [Panel(heat, "tiger", 0.9)]), tmp_path / f"a.{suffix}")
    assert path.read_bytes().startswith(signature)
    assert [file.name for file in tmp_path.iterdir()] == [f"a.{suffix}"]


def words(made):
    return [text.get_text() for axes in made.axes for text in axes.texts]


def test_signed_panel_says_for_and_against(crop, heat):
    assert {"for", "against"} <= set(words(figure(crop, [Panel(heat - 0.5, "a − b", signed=True)])))


def test_signed_and_unsigned_panels_have_a_scale_each(crop, heat):
    both = figure(crop, [Panel(heat, "a"), Panel(heat - 0.5, "a − b", signed=True)])
    assert {"high", "low", "for", "against"} <= set(words(both))


@pytest.mark.parametrize(("images", "targets"), [(1, 1), (2, 1), (7, 1), (3, 2), (2, 7)])
def test_grid_has_each_image_and_each_target_once(crop, heat, images, targets):
    rows = [Row(f"image {i}", crop, [Panel(heat, f"{i} of {k}", 0.5) for k in range(targets)]) for i in range(images)]
    made = grid_of(rows)
    said = words(made)
    assert [said.count(f"image {i}") for i in range(images)] == [1] * images
    assert all(said.count(f"{i} of {k}") == 1 for i in range(images) for k in range(targets))
    pictures = [axes for axes in made.axes if axes.images and axes.images[0].get_array().shape[1] > 1]
    assert len(pictures) == images * (1 + targets)
    places = [tuple(axes.get_position().bounds) for axes in pictures]
    assert len(set(places)) == len(places)
    assert all(x >= 0 and y >= 0 and x + w <= 1 and y + h <= 1 for x, y, w, h in places)
