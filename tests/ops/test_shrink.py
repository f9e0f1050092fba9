"""Test shrink against explicit loops in float64: the border, the limits of the factor, NaN, and scale."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dave_fast.errors import InputError
from dave_fast.ops.shrink import shrink

SHAPES = [(1, 1, 1), (3, 12, 17), (4, 5, 3), (1, 30, 2), (3, 19, 37)]


@pytest.fixture
def backend(pixel_backend: str) -> str:
    return pixel_backend


def factor_by_loops(raw: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """Return the factor (H, W) of one image (C, H, W), pixel by pixel, over the part of the window inside of it."""
    power = raw.sum(axis=0) ** 2
    factor = np.empty_like(power)
    for y, x in np.ndindex(power.shape):
        signal = whole = 0.0
        for v in range(max(0, y - 5), min(len(power), y + 6)):
            for u in range(max(0, x - 5), min(len(power[0]), x + 6)):
                weight = np.exp(-((v - y) ** 2 + (u - x) ** 2) / (2 * 1.5**2))
                whole += weight * power[v, u]
                signal += weight * (power[v, u] - variance[v, u])
        factor[y, x] = max(signal, 0) / whole
    return factor


def case(shape: tuple[int, int, int], dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return raw of two images, and a variance whose factor is 0 in some places and nearly 1 in others."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    raw = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    variance = shape[0] * torch.rand(2, *shape[1:], generator=generator, dtype=torch.float64) ** 2
    slope = torch.linspace(0, 5, shape[2], dtype=torch.float64)
    return raw.to(dtype), variance * slope


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_definition(backend, shape):
    for dtype in (torch.float64, torch.float32):
        raw, variance = case(shape, dtype)
        shrunk = shrink(raw, variance, backend=backend)
        assert shrunk.dtype == dtype and shrunk.shape == raw.shape
        for b in range(2):
            factor = factor_by_loops(raw[b].double().numpy(), variance[b].numpy())
            expected = raw[b].double() * torch.from_numpy(factor)
            bound = {torch.float64: 1e-12, torch.float32: 2e-7}[dtype]
            assert float((shrunk[b].double() - expected).abs().max()) <= bound * float(raw.abs().max()), dtype


def test_no_variance_changes_no_bit(backend):
    raw, variance = case((3, 12, 17), torch.float32)
    assert torch.equal(shrink(raw, torch.zeros_like(variance), backend=backend), raw)


def test_a_large_variance_leaves_nothing(backend):
    raw, variance = case((3, 12, 17), torch.float32)
    shrunk = shrink(raw, torch.full_like(variance, 1e6), backend=backend)
    assert torch.equal(shrunk, torch.zeros_like(raw))


def test_a_map_of_zeros_stays_zero(backend):
    raw, variance = case((3, 12, 17), torch.float32)
    assert torch.equal(shrink(torch.zeros_like(raw), variance, backend=backend), torch.zeros_like(raw))


def test_the_factor_tends_to_one_as_samples_grow(backend):
    raw, variance = case((3, 12, 17), torch.float64)
    assert float(variance[0, 5, 16]) > 0

    def farthest(samples: int) -> float:
        return float((shrink(raw, variance / samples, backend=backend) - raw).abs().max() / raw.abs().max())

    assert farthest(1) > 0.1
    for samples in (100, 10_000):
        assert farthest(100 * samples) == pytest.approx(farthest(samples) / 100, rel=1e-6)


def test_scale_does_not_matter(backend):
    raw, variance = case((3, 12, 17), torch.float32)
    shrunk = shrink(raw, variance, backend=backend)
    for power in (100, -100):
        factor = 2.0**power
        assert torch.equal(shrink(factor * raw, factor**2 * variance, backend=backend), factor * shrunk)


def test_a_variance_in_float32_is_taken_as_it_is(backend):
    raw, variance = case((3, 12, 17), torch.float32)
    narrow = variance.float()
    assert torch.equal(shrink(raw, narrow, backend=backend), shrink(raw, narrow.double(), backend=backend))


def test_nan_fills_its_own_window_only(backend):
    for which in ("raw", "variance"):
        raw, variance = case((2, 30, 30), torch.float32)
        clean = shrink(raw, variance, backend=backend)
        (raw if which == "raw" else variance)[0, ..., 14, 9] = torch.nan
        shrunk = shrink(raw, variance, backend=backend)
        inside = torch.zeros(30, 30, dtype=torch.bool)
        inside[9:20, 4:15] = True
        assert bool(shrunk[0, :, inside].isnan().all()), which
        assert torch.equal(shrunk[0, :, ~inside], clean[0, :, ~inside]), which
        assert torch.equal(shrunk[1], clean[1]), which


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
    assert shrink(raw[:0], variance[:0], backend=backend).shape == (0, 3, 40, 70)


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
