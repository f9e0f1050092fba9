"""Test shrink against explicit sums in float64: the border, the limits of the factors, NaN, and scale."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dave_fast.errors import InputError
from dave_fast.ops.shrink import shrink

SHAPES = [(1, 1, 1), (3, 12, 17), (4, 5, 3), (1, 30, 2), (3, 40, 70)]


@pytest.fixture
def backend(pixel_backend: str) -> str:
    return pixel_backend


def weighted(values: np.ndarray, sigma: float, radius: int) -> tuple[np.ndarray, np.ndarray]:
    """Return Gaussian sums of (H, W) over the part of each pixel's window inside, and the sums of their weights."""

    def axis(n: int) -> np.ndarray:
        apart = np.abs(np.arange(n)[:, None] - np.arange(n))
        return np.where(apart <= radius, np.exp(-(apart**2) / (2 * sigma**2)), 0)

    down, across = axis(values.shape[0]), axis(values.shape[1])
    return down @ values @ across, down @ np.ones_like(values) @ across


def by_definition(raw: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """Return the shrunken sum (H, W) of one image (C, H, W)."""
    m = raw.sum(axis=0)
    total, weight = weighted(m, 1.0, 4)
    local = total / weight

    def share(values: np.ndarray) -> np.ndarray:
        power, noise = weighted(values**2, 5.0, 15)[0], weighted(variance, 5.0, 15)[0]
        return np.divide(np.maximum(power - noise, 0), power, out=np.zeros_like(power), where=power > 0)

    detail = m - local
    return (local + detail * share(detail)) * share(m)


def case(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return raw of two images, and a variance whose factors are 0 in some places and nearly 1 in others."""
    generator = torch.Generator().manual_seed(sum(shape))
    raw = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    variance = shape[0] * torch.rand(2, *shape[1:], generator=generator, dtype=torch.float64) ** 2
    slope = torch.linspace(0, 5, shape[2], dtype=torch.float64)
    return raw.to(dtype), variance * slope


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_definition(backend, shape):
    for dtype in (torch.float64, torch.float32):
        raw, variance = case(shape, dtype)
        shrunk = shrink(raw, variance, backend=backend)
        assert shrunk.dtype == dtype and shrunk.shape == (2, 1, *shape[1:])
        for b in range(2):
            expected = torch.from_numpy(by_definition(raw[b].double().numpy(), variance[b].numpy()))
            bound = {torch.float64: 1e-12, torch.float32: 2e-7}[dtype]
            assert float((shrunk[b, 0].double() - expected).abs().max()) <= bound * float(raw.abs().max()), dtype


def test_no_variance_leaves_the_channel_sum(backend):
    raw, variance = case((3, 12, 17), torch.float64)
    shrunk = shrink(raw, torch.zeros_like(variance), backend=backend)
    torch.testing.assert_close(shrunk, raw.sum(dim=1, keepdim=True), rtol=0, atol=1e-14)


def test_a_large_variance_leaves_nothing(backend):
    raw, variance = case((3, 12, 17), torch.float32)
    shrunk = shrink(raw, torch.full_like(variance, 1e6), backend=backend)
    assert torch.equal(shrunk, torch.zeros_like(shrunk))


def test_a_sum_of_zeros_stays_zero(backend):
    raw, variance = case((2, 12, 17), torch.float32)
    raw[:, 1] = -raw[:, 0]
    shrunk = shrink(raw, variance, backend=backend)
    assert torch.equal(shrunk, torch.zeros_like(shrunk))


def test_a_constant_keeps_its_level_at_the_border(backend):
    raw = torch.ones(1, 2, 30, 30, dtype=torch.float64)
    shrunk = shrink(raw, torch.full((1, 30, 30), 0.4, dtype=torch.float64), backend=backend)
    torch.testing.assert_close(shrunk, torch.full_like(shrunk, 2 * 0.9), rtol=1e-12, atol=0)


def test_fine_detail_is_shrunk_before_the_level(backend):
    y, x = torch.meshgrid(torch.arange(60), torch.arange(60), indexing="ij")
    checks = 1 - 2 * ((y + x) % 2).double()
    raw = (10 + checks)[None, None]
    shrunk = shrink(raw, torch.full((1, 60, 60), 2.0, dtype=torch.float64), backend=backend)[0, 0, 20:40, 20:40]
    assert float((shrunk - 10 * (1 - 2 / 101)).abs().max()) < 1e-3


def test_the_result_tends_to_the_sum_as_samples_grow(backend):
    raw, variance = case((3, 12, 17), torch.float64)

    def farthest(samples: int) -> float:
        shrunk = shrink(raw, variance / samples, backend=backend)
        return float((shrunk - raw.sum(dim=1, keepdim=True)).abs().max())

    assert farthest(1) > 0.1
    # the two factors' product makes a term that falls with the square of S
    assert farthest(10_000) == pytest.approx(farthest(1000) / 10, rel=0.02)
    assert farthest(1_000_000) == pytest.approx(farthest(100_000) / 10, rel=1e-3)


@pytest.mark.parametrize("power", [100, -100])
def test_scale_does_not_matter(backend, power):
    raw, variance = case((3, 12, 17), torch.float32)
    shrunk = shrink(raw, variance, backend=backend)
    factor = 2.0**power
    assert torch.equal(shrink(factor * raw, factor**2 * variance, backend=backend), factor * shrunk)


def test_a_variance_in_float32_is_taken_as_it_is(backend):
    raw, variance = case((3, 12, 17), torch.float32)
    narrow = variance.float()
    assert torch.equal(shrink(raw, narrow, backend=backend), shrink(raw, narrow.double(), backend=backend))


@pytest.mark.parametrize(("which", "reach"), [("raw", 19), ("variance", 15)])
def test_nan_fills_what_its_windows_reach_only(backend, which, reach):
    raw, variance = case((2, 60, 60), torch.float32)
    clean = shrink(raw, variance, backend=backend)
    (raw if which == "raw" else variance)[0, ..., 24, 19] = torch.nan
    shrunk = shrink(raw, variance, backend=backend)
    inside = torch.zeros(60, 60, dtype=torch.bool)
    inside[24 - reach : 25 + reach, 19 - reach : 20 + reach] = True
    assert torch.equal(shrunk[0, 0].isnan(), inside)
    assert torch.equal(shrunk[0, 0, ~inside], clean[0, 0, ~inside])
    assert torch.equal(shrunk[1], clean[1])


def test_strides_threads_and_batches_change_nothing(backend):
    raw, variance = case((3, 40, 70), torch.float32)
    whole = shrink(raw, variance, backend=backend)
    strided = raw.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    torch.set_num_threads(3)
    try:
        assert torch.equal(shrink(strided, variance.mT.contiguous().mT, backend=backend), whole)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(shrink(raw[1:], variance[1:], backend=backend), whole[1:])
    assert shrink(raw[:0], variance[:0], backend=backend).shape == (0, 1, 40, 70)


def test_bad_inputs_are_refused():
    raw, variance = torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 4)
    with pytest.raises(TypeError, match="raw must be float32 or float64"):
        shrink(raw.bfloat16(), variance)
    with pytest.raises(TypeError, match="variance must be float32 or float64"):
        shrink(raw, variance.int())
    with pytest.raises(InputError, match=r"raw must have the shape \(B, C, H, W\)"):
        shrink(raw[0], variance)
    with pytest.raises(InputError, match=r"\(B, H, W\) of raw \(1, 3, 4, 4\); got \(1, 1, 4, 4\)"):
        shrink(raw, variance[:, None])
