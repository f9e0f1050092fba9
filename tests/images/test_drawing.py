"""Tests of pictures: the scale of brightness, overlays, and figures of matching sizes in print."""

import numpy as np
import pytest
from PIL import Image

from dave_fast.images import drawing as figures
from dave_fast.images.drawing import (
    Panel,
    figure,
    overlay,
    percent,
    plain_map,
    save_figure,
    save_picture,
    shown,
    signed_map,
    signed_overlay,
)


@pytest.fixture
def crop():
    return np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)


@pytest.fixture
def heat():
    values = np.random.default_rng(1).exponential(size=(64, 64)).astype(np.float32)
    return values / values.max()


# The scale.


def test_shown_keeps_the_order_and_uses_the_whole_range(heat):
    values = shown(heat)
    assert values.dtype == np.float32 and values.min() >= 0 and values.max() == 1
    order = np.argsort(heat, axis=None)
    assert (np.diff(values.ravel()[order]) >= 0).all()
    assert 0 < (values == 1).mean() < 0.006


def test_shown_does_not_depend_on_the_scale(heat):
    np.testing.assert_allclose(shown(heat), shown(heat * 0.1), rtol=1e-5)


def test_map_of_zeros_stays_zero():
    assert (shown(np.zeros((8, 8), np.float32)) == 0).all()


def test_single_bright_pixel_is_seen():
    sparse = np.zeros((100, 100), np.float32)
    sparse[3, 4] = 0.5
    assert shown(sparse)[3, 4] == 1 and shown(sparse).sum() == 1


# Pictures.


@pytest.mark.parametrize(
    ("shape", "size"),
    [((128, 128), (512, 512)), ((224, 224), (448, 448)), ((448, 448), (448, 448)), ((32, 48), (672, 448))],
)
def test_pictures_are_enlarged_by_whole_numbers(shape, size):
    heat = np.random.default_rng(0).random(shape, np.float32)
    for picture in (plain_map(heat), overlay(np.zeros((*shape, 3), np.uint8), heat)):
        assert picture.size == size and picture.mode == "RGB"
    assert signed_map(heat).size == signed_overlay(np.zeros((*shape, 3), np.uint8), heat).size == size


def test_plain_map_goes_from_dark_to_bright(heat):
    luminance = np.asarray(plain_map(heat).convert("L"), np.float32)
    small = np.asarray(Image.fromarray(luminance).resize((64, 64), Image.Resampling.BOX))
    assert np.corrcoef(small.ravel(), shown(heat).ravel())[0, 1] > 0.95


def test_overlay_of_nothing_is_the_dimmed_photograph(crop):
    picture = np.asarray(overlay(crop, np.zeros((64, 64), np.float32)), np.float32)
    grey = figures.photograph_of(crop).astype(np.float32) @ np.array(figures._LUMINANCE, np.float32)
    luminance = picture @ np.array(figures._LUMINANCE, np.float32)
    np.testing.assert_allclose(luminance, 255 * figures._LIFT + figures._DIMMING * grey, atol=1.0)


def test_overlay_covers_more_where_the_map_is_stronger(crop):
    steps = np.repeat(np.linspace(0, 1, 64, dtype=np.float32)[None], 64, axis=0)
    light, dark = (np.asarray(overlay(np.full_like(crop, v), steps), np.float32) for v in (255, 0))
    # The photograph's share is the difference between overlays on white and on black.
    left = (light - dark).mean(axis=(0, 2))
    assert (np.diff(left) <= 1).all() and left[0] > 140 and left[-1] < 25


def test_signed_map_is_orange_above_zero_blue_below_and_black_at_zero():
    heat = np.repeat(np.array([[1.0, 0.0, -1.0]], np.float32), 30, axis=1).repeat(90, axis=0)
    pixels = np.asarray(signed_map(heat), np.int16)[:, 75::150]
    (for_red, _, for_blue), none, (against_red, _, against_blue) = pixels[len(pixels) // 2]
    assert for_red > for_blue + 50 and against_blue > against_red + 50 and not none.any()


def test_weaker_sign_is_darker_whichever_it_is():
    heat = np.repeat(np.array([[1.0, -0.3]], np.float32), 45, axis=1).repeat(90, axis=0)
    for turned in (heat, -heat):
        strong, weak = np.asarray(signed_map(turned).convert("L"), np.int16)[225, 112::225]
        assert strong > weak + 50 and weak > 0


def test_signed_overlay_of_nothing_is_the_photograph_in_grey(crop):
    picture = np.asarray(signed_overlay(crop, np.zeros((64, 64), np.float32)), np.int16)
    grey = figures.photograph_of(crop).astype(np.float32) @ np.array(figures._LUMINANCE, np.float32)
    assert (picture == picture[..., :1]).all()
    np.testing.assert_allclose(picture[..., 0], 255 * figures._LIFT + figures._DIMMING * grey, atol=1.0)


def test_pictures_do_not_change_their_inputs(crop, heat):
    before = crop.copy(), heat.copy()
    overlay(crop, heat)
    plain_map(heat)
    signed_overlay(crop, heat)
    assert (crop == before[0]).all() and (heat == before[1]).all()


# Figures.


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


def test_picture_file(tmp_path, heat):
    path = save_picture(plain_map(heat), tmp_path / "new/a.png")
    with Image.open(path) as picture:
        assert picture.size == (448, 448)


@pytest.mark.parametrize(
    ("probability", "text"),
    [(1, "100.0 %"), (0.5, "50.0 %"), (0.001, "0.1 %"), (1e-5, "< 0.1 %"), (0, "< 0.1 %")],
)
def test_percent(probability, text):
    assert percent(probability) == text
