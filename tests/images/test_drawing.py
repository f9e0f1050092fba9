"""Tests of pictures: the scale of brightness, colours, overlays."""

import tracemalloc

import numpy as np
import pytest
from PIL import Image

from dave_fast.errors import InputError
from dave_fast.images import drawing
from dave_fast.images.drawing import Style, draw_over, overlay, percent, plain_map, save_picture, shown


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
    assert plain_map(heat, signed=True).size == overlay(np.zeros((*shape, 3), np.uint8), heat, signed=True).size == size


def test_plain_map_goes_from_dark_to_bright(heat):
    luminance = np.asarray(plain_map(heat).convert("L"), np.float32)
    small = np.asarray(Image.fromarray(luminance).resize((64, 64), Image.Resampling.BOX))
    assert np.corrcoef(small.ravel(), shown(heat).ravel())[0, 1] > 0.95


def test_overlay_of_nothing_is_the_dimmed_photograph(crop):
    picture = np.asarray(overlay(crop, np.zeros((64, 64), np.float32)), np.float32)
    grey = drawing.photograph_of(crop).astype(np.float32) @ np.array(drawing._LUMINANCE, np.float32)
    luminance = picture @ np.array(drawing._LUMINANCE, np.float32)
    np.testing.assert_allclose(luminance, 255 * drawing._LIFT + drawing._DIMMING * grey, atol=1.0)


def test_overlay_covers_more_where_the_map_is_stronger(crop):
    steps = np.repeat(np.linspace(0, 1, 64, dtype=np.float32)[None], 64, axis=0)
    light, dark = (np.asarray(overlay(np.full_like(crop, v), steps), np.float32) for v in (255, 0))
    # The photograph's share is the difference between overlays on white and on black.
    left = (light - dark).mean(axis=(0, 2))
    assert (np.diff(left) <= 1).all() and left[0] > 140 and left[-1] < 25


