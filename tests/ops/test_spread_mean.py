"""Test spread_mean_variance, in every backend: its definition, the adjoint of the warp, mass, bits, odd shapes."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from dave_fast.errors import InputError
from dave_fast.ops import _ext, _registry
from dave_fast.ops.patches import unpatchify
from dave_fast.ops.perturb import perturb
from dave_fast.ops.robust_mean import robust_mean_variance
from dave_fast.ops.spread_mean import densities_of, spread_mean_variance
from dave_fast.sampling import Draws, Sampling, draw, identity
from tests.ops.test_perturb import SETTINGS, WIDE, silent
from tests.tolerances import EXACT, PIXELS

# height, width, patch: one pixel; less than a tile; several tiles and a rest in both directions; one patch; pixels
SHAPES = [(1, 1, (1, 1)), (28, 42, (14, 7)), (33, 65, (11, 13)), (20, 30, (20, 30)), (17, 13, (1, 1))]
IDS = ["one-pixel", "patch-14x7", "tiles-and-rests", "one-patch", "patch-1"]


@pytest.fixture
def backend(pixel_backend: str) -> str:
    return pixel_backend


def evidence(rows: int, shape: tuple[int, int, tuple[int, int]], dtype: torch.dtype) -> torch.Tensor:
    height, width, (p_h, p_w) = shape
    generator = torch.Generator().manual_seed(height * width)
    n = (height // p_h) * (width // p_w)
    return torch.randn(rows, n, dtype=torch.float64, generator=generator).to(dtype)


def still(draws: Draws) -> Draws:
    """Return draws without noise and with the whole signal."""
    return dataclasses.replace(silent(draws), signal=torch.ones_like(draws.signal))


def each_density(values, draws, size, patch, backend):
    """Return the densities (R, 1, H, W): the mean of one sample is the sample."""
    return spread_mean_variance(values, draws, size, patch, 1, backend=backend)[0]


def spread_by_loops(values: list[float], matrix: list[list[float]], size: tuple[int, int], patch: tuple[int, int]):
    """Return the density of one sample in Python's numbers: each destination pixel gives to the sources it sees."""
    (height, width), (p_h, p_w) = size, patch
    density = [[0.0] * width for _ in range(height)]
    for y in range(height):
        for x in range(width):
            given = values[y // p_h * (width // p_w) + x // p_w] / (p_h * p_w)
            at_x, at_y = (row[0] * x + row[1] * y + row[2] for row in matrix)
            for q_y in range(height):
                for q_x in range(width):
                    weight = max(0.0, 1 - abs(at_x - q_x)) * max(0.0, 1 - abs(at_y - q_y))
                    density[q_y][q_x] += given * weight
    return density


def mean_and_variance_by_loops(samples: list[float]) -> tuple[float, float]:
    middle = (len(samples) - 1) // 2
    median = sorted(samples)[middle]
    mad = sorted(abs(each - median) for each in samples)[middle]
    kept = [each for each in samples if abs(each - median) <= 2.5 * (1.4826 * mad + 1e-8)]
    mean = math.fsum(kept) / len(kept)
    squares = math.fsum((each - mean) ** 2 for each in kept)
    return mean, squares / (len(kept) * (len(kept) - 1)) if len(kept) > 1 else 0.0


@pytest.mark.parametrize("samples", [1, 2, 5])
@pytest.mark.parametrize("sampling", [Sampling(flip=1.0), WIDE], ids=["flipped", "wide"])
def test_equals_loops_over_a_tiny_image_in_float64(backend, samples, sampling):
    size, patch = (6, 8), (3, 2)
    draws = draw(samples, height=6, width=8, seed=5, image_keys=[1, 2], sampling=sampling)
    values = evidence(len(draws), (*size, patch), torch.float64)
    mean, variance = spread_mean_variance(values, draws, size, patch, samples, backend=backend)
    assert mean.shape == (2, 1, 6, 8) and variance.shape == (2, 6, 8)
    densities = torch.tensor(
        [
            spread_by_loops(each, matrix, size, patch)
            for each, matrix in zip(values.tolist(), draws.matrices.tolist(), strict=True)
        ],
        dtype=torch.float64,
    )
    of_a_pixel = densities.view(2, samples, 48).mT.reshape(96, samples).tolist()
    truth = torch.tensor([mean_and_variance_by_loops(each) for each in of_a_pixel], dtype=torch.float64)
    assert float((mean.view(96) - truth[:, 0]).norm() / truth[:, 0].norm()) <= EXACT
    assert float((variance.view(96) - truth[:, 1]).norm()) <= EXACT * float(truth[:, 1].norm())


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_is_the_adjoint_of_patch_means_of_the_warp(backend, shape):
    """⟨spread(a), u⟩ = ⟨a, patch means of τ(u)⟩ for any picture u."""
    height, width, patch = shape
    pictures = torch.randn(2, 1, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for sampling, dtype in SETTINGS:
        draws = still(draw(3, height=height, width=width, seed=3, image_keys=[1, 2], sampling=sampling))
        values, u = evidence(len(draws), shape, dtype), pictures.to(dtype)
        warped = perturb(u, draws, patch, dtype=dtype, backend=backend).double()
        there = values.double() * warped.mean(dim=2)
        back = each_density(values, draws, (height, width), patch, backend).double() * u[draws.image_index]
        # in float32 the sums round; the weights themselves are the same numbers on both sides
        bound = {torch.float64: 1e-13, torch.float32: 1e-6}[dtype] * float((values[..., None] * warped).abs().sum())
        assert abs(float(there.sum() - back.sum())) <= bound, (sampling, dtype)


def test_warps_that_stay_inside_keep_the_sum_of_the_values(backend):
    height, width, patch = 24, 40, (8, 10)
    zoomed = Sampling(rotation=180, scale=(2.0, 3.0), translation=0.0)
    draws = draw(3, height=height, width=width, seed=2, image_keys=[1, 2], sampling=zoomed)
    corners = torch.tensor([[x, y, 1.0] for x in (0, width - 1) for y in (0, height - 1)], dtype=torch.float64)
    seen = corners @ draws.matrices.mT
    assert bool(((seen >= 0) & (seen <= torch.tensor([width - 1, height - 1]))).all())
    values = evidence(len(draws), (height, width, patch), torch.float64)
    densities = each_density(values, draws, (height, width), patch, backend)
    torch.testing.assert_close(densities.sum(dim=(1, 2, 3)), values.sum(dim=1), rtol=0, atol=EXACT)


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_equals_the_robust_mean_of_the_stored_densities_to_the_bit(backend, shape):
    height, width, patch = shape
    for sampling, dtype in SETTINGS:
        draws = draw(5, height=height, width=width, seed=6, image_keys=[1, 2], sampling=sampling)
        values = evidence(len(draws), shape, dtype)
        mean, variance = spread_mean_variance(values, draws, (height, width), patch, 5, backend=backend)
        densities = each_density(values, draws, (height, width), patch, backend)
        expected = robust_mean_variance(densities.unflatten(0, (2, 5)), backend=backend)
        assert mean.dtype == dtype and torch.equal(mean, expected[0]), (sampling, dtype)
        assert variance.dtype == torch.float64 and torch.equal(variance, expected[1]), (sampling, dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_every_backend_agrees_with_the_reference(backend, shape):
    height, width, patch = shape
    for sampling, dtype in SETTINGS:
        draws = draw(2, height=height, width=width, seed=4, image_keys=[1, 2], sampling=sampling)
        values = evidence(len(draws), shape, dtype)
        found = each_density(values, draws, (height, width), patch, backend)
        expected = each_density(values, draws, (height, width), patch, "torch")
        # the number of candidates may differ, not their weights: an ulp at the edge of the parallelogram
        bound = 2 * torch.finfo(dtype).eps * float(expected.abs().max())
        assert float((found - expected).abs().max()) <= bound, (sampling, dtype)
        # the table of tolerances is for images below 64 pixels
        if max(height, width) < 64:
            truth = densities_of(values.double(), draws, (height, width), patch)
            bound = PIXELS[dtype] * (3 if sampling is WIDE else 1) * float(truth.abs().max())
            assert float((found - truth).abs().max()) <= bound, (sampling, dtype)


def test_without_a_warp_every_pixel_has_its_share_of_its_patch(backend):
    values = evidence(2, (6, 10, (3, 5)), torch.float32)
    mean, variance = spread_mean_variance(values, identity(2), (6, 10), (3, 5), 1, backend=backend)
    shares = (values / torch.full((), 15.0))[..., None].expand(2, 4, 15)
    assert torch.equal(mean, unpatchify(shares, (3, 5), 6, 10))
    assert torch.equal(variance, torch.zeros(2, 6, 10, dtype=torch.float64))


def test_signal_noise_and_image_numbers_of_the_draws_change_nothing(backend):
    draws = draw(3, height=12, width=16, image_keys=[1, 2])
    values = evidence(6, (12, 16, (4, 4)), torch.float32)
    expected = spread_mean_variance(values, draws, (12, 16), 4, 3, backend=backend)
    others = dataclasses.replace(still(draws), image_index=torch.full_like(draws.image_index, -9))
    found = spread_mean_variance(values, others, (12, 16), 4, 3, backend=backend)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_bits_of_an_image_depend_neither_on_the_batch_nor_on_threads(backend):
    shape = (70, 70, (35, 14))
    draws = draw(4, height=70, width=70, image_keys=[1, 2, 3])
    values = evidence(12, shape, torch.float32)
    whole = spread_mean_variance(values, draws, (70, 70), (35, 14), 4, backend=backend)
    part = spread_mean_variance(values[4:8], draws[4:8], (70, 70), (35, 14), 4, backend=backend)
    assert torch.equal(part[0], whole[0][1:2]) and torch.equal(part[1], whole[1][1:2])
    none = spread_mean_variance(values[:0], draws[:0], (70, 70), (35, 14), 4, backend=backend)
    assert none[0].shape == (0, 1, 70, 70) and none[1].shape == (0, 70, 70)
    torch.set_num_threads(3)
    try:
        again = spread_mean_variance(values, draws, (70, 70), (35, 14), 4, backend=backend)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(again[0], whole[0]) and torch.equal(again[1], whole[1])


def test_values_may_lie_in_memory_in_any_order(backend):
    draws = draw(4, height=12, width=16, image_keys=[1])
    values = evidence(4, (12, 16, (4, 4)), torch.float32)
    expected = spread_mean_variance(values, draws, (12, 16), 4, 4, backend=backend)
    found = spread_mean_variance(values.T.contiguous().T, draws, (12, 16), 4, 4, backend=backend)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_nan_propagates_to_the_pixels_that_see_its_patch_only(backend):
    draws = draw(5, height=12, width=12)
    values = evidence(5, (12, 12, (6, 6)), torch.float32)
    clean = spread_mean_variance(values, draws, (12, 12), 6, 5, backend=backend)
    values[3, 1] = torch.nan
    found = spread_mean_variance(values, draws, (12, 12), 6, 5, backend=backend)
    seen = each_density(values, draws, (12, 12), 6, backend)[3].isnan()
    assert 0 < int(seen.sum()) < 144
    assert torch.equal(found[0][0].isnan(), seen) and torch.equal(found[1].isnan(), seen)
    assert torch.equal(found[0][0][~seen], clean[0][0][~seen])
    assert torch.equal(found[1][~seen], clean[1][~seen])


def test_bad_inputs_are_refused():
    draws, values, size = draw(6, height=8, width=8), torch.zeros(6, 4), (8, 8)
    for samples in (0, 4, -1, 2.0):
        with pytest.raises(InputError, match="n_samples must divide the 6 rows"):
            spread_mean_variance(values, draws, size, 4, samples)
    with pytest.raises(InputError, match=r"values must have the shape \(6, 4\), .*; got \(6, 3\)"):
        spread_mean_variance(values[:, 1:], draws, size, 4, 6)
    with pytest.raises(InputError, match=r"values must have the shape \(5, 4\), .*; got \(6, 4\)"):
        spread_mean_variance(values, draws[:5], size, 4, 5)
    with pytest.raises(TypeError, match="values"):
        spread_mean_variance(values.bfloat16(), draws, size, 4, 6)
    with pytest.raises(TypeError, match="draws must be"):
        spread_mean_variance(values, draws.matrices, size, 4, 6)
    for wrong in ((8,), (8, 0), (8.0, 8), 8, None):
        with pytest.raises(InputError, match=r"size must be \(H, W\)"):
            spread_mean_variance(values, draws, wrong, 4, 6)
    with pytest.raises(InputError, match="do not divide into patches of 3×4"):
        spread_mean_variance(values, draws, size, (3, 4), 6)
    draws.matrices[2, 0] = 0
    with pytest.raises(InputError, match="invertible"):
        spread_mean_variance(values, draws, size, 4, 6, backend="torch")
    draws.matrices[2, 0, 2] = torch.inf
    with pytest.raises(InputError, match="finite"):
        spread_mean_variance(values, draws, size, 4, 6)


@pytest.mark.parametrize("form", ["native", "cuda"])
def test_compiled_kernels_refuse_what_would_leave_the_arrays(form, request):
    if form == "cuda":
        request.getfixturevalue("serial_cuda_kernels")
    elif _ext.unavailable() is not None:
        pytest.skip(str(_ext.unavailable()))
    run = _registry.load("spread_mean_variance", form)
    draws, values, size = draw(6, height=8, width=8), torch.zeros(6, 4), (8, 8)
    with pytest.raises(ValueError, match="densities must have 24 values; it has 18"):
        run(values[:, 1:], draws, size, 4, 6)
    with pytest.raises(ValueError, match="densities must have 12 values; it has 24"):
        run(values, draws[:3], size, 4, 3)
    with pytest.raises(ValueError, match="patches do not fill"):
        run(values, draws, size, 3, 6)
    with pytest.raises(ValueError, match="multiple of the samples"):
        run(values, draws, size, 4, 4)
    with pytest.raises(ValueError, match="float32 or float64"):
        run(values.bfloat16(), draws, size, 4, 6)
    if form == "native":
        # a GPU's draws are not read by the host
        draws.matrices[2, 0] = 0
        with pytest.raises(ValueError, match="must be invertible"):
            run(values, draws, size, 4, 6)
