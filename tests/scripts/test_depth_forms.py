"""Test the forms of averages and the rules for a block that the benchmark of depth compares."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks import depth_forms
from benchmarks.depth_rules import Measured
from dave_fast.ops.shrink import shrink
from dave_fast.ops.spread_mean import densities_of, spread_mean_variance
from dave_fast.sampling import Draws, draw

SIZE, SAMPLES = (16, 24), 6


def values_and_draws() -> tuple[torch.Tensor, Draws]:
    """Return values (S, L, n) of two levels of patches of 8 pixels, and the draws of the samples."""
    values = torch.randn(SAMPLES, 2, 6, generator=torch.Generator().manual_seed(0))
    return values, draw(SAMPLES, height=SIZE[0], width=SIZE[1])


def test_densities_are_those_of_the_op():
    values, draws = values_and_draws()
    found = depth_forms.densities(values, draws, SIZE)
    for level in range(2):
        expected = densities_of(values[:, level], draws, SIZE, 8)
        assert torch.allclose(found[:, level : level + 1], expected, atol=1e-7)


def test_the_main_form_is_the_ops_one_after_the_other():
    values, draws = values_and_draws()
    of = depth_forms.densities(values, draws, SIZE).transpose(0, 1)[:, :, None].contiguous()
    expected = shrink(*spread_mean_variance(values[:, 0].contiguous(), draws, SIZE, 8, SAMPLES))
    assert torch.allclose(depth_forms.FORMS[depth_forms.MAIN](of, of)[:1], expected, atol=1e-7)


@pytest.mark.parametrize("form", depth_forms.FORMS)
def test_equal_samples_that_are_seen_whole_give_themselves(form):
    one = torch.randn(2, 1, 1, *SIZE, generator=torch.Generator().manual_seed(1))
    found = depth_forms.FORMS[form](one.repeat(1, SAMPLES, 1, 1, 1), torch.ones(SAMPLES, 1, *SIZE))
    assert torch.allclose(found, one[:, 0], atol=1e-6)


def test_a_rule_chooses_the_block_of_its_largest_mean_and_loses_what_the_best_has_more():
    inside = np.array([[0.2, 0.6, 0.5], [0.4, 0.8, 0.5]])
    run = Measured(inside, {"rule": np.array([[0.0, 0.1, 0.9], [1.0, 0.2, 0.8]])})
    assert run.best == 1
    assert run.chosen("rule") == (2, 0.5)
    assert run.lost(2) == pytest.approx((0.2, 0.1))
    assert (run.share(0.0), run.share(0.5), run.share(1.0)) == (0, 2, 2)
