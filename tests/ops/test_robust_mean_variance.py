"""Test robust_mean_variance: raw to the bit, the variance against float64 and against that of means of fresh draws."""

from __future__ import annotations

import math

import pytest
import torch

from dave_fast.errors import InputError
from dave_fast.ops.pull_back import pull_back
from dave_fast.ops.pull_back_mean import pull_back_mean, pull_back_mean_variance
from dave_fast.ops.robust_mean import (
    robust_mean,
    robust_mean_variance,
    robust_mean_variance_ref,
)
from dave_fast.sampling import draw
from tests.ops.test_perturb import image_batch
from tests.ops.test_pull_back import cotangents_of
from tests.ops.test_pull_back_mean import SHAPES
from tests.ops.test_robust_mean import contributions_of, values_and_kept


@pytest.fixture
def backend(pixel_backend: str) -> str:
    return pixel_backend


def by_definition(contributions: torch.Tensor) -> torch.Tensor:
    """Return Σ_s (Σ_channels keep·(c_s - raw))² / (n̄·(n̄ - 1)), n̄ the number kept on average, all in float64."""
    # which samples are kept is decided in the dtype of the statistics
    values, kept = (each.double() for each in values_and_kept(contributions))
    raw = (kept * values).sum(dim=1, keepdim=True) / kept.sum(dim=1, keepdim=True)
    number = kept.sum(dim=1).mean(dim=1)
    squares = (kept * (values - raw)).sum(dim=2).square().sum(dim=1)
    return torch.where(number > 1, squares / (number * (number - 1)), 0)


def check(contributions: torch.Tensor, backend: str) -> None:
    """Compare with robust_mean and the reference to the bit, and with the definition."""
    raw, variance = robust_mean_variance(contributions, backend=backend)
    assert torch.equal(raw, robust_mean(contributions, backend=backend))
    assert variance.dtype == torch.float64
    assert torch.equal(variance, robust_mean_variance_ref(contributions)[1])
    expected = by_definition(contributions)
    wide = contributions.dtype == torch.float64
    # float32 rounds a deviation to an ulp of the largest value
    slack = (1e-12 if wide else 3e-6) * expected.max()
    torch.testing.assert_close(variance, expected, rtol=1e-12 if wide else 3e-5, atol=float(slack))