def test_signed_map_is_orange_above_zero_blue_below_and_black_at_zero():
    heat = np.repeat(np.array([[1.0, 0.0, -1.0]], np.float32), 30, axis=1).repeat(90, axis=0)
    pixels = np.asarray(plain_map(heat, signed=True), np.int16)[:, 75::150]
    (for_red, _, for_blue), none, (against_red, _, against_blue) = pixels[len(pixels) // 2]
    assert for_red > for_blue + 50 and against_blue > against_red + 50 and not none.any()


def test_weaker_sign_is_darker_whichever_it_is():
    heat = np.repeat(np.array([[1.0, -0.3]], np.float32), 45, axis=1).repeat(90, axis=0)
    for turned in (heat, -heat):
        strong, weak = np.asarray(plain_map(turned, signed=True).convert("L"), np.int16)[225, 112::225]
        assert strong > weak + 50 and weak > 0


def test_signed_overlay_of_nothing_is_the_photograph_in_grey(crop):
    picture = np.asarray(overlay(crop, np.zeros((64, 64), np.float32), signed=True), np.int16)
    grey = drawing.photograph_of(crop).astype(np.float32) @ np.array(drawing._LUMINANCE, np.float32)
    assert (picture == picture[..., :1]).all()
    np.testing.assert_allclose(picture[..., 0], 255 * drawing._LIFT + drawing._DIMMING * grey, atol=1.0)


def test_pictures_do_not_change_their_inputs(crop, heat):
    before = crop.copy(), heat.copy()
    overlay(crop, heat)
    plain_map(heat)
    overlay(crop, heat, signed=True)
    assert (crop == before[0]).all() and (heat == before[1]).all()


@pytest.mark.parametrize(
    "draw", [lambda heat, large: plain_map(heat, size=large.size), lambda heat, large: draw_over(large, heat)]
)
def test_large_picture_takes_few_bytes_a_pixel(heat, draw):
    large = Image.new("RGB", (2000, 1500))
    draw(heat, Image.new("RGB", (300, 300)))
    tracemalloc.start()
    draw(heat, large)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 25 * large.width * large.height


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


# At a photograph's own size.


@pytest.mark.parametrize("box", [(10.4, 20.6, 74.4, 84.6), (-20.0, 0.0, 120.0, 90.0), (0.3, 0.2, 99.7, 89.9)], ids=str)
@pytest.mark.parametrize("signed", [False, True])
def test_map_lies_where_its_box_says(box, signed):
    left, top, right, bottom = box
    for row, column in ((0.3, 0.6), (0.75, 0.25)):
        heat = np.zeros((32, 32), np.float32)
        heat[int(32 * row), int(32 * column)] = 1
        black = Image.fromarray(np.zeros((90, 100, 3), np.uint8))
        drawn = np.asarray(draw_over(black, heat, box, signed=signed), np.int16).sum(2)
        at = np.argwhere(drawn > drawn.min() + 100)
        centre = (at.min(0) + at.max(0) + 1) / 2
        wanted = np.array(
            [
                top + (int(32 * row) + 0.5) / 32 * (bottom - top),
                left + (int(32 * column) + 0.5) / 32 * (right - left),
            ]
        )
        np.testing.assert_allclose(centre, wanted, atol=1.1)


def test_what_the_model_was_not_shown_is_darker():
    white = Image.fromarray(np.full((60, 100, 3), 255, np.uint8))
    drawn = np.asarray(draw_over(white, np.zeros((8, 8), np.float32), (20, 0, 80, 60)), np.int16)[..., 0]
    assert drawn.shape == (60, 100) and (drawn[:, 20:80] == drawn[0, 20]).all()
    assert (drawn[:, :20] < drawn[0, 20] - 50).all() and (drawn[:, 80:] < drawn[0, 20] - 50).all()


@pytest.mark.parametrize("size", [(700, 3), (3, 700), (1, 1), (513, 257)])
def test_photographs_of_any_size_are_drawn_over(size):
    generator = np.random.default_rng(0)
    photograph = Image.fromarray(generator.integers(0, 256, (*size[::-1], 3), np.uint8))
    heat = generator.random((16, 16), np.float32)
    box = (size[0] / 2 - 8, size[1] / 2 - 8, size[0] / 2 + 8, size[1] / 2 + 8)
    for where in (None, box):
        assert draw_over(photograph, heat, where).size == size


def test_bands_of_a_large_photograph_meet_without_a_seam(heat, monkeypatch):
    photograph = Image.fromarray(np.random.default_rng(3).integers(0, 256, (300, 200, 3), np.uint8))
    box = (10, 33, 180, 270)
    whole = np.asarray(draw_over(photograph, heat, box))
    monkeypatch.setattr(drawing, "_BAND", 7)
    assert (np.asarray(draw_over(photograph, heat, box)) == whole).all()


# Styles.


def test_colour_map_opacity_and_quantile_change_a_picture(crop, heat):
    usual = np.asarray(overlay(crop, heat), np.int16)
    for style in (Style("viridis"), Style(opacity=0.3), Style(quantile=0.7)):
        assert np.abs(np.asarray(overlay(crop, heat, style), np.int16) - usual).max() > 30


def test_map_without_opacity_is_the_photograph_alone(crop, heat):
    bare = np.asarray(overlay(crop, np.zeros_like(heat)))
    assert (np.asarray(overlay(crop, heat, Style(opacity=0))) == bare).all()


def test_signed_map_takes_a_colour_map_by_name():
    heat = np.repeat(np.array([[1.0, -1.0]], np.float32), 45, axis=1).repeat(90, axis=0)
    red, blue = np.asarray(plain_map(heat, Style("RdBu_r"), signed=True), np.int16)[225, 112::225]
    assert red[0] > red[2] + 50 and blue[2] > blue[0] + 50


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"colormap": "infermo"}, "did you mean inferno"),
        ({"opacity": 1.5}, "opacity is 1.5"),
        ({"quantile": 0}, "quantile is 0"),
    ],
)
def test_wrong_style_is_refused_in_words(wrong, said):
    with pytest.raises(InputError, match=said):
        Style(**wrong)
