"""Test perturb against PyTorch's grid_sample in float64: warp, noise, layout, odd shapes, every backend."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from dave_fast.errors import InputError
from dave_fast.ops.patches import patchify, unpatchify
from dave_fast.ops.perturb import perturb, perturb_ref
from dave_fast.sampling import Draws, Sampling, draw, identity, normal
from tests.tolerances import PIXELS

# channels, height, width, patch
SHAPES = [(1, 1, 1, (1, 1)), (3, 28, 42, (14, 7)), (4, 9, 5, (3, 5)), (3, 30, 44, (30, 44)), (1, 17, 13, (1, 1))]
IDS = ["one-pixel", "patch-14x7", "four-channels", "one-token", "patch-1"]
WIDE = Sampling(rotation=180, scale=(0.3, 3.0), translation=0.6, noise_alpha=0.9)
# both ranges of matrices meet both precisions
SETTINGS = [(Sampling(), torch.float32), (Sampling(), torch.float64), (WIDE, torch.float32), (WIDE, torch.float64)]
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture
def backend(pixel_backend: str) -> str:
    return pixel_backend


def image_batch(channels: int, height: int, width: int, dtype: torch.dtype, count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height * width)
    return torch.randn(count, channels, height, width, dtype=torch.float64, generator=generator).to(dtype)


def silent(draws: Draws) -> Draws:
    return dataclasses.replace(draws, noise=torch.zeros_like(draws.noise))


def grid_of(draws: Draws, height: int, width: int) -> torch.Tensor:
    """Return the grids (R, H, W, 2) with which grid_sample (align_corners=False) applies the draws' matrices."""
    y, x = torch.meshgrid(torch.arange(height).double(), torch.arange(width).double(), indexing="ij")
    positions = torch.stack([x, y, torch.ones_like(x)], dim=-1)
    source = torch.einsum("rij,hwj->rhwi", draws.matrices, positions)
    return (2 * source + 1) / torch.tensor([width, height]).double() - 1


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_matches_grid_sample_and_the_noise(backend, shape):
    channels, height, width, patch = shape
    for sampling, dtype in SETTINGS:
        images = image_batch(channels, height, width, dtype)
        draws = draw(5, height=height, width=width, seed=2, image_keys=[1, 2], sampling=sampling)
        tokens = perturb(images, draws, patch, dtype=dtype, backend=backend)

        grid = grid_of(draws, height, width)
        rows = images.double()[draws.image_index]
        warped = F.grid_sample(rows, grid, padding_mode="zeros", align_corners=False)
        noise = normal(draws.keys, draws.samples, channels * height * width).double().view_as(warped)
        truth = patchify(draws.signal.view(-1, 1, 1, 1) * warped + draws.noise.view(-1, 1, 1, 1) * noise, patch)

        assert tokens.dtype == dtype and tokens.shape == truth.shape and tokens.device == images.device, (
            sampling,
            dtype,
        )
        # a position on the edge of a pixel may fall on either side in float32: its weight there is small
        bound = PIXELS[dtype] * (3 if sampling is WIDE else 1)
        assert float((tokens - truth).abs().max() / truth.abs().max()) < bound, (sampling, dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_every_backend_gives_the_same_bits(backend, shape):
    channels, height, width, patch = shape
    draws = draw(3, height=height, width=width, image_keys=[4, 5], sampling=WIDE)
    for computed in (torch.float32, torch.float64):
        images = image_batch(channels, height, width, computed)
        for stored in FLOATS:
            tokens = perturb(images, draws, patch, dtype=stored, backend=backend)
            assert tokens.dtype == stored, (computed, stored)
            assert torch.equal(tokens, perturb_ref(images, draws, patch, dtype=stored)), (computed, stored)


def test_identity_is_the_image(backend):
    images = image_batch(3, 28, 42, torch.float32)
    assert torch.equal(perturb(images, identity(2), (14, 7), backend=backend), patchify(images, (14, 7)))


def test_one_row_and_no_row(backend):
    images = image_batch(3, 16, 16, torch.float32)
    draws = draw(4, height=16, width=16, image_keys=[1, 2])
    whole = perturb(images, draws, 8, backend=backend)
    for r in range(len(draws)):
        assert torch.equal(perturb(images, draws[r : r + 1], 8, backend=backend), whole[r : r + 1])
    assert perturb(images, draws[:0], 8, backend=backend).shape == (0, 4, 192)


def test_more_threads_change_nothing(backend):
    images = image_batch(3, 28, 42, torch.float32)
    draws = draw(3, height=28, width=42, image_keys=[1, 2])
    one = perturb(images, draws, 14, backend=backend)
    torch.set_num_threads(3)
    try:
        assert torch.equal(perturb(images, draws, 14, backend=backend), one)
    finally:
        torch.set_num_threads(1)


def test_strided_images(backend):
    images = image_batch(3, 28, 42, torch.float32)
    draws = draw(3, height=28, width=42, image_keys=[1, 2])
    moved = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert torch.equal(perturb(moved, draws, 14, backend=backend), perturb(images, draws, 14, backend=backend))


def test_nan_propagates(backend):
    images = image_batch(1, 8, 8, torch.float32, count=1)
    images[0, 0, 3, 3] = torch.nan
    tokens = perturb(images, identity(1), (8, 8), backend=backend)
    assert bool(tokens.isnan().any())


@pytest.mark.parametrize("patch", [1, (2, 3), (8, 12)], ids=str)
def test_patchify_is_the_layout_of_a_convolution(patch):
    images = image_batch(3, 8, 12, torch.float64)
    p_h, p_w = (patch, patch) if isinstance(patch, int) else patch
    weight = torch.randn(5, 3, p_h, p_w, dtype=torch.float64)
    expected = F.conv2d(images, weight, stride=(p_h, p_w)).flatten(2).transpose(1, 2)
    tokens = patchify(images, patch)
    torch.testing.assert_close(tokens @ weight.flatten(1).T, expected)
    assert torch.equal(unpatchify(tokens, patch, 8, 12), images)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": torch.zeros(2, 3, 8, 8, dtype=torch.int32)}, TypeError, "float32 or float64"),
        ({"images": [[0.0]]}, TypeError, "list"),
        ({"images": torch.zeros(3, 8, 8)}, InputError, r"\(B, C, H, W\)"),
        ({"images": torch.zeros(1, 3, 8, 8)}, InputError, r"image_index must be in \[0, 1\)"),
        ({"patch_size": 3}, InputError, "8×8 pixels do not divide into patches of 3×3"),
        ({"patch_size": 0}, InputError, "patch_size"),
        ({"dtype": torch.int32}, TypeError, "dtype"),
        ({"draws": None}, TypeError, "Draws"),
    ],
    ids=["integers", "list", "three-dimensions", "few-images", "patch", "zero-patch", "stored-integers", "no-draws"],
)
def test_bad_inputs_are_refused(change, error, message):
    draws = draw(2, height=8, width=8, image_keys=[0, 1])
    arguments = {"images": torch.zeros(2, 3, 8, 8), "draws": draws, "patch_size": 4} | change
    with pytest.raises(error, match=message):
        perturb(**arguments)


@pytest.mark.parametrize("name", [each.name for each in dataclasses.fields(Draws)])
def test_draws_with_a_field_of_fewer_rows_are_refused(name):
    images, draws = torch.zeros(1, 3, 8, 8), draw(3, height=8, width=8)
    with pytest.raises(InputError, match=r"shapes that dave_fast.sampling.Draws documents; got .*\(2,"):
        perturb(images, dataclasses.replace(draws, **{name: getattr(draws, name)[:2]}), 4)


def test_matrices_that_are_not_finite_are_refused():
    draws = draw(1, height=8, width=8)
    draws.matrices[0, 0, 0] = torch.inf
    with pytest.raises(InputError, match="finite"):
        perturb(torch.zeros(1, 3, 8, 8), draws, 4)
