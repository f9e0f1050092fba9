"""perturb: x̃ = signal·τ(x) + noise·ε, cut into patches. DAVE, arXiv 2602.06613, Eq. 6 and 7."""

from __future__ import annotations

import torch
from torch import Tensor

from dave_fast.ops import _ext, _library, _registry, _warp
from dave_fast.ops.patches import PatchSize, patch_hw, patchify
from dave_fast.ops.precision import STORED, check_dtype
from dave_fast.sampling import Draws, normal


def perturb(
    images: Tensor, draws: Draws, patch_size: PatchSize, *, dtype: torch.dtype = torch.float32, backend: str = "auto"
) -> Tensor:
    """Return the perturbed input of every row as tokens: x̃ = signal·τ(x) + noise·ε.

    τ is bilinear with zeros outside: `draws.matrices` map a destination pixel (x, y) to its source position, with pixel
    centres at integers. ε is defined in float32 and widened; noise = 0 draws nothing.

    Args:
        images: (B, C, H, W) float32 or float64, contiguous; the arithmetic is that of its dtype.
        draws: R rows.
        patch_size: p or (p_h, p_w), which must divide (H, W); (H, W) itself makes one token, the image.
        dtype: of the tokens: float32, float64, bfloat16 or float16.
        backend: "auto", or the name of one.

    Returns:
        Tokens (R, n, C·p_h·p_w), each ordered (c, y, x).

    Raises:
        TypeError: images, draws or dtype are of another type.
        InputError: shapes do not match, or draws name images outside of the batch.
    """
    if torch.compiler.is_compiling():
        return _library.call("perturb", images, draws, *patch_hw(patch_size), dtype, backend)
    _warp.check_shapes(images, draws, patch_size)
    _warp.check_values(images, draws)
    check_dtype("dtype", dtype, STORED)
    return _registry.run("perturb", backend, images, draws, patch_size, dtype=dtype)


def perturb_ref(images: Tensor, draws: Draws, patch_size: PatchSize, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Run `perturb` in PyTorch, on any device."""
    _, channels, height, width = images.shape
    tokens = images.new_empty(_warp.tokens_shape(images, draws, patch_size), dtype=dtype)
    step = _warp.rows_a_chunk(images)
    for start in range(0, len(draws), step):
        part = draws[start : start + step]
        perturbed = part.signal.to(images).view(-1, 1, 1, 1) * warp(images[part.image_index.to(images.device)], part)
        if part.noise.any():
            deviates = normal(part.keys.to(images.device), part.samples.to(images.device), channels * height * width)
            perturbed = perturbed + part.noise.to(images).view(-1, 1, 1, 1) * deviates.view_as(perturbed)
        tokens[start : start + step] = patchify(perturbed, patch_size)
    return tokens


def perturb_native(
    images: Tensor, draws: Draws, patch_size: PatchSize, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Run `perturb` in C++ on the host."""
    return _compiled(_ext.run_native, images, draws, patch_size, dtype)


def perturb_cuda(images: Tensor, draws: Draws, patch_size: PatchSize, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Run `perturb` in CUDA C++ on images' device; draws that are there already cost no copy."""
    return _compiled(_ext.run_cuda, images, draws, patch_size, dtype)


def _compiled(run: _ext.Run, images: Tensor, draws: Draws, patch_size: PatchSize, dtype: torch.dtype) -> Tensor:
    """Run `perturb` by `_ext.run_native` or `_ext.run_cuda`."""
    images = images.contiguous()
    tokens = images.new_empty(_warp.tokens_shape(images, draws, patch_size), dtype=dtype)
    run("perturb", images, images.shape, draws, *patch_hw(patch_size), tokens)
    return tokens


def warp(images: Tensor, draws: Draws) -> Tensor:
    """Return τ(x) for images (R, C, H, W): y(p) = Σ_q x(q)·h(source_x(p) - q_x)·h(source_y(p) - q_y)."""
    x, y = _warp.source(draws.matrices.to(images), *_warp.pixels(images))
    left, top = x.floor(), y.floor()
    warped = torch.zeros_like(images)
    for q_y in (top, top + 1):
        for q_x in (left, left + 1):
            weight = _warp.tent(x - q_x) * _warp.tent(y - q_y)
            warped += weight[:, None] * _warp.take(images, q_x, q_y)
    return warped
