"""Test smooth against explicit loops in float64: a case by hand, zeros, NaN, and the dependence on scale."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from dave_fast.errors import InputError
from dave_fast.ops.smooth import smooth

SHAPES = [(1, 1, 1), (3, 12, 17), (4, 5, 3), (1, 30, 2)]


@pytest.fixture
def backend(pixel_backend: str) -> str:
    return pixel_backend


def by_loops(raw: np.ndarray) -> np.ndarray:
    """Return the map (H, W) of one image (C, H, W), pixel by pixel."""
    m = np.maximum(raw.sum(axis=0), 0)
    height, width = m.shape

    def at(values: np.ndarray, y: int, x: int) -> float:
        return values[y, x] if 0 <= y < height and 0 <= x < width else 0.0

    offsets = [(dy, dx) for dy in range(-5, 6) for dx in range(-5, 6)]
    gauss = {(dy, dx): np.exp(-(dy**2 + dx**2) / (2 * 7.0**2)) for dy, dx in offsets}
    total = sum(gauss.values())
    blended = np.empty_like(m)
    for y, x in np.ndindex(m.shape):
        blur = sum(gauss[dy, dx] / total * at(m, y + dy, x + dx) for dy, dx in offsets)
        blended[y, x] = (m[y, x] + blur) / 2
    filtered = np.empty_like(m)
    for y, x in np.ndindex(m.shape):
        weights = values = 0.0
        for dy in range(-2, 3):
            for dx in range(-2, 3):
                value = at(blended, y + dy, x + dx)
                weight = np.exp(-(dy**2 + dx**2) / (2 * 0.5**2) - (value - blended[y, x]) ** 2 / (2 * 0.05**2))
                weights, values = weights + weight, values + weight * value
        filtered[y, x] = values / weights
    return filtered / filtered.max() if filtered.max() > 0 else filtered


def raw_of(shape: tuple[int, int, int], dtype: torch.dtype, scale: float = 0.1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (scale * torch.randn(2, *shape, generator=generator, dtype=torch.float64)).to(dtype)


@functools.cache
def truth_of(shape: tuple[int, int, int], dtype: torch.dtype, scale: float) -> torch.Tensor:
    """Return the maps (2, H, W) of `raw_of` by definition, float64."""
    raw = raw_of(shape, dtype, scale).double().numpy()
    return torch.from_numpy(np.stack([by_loops(image) for image in raw]))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_definition(backend, shape):
    for dtype in (torch.float64, torch.float32):
        for scale in (1e-3, 0.1, 30.0):
            maps = smooth(raw_of(shape, dtype, scale), backend=backend)
            assert maps.dtype == dtype and maps.shape == (2, *shape[1:]), (dtype, scale)
            # the range weights have slope 1/σ_r = 20 in the map's own units
            bound = {torch.float64: 1e-12, torch.float32: 2e-6 * max(1.0, 20 * scale)}[dtype]
            assert float((maps.double() - truth_of(shape, dtype, scale)).abs().max()) < bound, (dtype, scale)


def test_a_single_bright_pixel_by_hand(backend):
    raw = torch.zeros(1, 2, 15, 15, dtype=torch.float64)
    raw[0, 0, 7, 7], raw[0, 1, 7, 7] = 3.0, -1.0
    maps = smooth(raw, backend=backend)
    one_axis = np.exp(-(np.arange(-5, 6) ** 2) / 98)
    centre = 1 / one_axis.sum() ** 2
    # so far apart in value that no neighbour has weight: the bilateral filter leaves the bright pixel alone
    assert float(maps[0, 7, 7]) == 1
    corner = float(maps[0, 2, 2])
    assert 0 < corner < centre / (1 + centre)
    assert torch.allclose(maps[0], maps[0].T)
    assert torch.allclose(maps[0], maps[0].flip(0, 1))


def test_smoothing_depends_on_the_scale_of_the_logits(backend):
    raw = raw_of((3, 20, 20), torch.float64, scale=0.01)
    faint, strong = smooth(raw, backend=backend), smooth(100 * raw, backend=backend)
    # equal up to scale, yet neighbours differ more in the strong one: it keeps edges that the faint one loses
    assert float(strong.diff(dim=1).abs().mean()) > 1.1 * float(faint.diff(dim=1).abs().mean())


def test_nothing_positive_stays_zero(backend):
    raw = -raw_of((3, 9, 9), torch.float32).abs()
    raw[1] = 0
    maps = smooth(raw, backend=backend)
    assert torch.equal(maps, torch.zeros(2, 9, 9))


def test_nan_fills_its_own_map_only(backend):
    raw = raw_of((3, 9, 9), torch.float32)
    clean = smooth(raw, backend=backend)
    raw[0, 1, 4, 4] = torch.nan
    maps = smooth(raw, backend=backend)
    assert bool(maps[0].isnan().all())
    assert torch.equal(maps[1], clean[1])


def test_maps_range_from_zero_to_one(backend):
    for dtype in (torch.float64, torch.float32):
        maps = smooth(raw_of((3, 33, 21), dtype), backend=backend)
        assert float(maps.min()) >= 0, dtype
        assert maps.amax(dim=(1, 2)).tolist() == [1, 1], dtype


def test_strided_and_no_images(backend):
    raw = raw_of((3, 9, 8), torch.float32)
    strided = raw.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert torch.equal(smooth(strided, backend=backend), smooth(raw, backend=backend))
    assert smooth(raw[:0], backend=backend).shape == (0, 9, 8)


def test_bad_inputs_are_refused():
    with pytest.raises(TypeError, match="float32 or float64"):
        smooth(torch.zeros(1, 3, 4, 4, dtype=torch.bfloat16))
    with pytest.raises(InputError, match=r"\(B, C, H, W\)"):
        smooth(torch.zeros(3, 4, 4))
