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
from dave_fast.ops.precision import check_images
from dave_fast.sampling import Draws

# csrc/warp.h has the same constant
LARGEST_ENTRY = 2.0**60


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
    # multiplied as integers: float32 does not number all pixels of a large image
    flat = (y.clamp(0, height - 1).long() * width + x.clamp(0, width - 1).long()).flatten(1)
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


def check_shapes(images: Tensor, draws: Draws, patch_size: PatchSize) -> tuple[int, int, int]:
    """Raise TypeError or InputError where images do not go with draws; return the shape of their tokens.

    No value of a tensor is read.
    """
    check_images("images", images)
    if not len(images):
        raise InputError(f"images must hold at least one image; got the shape {tuple(images.shape)}")
    check_draws(draws, images.device)
    return tokens_shape(images, draws, patch_size)


def check_draws(draws: Draws, device: torch.device) -> None:
    """Raise TypeError or InputError where draws are none, do not fit each other, or are on another GPU."""
    if not isinstance(draws, Draws):
        raise TypeError(f"draws must be a dave_fast.sampling.Draws; got {type(draws).__name__}")
    # kernels read all fields of every row; a tensor may have been resized since the draws were made
    draws.check()
    if draws.signal.device.type != "cpu" and draws.signal.device != device:
        raise InputError(f"draws are on {draws.signal.device}, the images on {device}; move the draws there")


def check_values(images: Tensor, draws: Draws) -> None:
    """Raise InputError where draws name images outside of the batch, or their matrices cannot be computed with."""
    check_matrices(draws)
    if len(draws) and not 0 <= int(draws.image_index.min()) <= int(draws.image_index.max()) < len(images):
        raise InputError(f"draws.image_index must be in [0, {len(images)}), the images of the batch")


def check_matrices(draws: Draws) -> None:
    """Raise InputError where the draws' matrices are not finite numbers, or are too large to compute with."""
    if not is_bounded(draws.matrices):
        raise InputError("draws.matrices must be finite numbers of at most 2⁶⁰")


def is_bounded(matrices: Tensor) -> bool:
    """Return whether all entries are at most LARGEST_ENTRY, so that positions stay finite; False where one is NaN."""
    return bool((matrices.abs() <= LARGEST_ENTRY).all())
