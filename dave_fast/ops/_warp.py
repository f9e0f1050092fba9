"""The affine bilinear warp's geometry, shared by `perturb` and its adjoint `pull_back`.

    source(x, y) = (m00·x + (m01·y + m02), m10·x + (m11·y + m12))      h(u) = max(0, 1 - |u|)

Both references compute every weight h(source - q) here, so that each is the exact adjoint of the other; `csrc/warp.h`
rounds in the same order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dave_fast.errors import InputError
from dave_fast.ops.patches import PatchSize, patch_grid, patch_hw
from dave_fast.ops.precision import COMPUTED, check_dtype
from dave_fast.sampling import Draws


def source(matrices: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the source positions of destinations x, y, which broadcast as (R, H, W); matrices (R, 2, 3)."""
    m = matrices[:, :, :, None, None]
    return m[:, 0, 0] * x + (m[:, 0, 1] * y + m[:, 0, 2]), m[:, 1, 0] * x + (m[:, 1, 1] * y + m[:, 1, 2])


def tent(u: Tensor) -> Tensor:
    """Return h(u) = max(0, 1 - |u|), the bilinear weight at distance u."""
    return (1 - u.abs()).clamp(min=0)


def pixels(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return x (1, 1, W) and y (1, H, 1), the coordinates of the images' pixel centres."""
    x = torch.arange(images.shape[3], dtype=images.dtype, device=images.device)
    y = torch.arange(images.shape[2], dtype=images.dtype, device=images.device)
    return x.view(1, 1, -1), y.view(1, -1, 1)


def take(images: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return (R, C, H', W'), images (R, C, H, W) at integer positions x, y (R, H', W'), zero outside."""
    _, channels, height, width = images.shape
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    flat = (y.clamp(0, height - 1) * width + x.clamp(0, width - 1)).long().flatten(1)
    values = images.flatten(2).gather(2, flat[:, None].expand(-1, channels, -1)).unflatten(2, x.shape[1:])
    return torch.where(inside[:, None], values, 0)


def rows_a_chunk(images: Tensor) -> int:
    """Return how many rows a reference handles at once, so that its temporaries stay small."""
    return max(1, (1 << 22) // images.shape[1:].numel())


def tokens_shape(images: Tensor, draws: Draws, patch_size: PatchSize) -> tuple[int, int, int]:
    """Return (R, n, C·p_h·p_w), the shape of the tokens of every row; raise InputError where no patches fill images."""
    _, channels, height, width = images.shape
    (p_h, p_w), (n_y, n_x) = patch_hw(patch_size), patch_grid(height, width, patch_size)
    return len(draws), n_y * n_x, channels * p_h * p_w


def check(images: Tensor, draws: Draws, patch_size: PatchSize) -> tuple[int, int, int]:
    """Raise TypeError or InputError where images cannot be perturbed by draws; return the shape of their tokens."""
    check_dtype("images", images, COMPUTED)
    if images.ndim != 4 or 0 in images.shape:
        raise InputError(f"images must have the shape (B, C, H, W), none of them 0; got {tuple(images.shape)}")
    check_draws(draws)
    if len(draws) and not 0 <= int(draws.image_index.min()) <= int(draws.image_index.max()) < len(images):
        raise InputError(f"draws.image_index must be in [0, {len(images)}), the images of the batch")
    return tokens_shape(images, draws, patch_size)


def check_draws(draws: Draws) -> None:
    """Raise TypeError or InputError where draws are none, are of different rows, or their matrices are not finite."""
    if not isinstance(draws, Draws):
        raise TypeError(f"draws must be a dave_fast.sampling.Draws; got {type(draws).__name__}")
    # kernels read all fields of every row
    shapes, rows = [tuple(tensor.shape) for tensor in draws.tensors()], len(draws)
    if shapes != [(rows,), (rows, 2, 3), (rows,), (rows,), (rows, 2), (rows,)]:
        raise InputError(f"draws must have the shapes that dave_fast.sampling.Draws documents; got {shapes}")
    if not bool(draws.matrices.isfinite().all()):
        raise InputError("draws.matrices must be finite")
