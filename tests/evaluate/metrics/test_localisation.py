"""Test the pointing games on cases worked out by hand."""

import math

import pytest
import torch
from torch import Tensor

from dave_fast.errors import InputError
from dave_fast.evaluate import metrics


def one_pixel(y: int, x: int, shape: tuple[int, int] = (3, 5), value: float = 1.0) -> Tensor:
    out = torch.zeros(1, *shape)
    out[0, y, x] = value
    return out


# Energy pointing game


def test_energy_is_the_positive_share_inside_the_mask():
    maps = torch.tensor([[[3.0, 1.0, -8.0], [0.0, 4.0, -2.0]]])
    masks = torch.tensor([[[True, False, True], [True, False, False]]])
    assert metrics.energy_pointing_game(maps, masks).tolist() == [3 / 8]


@pytest.mark.parametrize(
    ("maps", "mask", "expected"),
    [
        pytest.param(torch.zeros(1, 3, 5), torch.ones(1, 3, 5) > 0, 0.0, id="zero map"),
        pytest.param(-torch.ones(1, 3, 5), torch.ones(1, 3, 5) > 0, 0.0, id="nothing positive"),
        pytest.param(torch.ones(1, 3, 5), torch.zeros(1, 3, 5) > 0, math.nan, id="empty mask"),
        pytest.param(torch.zeros(1, 3, 5), torch.zeros(1, 3, 5) > 0, math.nan, id="zero map, empty mask"),
        pytest.param(torch.rand(1, 3, 5), torch.ones(1, 3, 5) > 0, 1.0, id="full mask"),
        pytest.param(one_pixel(2, 4), one_pixel(2, 4) > 0, 1.0, id="one pixel, hit"),
        pytest.param(one_pixel(2, 4), one_pixel(2, 3) > 0, 0.0, id="one pixel, missed"),
    ],
)
def test_energy_and_pointing_in_undefined_and_extreme_cases(maps, mask, expected):
    for score in (metrics.energy_pointing_game, metrics.pointing_game):
        assert score(maps, mask).tolist() == pytest.approx([expected], nan_ok=True)


def test_energy_does_not_depend_on_scale_nor_overflow():
    maps, masks = torch.rand(4, 7, 3), torch.rand(4, 7, 3) > 0.5
    expected = metrics.energy_pointing_game(maps, masks)
    for scale in (1e-30, 1e37):
        torch.testing.assert_close(metrics.energy_pointing_game(maps * scale, masks), expected, rtol=1e-6, atol=0)


def test_scores_of_a_map_with_nan_are_nan():
    maps = torch.ones(1, 2, 2)
    maps[0, 0, 0] = torch.nan
    mask = torch.ones(1, 2, 2) > 0
    assert metrics.energy_pointing_game(maps, mask).isnan().all()
    assert metrics.pointing_game(maps, mask).isnan().all()


def test_masks_of_another_shape_are_refused():
    with pytest.raises(InputError, match=r"\(1, 3, 5\) and \(1, 5, 3\)"):
        metrics.energy_pointing_game(torch.rand(1, 3, 5), torch.rand(1, 5, 3) > 0)


# Pointing game


def test_pointing_looks_at_the_maximum_only():
    maps = torch.tensor([[[1.0, 2.0, 3.0]], [[5.0, 2.0, -9.0]]])
    masks = torch.tensor([[[True, True, False]], [[True, False, False]]])
    assert metrics.pointing_game(maps, masks).tolist() == [0.0, 1.0]


def test_pointing_splits_ties():
    maps = torch.tensor([[[2.0, 2.0], [2.0, 1.0]]])
    masks = torch.tensor([[[True, False], [True, True]]])
    assert metrics.pointing_game(maps, masks).tolist() == pytest.approx([2 / 3])


def test_a_constant_map_points_as_often_as_the_mask_is_large():
    masks = torch.rand(3, 6, 4) > 0.3
    expected = masks.double().mean((1, 2))
    torch.testing.assert_close(metrics.pointing_game(torch.full((3, 6, 4), 0.2), masks), expected)


# Grid pointing game


def test_grid_scores_the_right_cell():
    maps = torch.zeros(4, 4, 6)
    maps[:, 0, 5] = 3  # cell 1: top right
    maps[:, 3, 0] = 1  # cell 2: bottom left
    maps[:, 1, 1] = -7
    assert metrics.grid_pointing_game(maps, torch.arange(4), 2).tolist() == [0, 0.75, 0.25, 0]


def test_grid_scores_of_one_map_over_all_cells_sum_to_one():
    maps = torch.rand(1, 128, 50).expand(9, -1, -1)
    scores = metrics.grid_pointing_game(maps, torch.arange(9), 3)
    assert scores.sum().item() == pytest.approx(1)
    flat = metrics.grid_pointing_game(torch.ones(9, 128, 50), torch.arange(9), 3)
    torch.testing.assert_close(flat, torch.full((9,), 1 / 9, dtype=torch.float64))


def test_grid_splits_a_pixel_on_the_line_by_area():
    # 4 pixels in 3 cells: pixel 1 = [1, 2] is cut at 4/3
    maps = torch.zeros(3, 4, 4)
    maps[:, 1, 0] = 1
    assert metrics.grid_pointing_game(maps, torch.tensor([0, 3, 6]), 3).tolist() == pytest.approx([1 / 3, 2 / 3, 0])


def test_grid_refuses_cells_outside():
    with pytest.raises(InputError, match="expected 0 to 3"):
        metrics.grid_pointing_game(torch.rand(1, 4, 4), torch.tensor([4]), 2)
    assert metrics.grid_pointing_game(torch.zeros(1, 4, 4), torch.tensor([3]), 2).tolist() == [0]


def test_mosaics_are_row_major():
    tiles = torch.arange(4.0).reshape(1, 4, 1, 1, 1).expand(1, 4, 3, 2, 5)
    mosaic = metrics.build_mosaics(tiles)
    assert mosaic.shape == (1, 3, 4, 10)
    assert mosaic[0, 0, ::2, ::5].tolist() == [[0, 1], [2, 3]]


def test_rescaled_mosaics_keep_the_size_of_a_tile():
    tiles = torch.rand(2, 9, 3, 16, 16)
    mosaics = metrics.build_mosaics(tiles, rescale=True)
    assert mosaics.shape == (2, 3, 16, 16)
    assert mosaics.mean((2, 3)).flatten().tolist() == pytest.approx(tiles.mean((1, 3, 4)).flatten().tolist(), rel=0.05)


def test_mosaics_need_a_square_number_of_tiles():
    with pytest.raises(InputError, match="square"):
        metrics.build_mosaics(torch.rand(1, 3, 3, 4, 4))


def test_chosen_mosaics_mix_classes_use_images_once_and_the_surest_first():
    labels = torch.arange(60) % 5
    confidences = torch.linspace(1, 0.5, 60)
    chosen = metrics.choose_mosaics(labels, confidences, 2, 12, seed=3)
    assert chosen.shape == (12, 4)
    assert len(set(chosen.flatten().tolist())) == 48
    assert all(len(set(labels[row].tolist())) == 4 for row in chosen)
    assert set(chosen[0].tolist()) < set(range(5))
    assert torch.equal(chosen, metrics.choose_mosaics(labels, confidences, 2, 12, seed=3))


def test_too_few_images_for_the_mosaics_are_refused():
    with pytest.raises(InputError, match="2 of 3 mosaics"):
        metrics.choose_mosaics(torch.arange(8) % 4, torch.ones(8), 2, 3)
