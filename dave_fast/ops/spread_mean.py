"""spread_mean_variance: evidence of patches as a map of pixels, averaged over the samples.

The value of a patch is spread evenly over the patch's pixels and pulled back through the warp, as a density:

    density(q) = τᵀ(g)(q) = Σ_p g(p)·h(source_x(p) - q_x)·h(source_y(p) - q_y)    g(p) = value of p's patch / (p_h·p_w)

τᵀ is the adjoint of `perturb`'s warp. Unlike `pull_back` there is neither the factor 1 - t nor the image. A warp that
keeps every destination inside of the image keeps the sum of the values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dave_fast.errors import InputError
from dave_fast.ops import _ext, _library, _registry, _warp
from dave_fast.ops.patches import PatchSize, patch_grid, patch_hw, unpatchify
from dave_fast.ops.precision import COMPUTED, check_pixels, check_tensor
from dave_fast.ops.pull_back import adjoint_warp, check_inverses
from dave_fast.ops.pull_back_mean import check_samples, tile_and_scratch, tiles
from dave_fast.ops.robust_mean import robust_mean_variance_ref, variance_like
from dave_fast.sampling import Draws


def spread_mean_variance(
    values: Tensor,
    draws: Draws,
    size: tuple[int, int],
    patch_size: PatchSize,
    n_samples: int,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return the robust mean over each image's S densities, and its variance, without storing all densities at once.

    Args:
        values: (B·S, n) float32 or float64, one a patch, patches row by row; rows image-major, b·S + s. The arithmetic
            is that of this dtype.
        draws: the B·S rows that the patches were seen through; of their fields only the matrices matter.
        size: (H, W) of the images in pixels.
        patch_size: p or (p_h, p_w).
        n_samples: S; each run of S rows makes one output.
        backend: "auto", or the name of one.

    Returns:
        mean (B, 1, H, W) of values' dtype and the variance (B, H, W) float64: bit for bit robust_mean_variance of the
        densities (B, S, 1, H, W). A NaN reaches the pixels that see its patch.

    Raises:
        TypeError: an argument is of another type.
        InputError: shapes do not match, or n_samples does not divide the rows.
    """
    if torch.compiler.is_compiling():
        given = values, draws, *size, *patch_hw(patch_size), n_samples, backend
        compiled: tuple[Tensor, Tensor] = _library.call("spread_mean_variance", *given)
        return compiled
    check_shapes(values, draws, size, patch_size, n_samples)
    _warp.check_matrices(draws)
    check_inverses(draws, values.device)
    found: tuple[Tensor, Tensor] = _registry.run(
        "spread_mean_variance", backend, values, draws, size, patch_size, n_samples
    )
    return found


def check_shapes(values: Tensor, draws: Draws, size: tuple[int, int], patch_size: PatchSize, n_samples: int) -> None:
    """Raise TypeError or InputError where the arguments do not match, without reading a value of a tensor."""
    check_tensor("values", values, COMPUTED)
    _warp.check_draws(draws, values.device)
    check_samples(n_samples, draws)
    pair = isinstance(size, tuple | list) and len(size) == 2
    if not pair or not all(isinstance(length, int) and length >= 1 for length in size):
        raise InputError(f"size must be (H, W), both whole numbers ≥ 1; got {size!r}")
    check_pixels(*size)
    rows, columns = patch_grid(*size, patch_size)
    if tuple(values.shape) != (len(draws), rows * columns):
        expected = len(draws), rows * columns
        raise InputError(f"values must have the shape {expected}, draws and patches; got {tuple(values.shape)}")


def spread_mean_variance_ref(
    values: Tensor, draws: Draws, size: tuple[int, int], patch_size: PatchSize, n_samples: int
) -> tuple[Tensor, Tensor]:
    """Run `spread_mean_variance` in PyTorch, on any device."""
    mean, variance = _outputs(values, size, n_samples)

    def pull(part: slice, rows: slice) -> Tensor:
        return densities_of(values[part], draws[part], size, patch_size, rows)

    for b, rows, densities in tiles(mean, n_samples, pull):
        (mean[b, :, rows],), (variance[b, rows],) = robust_mean_variance_ref(densities[None])
    return mean, variance


def spread_mean_variance_native(
    values: Tensor, draws: Draws, size: tuple[int, int], patch_size: PatchSize, n_samples: int
) -> tuple[Tensor, Tensor]:
    """Run `spread_mean_variance` in C++ on the host."""
    mean, variance = _outputs(values, size, n_samples)
    given = _arguments(values, draws, size, patch_size, n_samples)
    _ext.run_native("spread_mean_variance", *given, mean, variance)
    return mean, variance


def spread_mean_variance_cuda(
    values: Tensor, draws: Draws, size: tuple[int, int], patch_size: PatchSize, n_samples: int
) -> tuple[Tensor, Tensor]:
    """Run `spread_mean_variance` in CUDA C++ on values' device."""
    mean, variance = _outputs(values, size, n_samples)
    given = _arguments(values, draws, size, patch_size, n_samples)
    tile, scratch = tile_and_scratch(mean, n_samples, variance=True)
    _ext.run_cuda("spread_mean_variance", *given, tile, scratch, mean, variance)
    return mean, variance


def _arguments(
    values: Tensor, draws: Draws, size: tuple[int, int], patch_size: PatchSize, n_samples: int
) -> tuple[Any, ...]:
    """Return a compiled kernel's arguments without its outputs."""
    density = _density(values, patch_size)
    return density, draws, *size, *patch_hw(patch_size), n_samples


def densities_of(
    values: Tensor, draws: Draws, size: tuple[int, int], patch_size: PatchSize, rows: slice = slice(None)
) -> Tensor:
    """Return the densities (R, 1, rows of pixels, W) of all draws at once."""
    p_h, p_w = patch_hw(patch_size)
    pixels = _density(values, patch_size)[..., None].expand(-1, -1, p_h * p_w)
    return adjoint_warp(unpatchify(pixels, patch_size, *size), draws, rows)


def _density(values: Tensor, patch_size: PatchSize) -> Tensor:
    """Return values (R, n) by the pixels of a patch, contiguous."""
    p_h, p_w = patch_hw(patch_size)
    # a tensor, since on a GPU PyTorch divides by a number by multiplying with its reciprocal, which rounds twice
    return (values / values.new_full((), p_h * p_w)).contiguous()


def _outputs(values: Tensor, size: tuple[int, int], n_samples: int) -> tuple[Tensor, Tensor]:
    """Return memory for the mean and its variance."""
    mean = values.new_empty(len(values) // n_samples, 1, *size)
    return mean, variance_like(mean)
