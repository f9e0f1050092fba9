"""The error estimate: against the formula for plain means, and against the distance of maps to their limit."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

import dave_fast
from dave_fast.explain.convergence import FACTORS, FEWEST, checkpoints, estimate, factor, refine, relative_distance
from dave_fast.models.demo import draw_scenes
from dave_fast.sampling import Sampling, draw


def test_for_a_plain_mean_the_estimate_is_the_standard_error():
    """Over many means of independent samples ê² is, on average, the variance that the mean has about its limit."""
    rng = np.random.default_rng(0)
    estimates, errors, samples = [], [], 16
    for _ in range(300):
        values = 1 + rng.standard_normal((samples, 20, 20))
        mean, first, second = (torch.from_numpy(v.mean(0))[None] for v in (values, values[:8], values[8:]))
        estimates.append(estimate(mean, first, second)[0] * mean.norm().item() / 20)
        errors.append(relative_distance(mean, torch.ones(1, 20, 20, dtype=torch.float64))[0])
    assert np.mean(np.square(errors)) == pytest.approx(1 / samples, rel=0.02)
    assert np.mean(np.square(estimates)) == pytest.approx(1 / samples, rel=0.02)


def test_the_estimate_sees_a_bias_that_both_halves_share():
    limit = torch.ones(1, 4, 4)
    both_too_high = 1.4 * limit
    assert estimate(limit, both_too_high, both_too_high)[0] == pytest.approx(0.4)


def test_a_map_of_zeros_has_no_relative_error():
    zeros = torch.zeros(1, 4, 4)
    assert estimate(zeros, zeros, zeros) == [math.inf]


def test_halves_are_fair_samples_of_the_noise_levels_and_every_second_sample_is_not():
    levels = 1 - draw(64, height=8, width=8, sampling=Sampling(noise_alpha=1.0)).signal.numpy()

    def bins(some):
        return np.count_nonzero(np.histogram(some, bins=32, range=(0, 1))[0])

    assert bins(levels[:32]) >= 31 and bins(levels[32:]) >= 31
    assert bins(levels[::2]) <= 17 and bins(levels[1::2]) <= 17


@pytest.mark.parametrize("shrink", [True, False])
def test_factors_are_interpolated_and_nothing_is_promised_where_nothing_was_measured(shrink):
    table = FACTORS[shrink]
    known = sorted(table)
    assert known[0] == FEWEST and factor(FEWEST - 1, shrink=shrink) == math.inf
    for samples, value in table.items():
        assert factor(samples, shrink=shrink) == pytest.approx(value)
    for below, above in pairwise(known):
        middle = factor(round(math.sqrt(below * above)), shrink=shrink)
        assert min(table[below], table[above]) <= middle <= max(table[below], table[above])
    assert factor(10**6, shrink=shrink) == table[known[-1]]


@pytest.mark.parametrize(("samples", "expected"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (5, [1, 2, 3, 4, 5])])
def test_checkpoints_of_few_samples(samples, expected):
    assert list(checkpoints(samples)) == expected


def test_checkpoints_grow_by_half_and_end_at_the_budget():
    assert list(checkpoints(50)) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 50]
    assert list(checkpoints(64))[-2:] == [48, 64]


def test_refine_is_the_end_of_explain_with_an_error_that_tells_the_distance():
    """On one demo scene the map is that of `explain`, and its error against 256 samples is about the estimate."""
    scene = draw_scenes(1, 5, split="test").images[0]
    image = torch.from_numpy(scene).permute(2, 0, 1).float().div(127.5).sub(1)[None]
    explainer = dave_fast.DAVE("demo", precision="fp32", internal_batch_size=16)
    target = explainer.predict(image).argmax(1)
    draws = draw(256, height=128, width=128, sampling=explainer.sampling)
    parts = [explainer.contributions(image, draws[i : i + 16], target[:, None]) for i in range(0, 256, 16)]
    contributions = torch.cat(parts, dim=1)
    refined = refine(explainer, contributions[:, :32])
    alone = explainer.explain(image, int(target), n_samples=32)
    assert torch.allclose(refined.maps, alone.maps, rtol=1e-5, atol=1e-6)
    assert torch.allclose(refined.raw, alone.raw, rtol=1e-5, atol=1e-7)
    error = relative_distance(refined.maps, explainer.aggregate(contributions)[1])[0]
    assert error == pytest.approx(refined.errors[0], rel=0.5)
    assert refined.bound == factor(32, shrink=True) * refined.errors[0]
    assert refine(explainer, contributions[:, :1]).bound == math.inf
    assert refine(explainer, contributions[:, :4]).bound == math.inf
