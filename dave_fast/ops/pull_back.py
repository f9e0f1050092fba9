"""pull_back: signal·τᵀ(un-patchify(g)) ⊙ image, the adjoint of perturb's signal part.

DAVE, arXiv 2602.06613, Eq. 6-8.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dave_fast.errors import InputError
from dave_fast.ops import _ext, _library, _registry, _warp
from dave_fast.ops.patches import PatchSize, patch_hw, unpatchify
from dave_fast.ops.precision import STORED, check_dtype, check_tensor
from dave_fast.sampling import Draws


def pull_back(
    token_cotangents: Tensor,
    images: Tensor,
    draws: Draws,
    patch_size: PatchSize,
    *,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return the contribution of every row: signal · τᵀ(un-patchify(g)) ⊙ image.

    Args:
        token_cotangents: g (R, n, C·p_h·p_w) float32, float64, bfloat16 or float16, laid out as `perturb`'s tokens.
        images: (B, C, H, W) float32 or float64, contiguous; the arithmetic is that of its dtype.
        draws: the R rows that the tokens were made from.
        patch_size: p or (p_h, p_w).
        dtype: of the contributions: float32, float64, bfloat16 or float16; None takes that of the images.
        backend: "auto", or the name of one.

    Returns:
        Contributions (R, C, H, W).

    Raises:
        TypeError: an argument is of another type.
        InputError: shapes or devices do not match.
    """
    if torch.compiler.is_compiling():
        return _library.call("pull_back", token_cotangents, images, draws, *patch_hw(patch_size), dtype, backend)
    check(token_cotangents, images, draws, patch_size)
    if dtype is not None:
        check_dtype("dtype", dtype, STORED)
    return _registry.run("pull_back", backend, token_cotangents, images, draws, patch_size, dtype=dtype)


def check(token_cotangents: Tensor, images: Tensor, draws: Draws, patch_size: PatchSize) -> None:
    """Raise TypeError or InputError where cotangents, images and draws do not match."""
    check_shapes(token_cotangents, images, draws, patch_size)
    _warp.check_values(images, draws)
    check_inverses(draws, images.device)


def check_inverses(draws: Draws, device: torch.device) -> None:
    """Raise InputError where matrices have no inverse and no kernel says so: a CPU's forms invert them themselves."""
    if device.type != "cpu":
        invert(draws.matrices)


def check_shapes(token_cotangents: Tensor, images: Tensor, draws: Draws, patch_size: PatchSize) -> None:
    """Do what `check` does without reading a value of a tensor."""
    expected = _warp.check_shapes(images, draws, patch_size)
    check_tensor("token_cotangents", token_cotangents, STORED)
    if tuple(token_cotangents.shape) != expected:
        raise InputError(f"token_cotangents must have the shape {expected}; got {tuple(token_cotangents.shape)}")
    if token_cotangents.device != images.device:
        raise InputError(
            f"token_cotangents are on {token_cotangents.device}, images on {images.device}; move them to one device"
        )


def pull_back_ref(
    token_cotangents: Tensor, images: Tensor, draws: Draws, patch_size: PatchSize, *, dtype: torch.dtype | None = None
) -> Tensor:
    """Run `pull_back` in PyTorch, on any device."""
    contributions = images.new_empty(len(draws), *images.shape[1:], dtype=dtype or images.dtype)
    step = _warp.rows_a_chunk(images)
    for start in range(0, len(draws), step):
        part = slice(start, start + step)
        contributions[part] = contributions_of(token_cotangents[part], images, draws[part], patch_size)
    return contributions


def contributions_of(
    token_cotangents: Tensor, images: Tensor, draws: Draws, patch_size: PatchSize, rows: slice = slice(None)
) -> Tensor:
    """Return the contributions (R, C, rows of pixels, W) of all draws at once."""
    cotangents = unpatchify(token_cotangents.to(images.dtype), patch_size, *images.shape[2:])
    image = images[draws.image_index.to(images.device), :, rows]
    return draws.signal.to(images).view(-1, 1, 1, 1) * adjoint_warp(cotangents, draws, rows) * image


def pull_back_native(
    token_cotangents: Tensor, images: Tensor, draws: Draws, patch_size: PatchSize, *, dtype: torch.dtype | None = None
) -> Tensor:
    """Run `pull_back` in C++ on the host."""
    return _compiled(_ext.run_native, token_cotangents, images, draws, patch_size, dtype)


