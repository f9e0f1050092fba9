"""Test pull_back, in every backend: the exact adjoint of perturb, and autograd through grid_sample, on odd shapes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dave_fast.errors import InputError
from dave_fast.ops.patches import patchify
from dave_fast.ops.perturb import perturb
from dave_fast.ops.pull_back import pull_back, pull_back_ref
from dave_fast.sampling import draw, identity
from tests.ops.test_perturb import FLOATS, IDS, SETTINGS, SHAPES, WIDE, grid_of, image_batch, silent
from tests.tolerances import PIXELS


@pytest.fixture
def backend(pixel_backend: str) -> str:
    return pixel_backend


def cotangents_of(rows: int, shape: tuple[int, int, int, tuple[int, int]], dtype: torch.dtype) -> torch.Tensor:
    channels, height, width, patch = shape
    return patchify(image_batch(channels, height, width, dtype, count=rows), patch)


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_is_the_adjoint_of_perturb(backend, shape):
    """⟨A x, y⟩ = ⟨x, Aᵀ y⟩ for the signal part A of perturb, with images of ones to see Aᵀ alone."""
    channels, height, width, patch = shape
    for sampling, dtype in SETTINGS:
        images = image_batch(channels, height, width, dtype)
        draws = silent(draw(6, height=height, width=width, seed=3, image_keys=[1, 2], sampling=sampling))
        y = cotangents_of(len(draws), shape, dtype)
        there = perturb(images, draws, patch, dtype=dtype, backend=backend).double() * y
        back = pull_back(y, torch.ones_like(images), draws, patch, backend=backend).double() * images[draws.image_index]
        # in float32 the sums round; the weights themselves are the same numbers on both sides
        bound = {torch.float64: 1e-13, torch.float32: 1e-6}[dtype] * float(there.abs().sum())
        assert abs(float(there.sum() - back.sum())) <= bound, (sampling, dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_is_the_gradient_of_grid_sample(backend, shape):
    channels, height, width, patch = shape
    for sampling, dtype in SETTINGS:
        images = image_batch(channels, height, width, dtype)
        draws = draw(5, height=height, width=width, seed=4, image_keys=[1, 2], sampling=sampling)
        given = cotangents_of(len(draws), shape, dtype)
        contributions = pull_back(given, images, draws, patch, backend=backend)

        rows = images.double()[draws.image_index].requires_grad_()
        warped = F.grid_sample(rows, grid_of(draws, height, width), padding_mode="zeros", align_corners=False)
        output = patchify(draws.signal.view(-1, 1, 1, 1) * warped, patch)
        (gradient,) = torch.autograd.grad(output, rows, given.double())
        truth = gradient * rows.detach()

        assert contributions.dtype == dtype and contributions.shape == truth.shape, (sampling, dtype)
        bound = PIXELS[dtype] * (3 if sampling is WIDE else 1)
        assert float((contributions - truth).abs().max() / truth.abs().max().clamp(min=1e-3)) < bound, (sampling, dtype)


@pytest.mark.parametrize("computed", [torch.float32, torch.float64], ids=str)
def test_every_backend_and_type_agrees(backend, computed):
    shape = (3, 28, 42, (14, 7))
    images = image_batch(3, 28, 42, computed)
    draws = draw(3, height=28, width=42, image_keys=[4, 5])
    for given in FLOATS:
        tokens = cotangents_of(len(draws), shape, given)
        for stored in (None, *FLOATS):
            contributions = pull_back(tokens, images, draws, (14, 7), dtype=stored, backend=backend)
            expected = pull_back_ref(tokens, images, draws, (14, 7), dtype=stored)
            assert contributions.dtype == (stored or computed), (given, stored)
            # the number of candidates may differ, not their weights: an ulp at the edge of the parallelogram
            bound = 2 * torch.finfo(expected.dtype).eps * float(expected.abs().max())
            assert float((contributions.double() - expected.double()).abs().max()) <= bound, (given, stored)


def test_identity_is_the_product(backend):
    images = image_batch(3, 28, 42, torch.float32)
    g = image_batch(3, 42, 28, torch.float32).mT.contiguous()
    assert torch.equal(pull_back(patchify(g, 7), images, identity(2), 7, backend=backend), g * images)


def test_one_row_and_no_row(backend):
    images = image_batch(3, 16, 16, torch.float32)
    draws = draw(4, height=16, width=16, image_keys=[1, 2])
    tokens = cotangents_of(len(draws), (3, 16, 16, (8, 8)), torch.float32)
    whole = pull_back(tokens, images, draws, 8, backend=backend)
    for r in range(len(draws)):
        alone = pull_back(tokens[r : r + 1], images, draws[r : r + 1], 8, backend=backend)
        torch.testing.assert_close(alone, whole[r : r + 1])
    assert pull_back(tokens[:0], images, draws[:0], 8, backend=backend).shape == (0, 3, 16, 16)


def test_more_threads_change_nothing(backend):
    images = image_batch(3, 28, 42, torch.float32)
    draws = draw(5, height=28, width=42, image_keys=[1, 2])
    tokens = cotangents_of(len(draws), (3, 28, 42, (14, 7)), torch.float32)
    one = pull_back(tokens, images, draws, (14, 7), backend=backend)
    torch.set_num_threads(3)
    try:
        assert torch.equal(pull_back(tokens, images, draws, (14, 7), backend=backend), one)
    finally:
        torch.set_num_threads(1)


def test_nan_propagates(backend):
    images = image_batch(1, 8, 8, torch.float32, count=1)
    tokens = torch.ones(1, 1, 64)
    tokens[0, 0, 20] = torch.nan
    contributions = pull_back(tokens, images, identity(1), 8, backend=backend)
    assert bool(contributions[0, 0, 2, 4].isnan())


def test_bad_inputs_are_refused():
    images, draws = torch.zeros(1, 3, 8, 8), draw(2, height=8, width=8)
    tokens = torch.zeros(2, 4, 48)
    with pytest.raises(InputError, match=r"\(2, 4, 48\); got \(2, 4, 47\)"):
        pull_back(tokens[:, :, :47], images, draws, 4)
    with pytest.raises(TypeError, match="token_cotangents"):
        pull_back(tokens.int(), images, draws, 4)
    with pytest.raises(TypeError, match="dtype"):
        pull_back(tokens, images, draws, 4, dtype=torch.int32)
    draws.matrices[0] = 0
    with pytest.raises(InputError, match="invertible"):
        pull_back(tokens, images, draws, 4, backend="torch")
