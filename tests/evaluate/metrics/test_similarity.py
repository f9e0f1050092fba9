"""Test correlations, changes and the excess along patch borders on cases with known answers."""

import math

import pytest
import torch
from scipy import stats

from dave_fast.errors import InputError
from dave_fast.evaluate import metrics


def test_correlation_and_change():
    maps = torch.tensor([[[0.0, 1.0, 2.0]], [[0.0, 1.0, 2.0]], [[1.0, 1.0, 1.0]]])
    others = torch.tensor([[[5.0, 7.0, 9.0]], [[2.0, 1.0, 0.0]], [[0.0, 1.0, 2.0]]])
    assert metrics.correlation(maps, others).tolist() == pytest.approx([1, -1, math.nan], nan_ok=True)
    assert metrics.relative_change(maps, 1.5 * maps).tolist() == pytest.approx([0.5] * 3)
    assert metrics.relative_change(torch.zeros(1, 2, 2), torch.ones(1, 2, 2)).isnan().all()


def test_border_excess_of_noise_is_about_nothing_and_of_a_grid_is_the_grid():
    attributions = torch.ones(2, 12, 16)
    assert metrics.border_excess(attributions, 4).tolist() == [0, 0]
    attributions[1, 3:5] = -1.5
    attributions[1, 7:9] = 1.5
    for column in (3, 4, 7, 8, 11, 12):
        attributions[1, :, column] = 1.5
    assert metrics.border_excess(attributions, 4).tolist() == pytest.approx([0, 0.5])
    assert metrics.border_excess(attributions[:, None].expand(-1, 3, -1, -1), (4, 4)).tolist() == pytest.approx(
        [0, 0.5]
    )


def test_border_excess_ignores_the_edge_of_the_image():
    attributions = torch.ones(1, 8, 8)
    attributions[:, 0] = attributions[:, -1] = attributions[:, :, 0] = attributions[:, :, -1] = 100
    assert metrics.border_excess(attributions, 4).tolist() == [0]


def test_border_excess_in_undefined_cases():
    assert metrics.border_excess(torch.zeros(1, 8, 8), 4).isnan().all()
    assert metrics.border_excess(torch.ones(1, 8, 8), 8).isnan().all()
    with pytest.raises(InputError, match="do not divide"):
        metrics.border_excess(torch.ones(1, 9, 8), 4)


@pytest.mark.parametrize("kind", ["distinct", "tied"])
def test_rank_correlation_is_spearmans(kind):
    generator = torch.Generator().manual_seed(1)
    maps = torch.randn(3, 5, 7, generator=generator)
    maps = maps.round() if kind == "tied" else maps
    others = torch.rand(3, 5, 7, generator=generator)
    expected = [stats.spearmanr(a.flatten(), b.flatten())[0] for a, b in zip(maps, others, strict=True)]
    assert metrics.rank_correlation(maps, others).tolist() == pytest.approx(expected, abs=1e-12)


def test_rank_correlation_in_undefined_cases():
    maps = torch.stack([torch.zeros(2, 2), torch.tensor([[1.0, torch.nan], [2.0, 3.0]])])
    assert metrics.rank_correlation(maps, torch.rand(2, 2, 2)).isnan().all()
