"""Test robust_mean bit for bit against two passes of torch.median: every number of samples, ties, NaN, infinities."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from dave_fast.errors import InputError
from dave_fast.ops.robust_mean import robust_mean, robust_mean_ref


@pytest.fixture
def backend(pixel_backend: str) -> str:
    return pixel_backend


def values_and_kept(contributions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return contributions (B, S, ...) in the dtype of the statistics, and which of them the definition keeps."""
    values = contributions.to(torch.float64 if contributions.dtype == torch.float64 else torch.float32)
    median = values.median(dim=1, keepdim=True).values
    distance = (values - median).abs()
    mad = distance.median(dim=1, keepdim=True).values
    return values, distance <= 2.5 * (1.4826 * mad + 1e-8)


def by_two_medians(contributions: torch.Tensor) -> torch.Tensor:
    """Return the definition's result (B, ...), float64, with exactly rounded sums."""
    values, kept = values_and_kept(contributions)
    columns = zip(
        values.flatten(2).mT.reshape(-1, values.shape[1]), kept.flatten(2).mT.reshape(-1, values.shape[1]), strict=True
    )
    means = [math.fsum(column[keep].tolist()) / int(keep.sum()) for column, keep in columns]
    return torch.tensor(means, dtype=torch.float64).view(values[:, 0].shape)


def contributions_of(samples: int, dtype: torch.dtype, pixels: int = 37) -> torch.Tensor:
    generator = torch.Generator().manual_seed(samples)
    values = torch.randn(2, samples, pixels, generator=generator, dtype=torch.float64)
    # heavy tails, so that something is left out; a few columns of ties
    values = values**3
    values[:, :, :5] = values[:, :, :5].round()
    return values.to(dtype)


@functools.cache
def case_and_truth(samples: int, pixels: int = 37) -> tuple[torch.Tensor, torch.Tensor]:
    """Return contributions (2, samples, pixels) and their mean by definition, both float32 and not to be written."""
    contributions = contributions_of(samples, torch.float32, pixels)
    return contributions, by_two_medians(contributions).float()


def test_every_number_of_samples(backend):
    """The mean of the kept values is rounded once, so that a wrong median, deviation or mask changes its bits."""
    for samples in range(1, 258):
        contributions, truth = case_and_truth(samples)
        raw = robust_mean(contributions, backend=backend)
        assert raw.dtype == torch.float32 and raw.shape == (2, 37), f"{samples} samples"
        assert torch.equal(raw, truth), f"{samples} samples"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_types_and_shapes(backend, dtype):
    contributions = contributions_of(24, dtype, pixels=3 * 5 * 7).view(2, 24, 3, 5, 7)
    raw = robust_mean(contributions, backend=backend)
    assert raw.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert raw.shape == (2, 3, 5, 7)
    assert torch.equal(raw, robust_mean_ref(contributions))
    ulp = torch.finfo(raw.dtype).eps
    torch.testing.assert_close(raw.double(), by_two_medians(contributions), rtol=2 * ulp, atol=0)


def test_every_remainder_of_a_block(backend):
    for pixels in (1, 31, 32, 33, 255, 256, 257, 600):
        contributions, truth = case_and_truth(9, pixels)
        assert torch.equal(robust_mean(contributions, backend=backend), truth), f"{pixels} pixels"


def test_an_outlier_is_left_out(backend):
    contributions = torch.tensor([1.0, 1.1, 0.9, 1.05, 100.0]).view(1, 5, 1)
    assert float(robust_mean(contributions, backend=backend)) == pytest.approx(1.0125, abs=1e-6)


def test_equal_values_are_their_own_mean(backend):
    contributions = torch.full((1, 8, 4), 0.3)
    assert torch.equal(robust_mean(contributions, backend=backend), contributions[:, 0])


def test_nan_makes_its_own_pixel_nan_only(backend):
    contributions = contributions_of(10, torch.float32)
    clean = robust_mean(contributions, backend=backend)
    contributions[1, 7, 20] = torch.nan
    raw = robust_mean(contributions, backend=backend)
    assert raw.isnan().nonzero().tolist() == [[1, 20]]
    raw[1, 20] = clean[1, 20]
    assert torch.equal(raw, clean)


def test_infinities_are_outliers_unless_they_are_the_median(backend):
    inf = torch.inf
    columns = [[1, 2, 3, 4, inf], [1, 2, 3, -inf, inf], [1, 2, 3, inf, inf], [inf] * 5, [1, 2, inf, inf, inf]]
    for dtype in (torch.float32, torch.float64):
        contributions = torch.tensor(columns, dtype=dtype).T[None].contiguous()
        raw = robust_mean(contributions, backend=backend)[0]
        assert torch.equal(raw.nan_to_num(nan=-1), robust_mean_ref(contributions)[0].nan_to_num(nan=-1)), dtype
        assert raw[:3].tolist() == [2.5, 2.0, 2.0], dtype
        assert bool(raw[3:].isnan().all()), dtype


def test_an_infinite_mad_keeps_everything(backend):
    inf = torch.inf
    contributions = torch.tensor([[-inf, 1.0, inf], [1.0, inf, inf], [1.0, 1.0, inf]]).T[None].contiguous()
    raw = robust_mean(contributions, backend=backend)[0]
    expected = robust_mean_ref(contributions)[0]
    assert torch.equal(raw.isnan(), expected.isnan())
    assert torch.equal(raw.nan_to_num(), expected.nan_to_num())


def test_strided_contributions(backend):
    contributions = contributions_of(12, torch.float32)
    strided = contributions.mT.contiguous().mT
    assert torch.equal(robust_mean(strided, backend=backend), robust_mean(contributions, backend=backend))


def test_more_threads_change_nothing(backend):
    contributions = contributions_of(12, torch.float32, pixels=3000)
    one = robust_mean(contributions, backend=backend)
    torch.set_num_threads(3)
    try:
        assert torch.equal(robust_mean(contributions, backend=backend), one)
    finally:
        torch.set_num_threads(1)


def test_bad_inputs_are_refused():
    with pytest.raises(TypeError, match="contributions"):
        robust_mean(torch.zeros(1, 2, 3, dtype=torch.int64))
    with pytest.raises(InputError, match=r"\(B, S, ...\)"):
        robust_mean(torch.zeros(3))
    with pytest.raises(InputError, match="S ≥ 1"):
        robust_mean(torch.zeros(1, 0, 3))
