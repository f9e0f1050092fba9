"""Cut images into patches and put them together again; the token layout is defined here.

A token's C·p_h·p_w elements are ordered (c, y, x), as a convolution's weight flattens; tokens go row by row.
"""

from __future__ import annotations

from operator import index

from torch import Tensor

from dave_fast.errors import InputError

# p, or (p_h, p_w).
PatchSize = int | tuple[int, int]


def patch_hw(patch_size: PatchSize) -> tuple[int, int]:
    """Return (p_h, p_w) for a patch size that may be one number; raise InputError unless they are whole and ≥ 1."""
    pair = patch_size if isinstance(patch_size, tuple | list) else (patch_size, patch_size)
    try:
        p_h, p_w = map(index, pair)
    except (TypeError, ValueError):
        p_h = p_w = 0
    if p_h < 1 or p_w < 1:
        raise InputError(f"patch_size must be a whole number ≥ 1, or two of them; got {patch_size!r}")
    return p_h, p_w


def patch_grid(height: int, width: int, patch_size: PatchSize) -> tuple[int, int]:
    """Return (rows, columns) of patches in an image; raise InputError where the patches do not fill it."""
    p_h, p_w = patch_hw(patch_size)
    if height % p_h or width % p_w:
        raise InputError(
            f"images of {height}×{width} pixels do not divide into patches of {p_h}×{p_w}; resize or pad them"
        )
    return height // p_h, width // p_w


def patchify(images: Tensor, patch_size: PatchSize) -> Tensor:
    """Return tokens (R, n, C·p_h·p_w) for images (R, C, H, W)."""
    p_h, p_w = patch_hw(patch_size)
    rows, channels, height, width = images.shape
    n_y, n_x = patch_grid(height, width, (p_h, p_w))
    blocks = images.reshape(rows, channels, n_y, p_h, n_x, p_w).permute(0, 2, 4, 1, 3, 5)
    return blocks.reshape(rows, n_y * n_x, channels * p_h * p_w)


def unpatchify(tokens: Tensor, patch_size: PatchSize, height: int, width: int) -> Tensor:
    """Return images (R, C, H, W) for tokens (R, n, C·p_h·p_w): the inverse of `patchify`."""
    p_h, p_w = patch_hw(patch_size)
    n_y, n_x = patch_grid(height, width, (p_h, p_w))
    blocks = tokens.reshape(len(tokens), n_y, n_x, -1, p_h, p_w).permute(0, 3, 1, 4, 2, 5)
    return blocks.reshape(len(tokens), -1, height, width)