def test_numbers_of_samples_on_both_sides_of_every_network(backend):
    for samples in (1, 2, 3, 4, 5, 15, 16, 17, 32, 33, 50, 51, 64, 65, 100, 101, 128, 129, 256, 257, 301):
        check(contributions_of(samples, torch.float32, pixels=3 * 11).unflatten(2, (3, 11)), backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_types_and_shapes(backend, dtype):
    contributions = contributions_of(24, dtype, pixels=4 * 5 * 7)
    for shape in ((4, 5, 7), (1, 20, 7), (140,), (2, 70), (20, 7)):
        check(contributions.view(2, 24, *shape), backend)


def test_every_remainder_of_a_block(backend):
    for pixels in (1, 31, 32, 33, 255, 256, 257, 600):
        check(contributions_of(9, torch.float32, pixels=2 * pixels).unflatten(2, (2, pixels)), backend)


def test_one_sample_has_no_variance(backend):
    raw, variance = robust_mean_variance(contributions_of(1, torch.float32).unflatten(2, (37, 1)), backend=backend)
    assert bool(raw.any()) and not bool(variance.any())


def test_channels_that_cancel_have_no_variance(backend):
    values = torch.randn(1, 25, 1, 40)
    _, variance = robust_mean_variance(torch.cat([values, -values], dim=2), backend=backend)
    assert not bool(variance.any())


@pytest.mark.parametrize("power", [100, -60])
def test_large_and_small_values_neither_overflow_nor_vanish(backend, power):
    # at equal distances nothing is left out, so that the constant 1e-8 of the threshold makes no difference
    values = torch.rand(1, 9, 2, 40, generator=torch.Generator().manual_seed(1)).argsort(dim=1) / 8 + 1
    _, variance = robust_mean_variance(values, backend=backend)
    _, scaled = robust_mean_variance(values * 2.0**power, backend=backend)
    assert bool((variance > 0).all())
    torch.testing.assert_close(scaled, variance * 4.0**power, rtol=1e-12, atol=0)


def test_nan_in_one_channel_makes_its_own_pixel_nan_only(backend):
    contributions = contributions_of(10, torch.float32, pixels=30).unflatten(2, (3, 10))
    clean = robust_mean_variance(contributions, backend=backend)[1]
    contributions[1, 7, 1, 4] = torch.nan
    variance = robust_mean_variance(contributions, backend=backend)[1]
    assert variance.isnan().nonzero().tolist() == [[1, 4]]
    variance[1, 4] = clean[1, 4]
    assert torch.equal(variance, clean)


def test_infinities_give_what_the_reference_gives(backend):
    inf = torch.inf
    columns = [[1, 2, 3, 4, inf], [1, 2, 3, -inf, inf], [1, 1, 1, inf, inf], [inf] * 5, [-inf, -inf, 1, inf, inf]]
    for dtype in (torch.float32, torch.float64):
        contributions = torch.tensor(columns, dtype=dtype).T[None, :, None].contiguous()
        variance = robust_mean_variance(contributions, backend=backend)[1]
        expected = robust_mean_variance_ref(contributions)[1]
        assert torch.equal(variance.isnan(), expected.isnan())
        assert torch.equal(variance.nan_to_num(), expected.nan_to_num())
        assert bool(variance[0, :3].isfinite().all()) and bool(variance[0, 3:].isnan().all())


def test_an_image_alone_has_the_bits_it_has_in_a_batch(backend):
    contributions = contributions_of(17, torch.float32, pixels=600).unflatten(2, (3, 200))
    whole = robust_mean_variance(contributions, backend=backend)
    for b in range(2):
        alone = robust_mean_variance(contributions[b : b + 1], backend=backend)
        assert torch.equal(alone[0][0], whole[0][b]) and torch.equal(alone[1][0], whole[1][b])


def test_more_threads_and_strides_change_nothing(backend):
    contributions = contributions_of(12, torch.float32, pixels=3000).unflatten(2, (3, 1000))
    one = robust_mean_variance(contributions, backend=backend)[1]
    strided = contributions.mT.contiguous().mT
    torch.set_num_threads(3)
    try:
        assert torch.equal(robust_mean_variance(strided, backend=backend)[1], one)
    finally:
        torch.set_num_threads(1)


def told_and_true(values: torch.Tensor, backend: str) -> tuple[float, float]:
    """Return the mean over all pixels of the variance, and the variance over all pixels of raw's channel sum."""
    raw, variance = robust_mean_variance(values, backend=backend)
    return float(variance.mean()), float(raw.double().sum(dim=1).var())


@pytest.mark.parametrize("samples", [100, 101])
def test_the_variance_is_that_of_the_mean_where_nothing_is_left_out(backend, samples):
    """Cosines of random angles, correlated over the channels, lie within 2.5 deviations: raw is their plain mean."""
    pixels, generator = 10_000, torch.Generator().manual_seed(samples)
    common = (2 * math.pi * torch.rand(1, samples, 1, pixels, generator=generator)).cos()
    told, true = told_and_true(5 + common * torch.tensor([1.0, 2.0, -0.5]).view(3, 1), backend)
    assert told == pytest.approx(2.5**2 / 2 / samples, rel=0.01)
    # its relative standard error is 1.4 %
    assert true == pytest.approx(2.5**2 / 2 / samples, rel=0.06)


def test_the_variance_of_normal_samples_is_as_documented(backend):
    """The kept ones lie closer together than all, and the mean of them varies more than that of all."""
    within = 2.5 * 1.4826 * 0.67449
    kept, density = math.erf(within / math.sqrt(2)), math.exp(-0.5 * within**2) / math.sqrt(2 * math.pi)
    second_moment = kept - 2 * within * density
    generator = torch.Generator().manual_seed(1)
    samples = 1001
    told, true = told_and_true(torch.randn(1, samples, 1, 2000, generator=generator), backend)
    assert told * samples == pytest.approx(second_moment / kept**2, rel=0.02)
    # relative standard error 3 %
    assert true * samples == pytest.approx(1 / second_moment, rel=0.1)
    for samples, share in ((8, 0.57), (16, 0.65), (32, 0.74), (64, 0.78)):
        told, true = told_and_true(torch.randn(1, samples, 3, 20_000, generator=generator), backend)
        assert told / true == pytest.approx(share, rel=0.04)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tile_by_tile_equals_the_two_ops_to_the_bit(backend, shape):
    channels, height, width, patch = shape
    for dtype in (torch.float32, torch.float64):
        images = image_batch(channels, height, width, dtype)
        draws = draw(7, height=height, width=width, seed=6, image_keys=[1, 2])
        tokens = cotangents_of(len(draws), shape, dtype)
        raw, variance = pull_back_mean_variance(tokens, images, draws, patch, 7, backend=backend)
        contributions = pull_back(tokens, images, draws, patch, backend=backend).unflatten(0, (2, 7))
        expected = robust_mean_variance(contributions, backend=backend)
        assert torch.equal(raw, pull_back_mean(tokens, images, draws, patch, 7, backend=backend))
        assert torch.equal(raw, expected[0]) and torch.equal(variance, expected[1]), dtype


def test_bad_inputs_are_refused():
    with pytest.raises(TypeError, match="contributions"):
        robust_mean_variance(torch.zeros(1, 2, 3, dtype=torch.int64))
    for shape in ((2, 3), (1, 0, 3, 4), (1, 3, 0, 4)):
        with pytest.raises(InputError, match=r"\(B, S, C, ...\), S and C ≥ 1"):
            robust_mean_variance(torch.zeros(shape))
    with pytest.raises(InputError, match="n_samples must divide the 6 rows"):
        pull_back_mean_variance(torch.zeros(6, 4, 48), torch.zeros(1, 3, 8, 8), draw(6, height=8, width=8), 4, 4)