def pull_back_cuda(
    token_cotangents: Tensor, images: Tensor, draws: Draws, patch_size: PatchSize, *, dtype: torch.dtype | None = None
) -> Tensor:
    """Run `pull_back` in CUDA C++ on images' device."""
    return _compiled(_ext.run_cuda, token_cotangents, images, draws, patch_size, dtype)


def _compiled(
    run: _ext.Run,
    token_cotangents: Tensor,
    images: Tensor,
    draws: Draws,
    patch_size: PatchSize,
    dtype: torch.dtype | None,
) -> Tensor:
    """Run `pull_back` by `_ext.run_native` or `_ext.run_cuda`."""
    images = images.contiguous()
    contributions = images.new_empty(len(draws), *images.shape[1:], dtype=dtype or images.dtype)
    given = cotangents_and_images(token_cotangents, images, draws)
    run("pull_back", *given, draws, *patch_hw(patch_size), contributions)
    return contributions


def cotangents_and_images(token_cotangents: Tensor, images: Tensor, draws: Draws) -> tuple[Any, ...]:
    """Return a compiled kernel's arguments for cotangents and images; raise InputError for cotangents of other rows."""
    if token_cotangents.numel() != len(draws) * images[0].numel():
        shape = tuple(token_cotangents.shape)
        raise InputError(f"token_cotangents of shape {shape} do not match the {len(draws)} rows of the draws")
    return token_cotangents.contiguous(), images, images.shape


def adjoint_warp(cotangents: Tensor, draws: Draws, rows: slice = slice(None)) -> Tensor:
    """Return τᵀ(g), with (τᵀg)(q) = Σ_p g(p)·h(source_x(p) - q_x)·h(source_y(p) - q_y).

    This is a gather: the destinations p that see a source pixel q lie in an open parallelogram around the inverse map
    of q, whose half extents are the L1 row norms r of the inverse; so ceil(2·r) candidates an axis include them all.

    Args:
        cotangents: g (R, C, H, W).
        draws: R rows.
        rows: the rows of source pixels q that are wanted.

    Returns:
        (R, C, rows of pixels, W), in the dtype of the cotangents.
    """
    backward = invert(draws.matrices)
    reach = backward[:, :, :2].abs().sum(-1)
    matrices = draws.matrices.to(cotangents)
    height, width = cotangents.shape[2:]
    x, y = _warp.pixels(cotangents)
    y = y[:, rows]
    centre_x, centre_y = _warp.source(backward.to(cotangents), x, y)
    half = reach.to(cotangents)[:, :, None, None]
    # no more candidates than pixels, and none before the first one
    first_x = (centre_x - half[:, 0]).clamp(-1, width - 1).floor() + 1
    first_y = (centre_y - half[:, 1]).clamp(-1, height - 1).floor() + 1
    # Each row has a count of its own, so that its bits and NaNs do not depend on the other rows of the batch.
    counts = (2 * reach).ceil().to(cotangents.device)[:, :, None, None]
    pulled = cotangents.new_zeros(*cotangents.shape[:2], *centre_x.shape[1:])
    for j in range(_candidates(reach[:, 1], height)):
        for i in range(_candidates(reach[:, 0], width)):
            # beyond a row's count the destination is one outside of the image, which is read as 0
            p_x, p_y = torch.where((i < counts[:, 0]) & (j < counts[:, 1]), first_x + i, -1), first_y + j
            source_x, source_y = _warp.source(matrices, p_x, p_y)
            weight = _warp.tent(source_x - x) * _warp.tent(source_y - y)
            pulled += weight[:, None] * _warp.take(cotangents, p_x, p_y)
    return pulled


def invert(matrices: Tensor) -> Tensor:
    """Return the inverse maps as `inverse` does; raise InputError where there is none, or none to compute with."""
    backward = inverse(matrices)
    if not _warp.is_bounded(backward):
        raise InputError("draws.matrices must be invertible, with inverses of at most 2⁶⁰")
    return backward


def inverse(matrices: Tensor) -> Tensor:
    """Return the inverse maps (R, 2, 3), source → destination, of invertible ones without a device synchronisation."""
    a, b, c, d = matrices[:, :, :2].flatten(1).unbind(1)
    linear = torch.stack([d, -b, -c, a], dim=1).view(-1, 2, 2) / (a * d - b * c)[:, None, None]
    offset = -(linear * matrices[:, None, :, 2]).sum(-1, keepdim=True)
    return torch.cat([linear, offset], dim=-1)


def _candidates(reach: Tensor, size: int) -> int:
    return min(math.ceil(2 * float(reach.max())), size) if len(reach) else 0
