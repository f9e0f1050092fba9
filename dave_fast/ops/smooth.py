"""smooth: from signed contributions to a map in [0, 1].

The post-processing of DAVE, arXiv 2602.06613, as its authors compute it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dave_fast.ops import _ext, _library, _registry
from dave_fast.ops.precision import check_images

# csrc/smooth.h has the same constants for C++ and CUDA
BLUR_TAPS, BLUR_SIGMA = 11, 7.0
BILATERAL_TAPS, SPATIAL_SIGMA, RANGE_SIGMA = 5, 0.5, 0.05


def smooth(raw: Tensor, *, backend: str = "auto") -> Tensor:
    """Return maps to look at: channel sum, ReLU, ½·(m + G(m)), bilateral filter, divided by the image's maximum.

    G is a normalised 11×11 Gaussian of σ = 7; the bilateral filter is 5×5 with spatial σ = 0.5 and range σ = 0.05.
    Both are padded with zeros, which take part in the bilateral sums. The range σ acts on the map *before* the division
    by its maximum, so the amount of smoothing depends on the scale of the logits: maps of small values are blurred,
    maps of large values keep their edges.

    Args:
        raw: (B, C, H, W) float32 or float64.
        backend: "auto", or the name of one.

    Returns:
        Maps (B, H, W) of raw's dtype, in [0, 1] with maximum 1. A map without a positive value is all zero; a NaN
        anywhere in an image makes its whole map NaN.

    Raises:
        TypeError: raw is of another type.
        InputError: raw is of another shape.
    """
    if torch.compiler.is_compiling():
        return _library.call("smooth", raw, backend)
    check_images("raw", raw)
    return _registry.run("smooth", backend, raw)


def smooth_ref(raw: Tensor) -> Tensor:
    """Run `smooth` in PyTorch, on any device."""
    positive = raw.sum(dim=1).relu()
    blended = 0.5 * (positive + blur(positive, gaussian_weights(BLUR_TAPS, BLUR_SIGMA)))
    filtered = bilateral(blended)
    peak = filtered.amax(dim=(1, 2), keepdim=True)
    return filtered / torch.where(peak == 0, 1, peak)


def signed_map(signed: Tensor) -> Tensor:
    """Return maps with two signs for looking at: ½·(s + G(s)) of `smooth`, divided by the largest magnitude.

    Args:
        signed: (..., H, W), of any sign.

    Returns:
        (..., H, W) in [-1, 1]; a map of zeros stays zero.
    """
    flat = signed.reshape(-1, *signed.shape[-2:])
    blended = 0.5 * (flat + blur(flat, gaussian_weights(BLUR_TAPS, BLUR_SIGMA)))
    peak = blended.abs().amax(dim=(1, 2), keepdim=True)
    return (blended / torch.where(peak == 0, 1, peak)).reshape(signed.shape)


def smooth_native(raw: Tensor) -> Tensor:
    """Run `smooth` in C++ on the host."""
    raw = raw.contiguous()
    maps = raw.new_empty(len(raw), *raw.shape[2:])
    _ext.run_native("smooth", raw, raw.shape, maps)
    return maps


def smooth_cuda(raw: Tensor) -> Tensor:
    """Run `smooth` in CUDA C++ on raw's device."""
    raw = raw.contiguous()
    images, _, height, width = raw.shape
    maps = raw.new_empty(images, height, width)
    # the blended maps, and the maximum of each image
    scratch = raw.new_empty(images * (height * width + 1))
    _ext.run_cuda("smooth", raw, raw.shape, scratch, maps)
    return maps


def gaussian_weights(taps: int, sigma: float) -> list[float]:
    """Return the normalised weights of one axis of a Gaussian; the square kernel is their outer product."""
    offsets = range(-(taps // 2), taps // 2 + 1)
    weights = torch.tensor([-0.5 * (k / sigma) ** 2 for k in offsets], dtype=torch.float64).exp()
    return (weights / weights.sum()).tolist()


def blur(maps: Tensor, weights: list[float]) -> Tensor:
    """Return maps (B, H, W) padded with zeros and convolved with the weights, one axis after the other."""
    for axis in (1, 2):
        taps = _neighbours(maps, len(weights) // 2, axis)
        maps = sum((w * tap for w, tap in zip(weights, taps, strict=True)), torch.zeros_like(maps))
    return maps


def bilateral(maps: Tensor) -> Tensor:
    """Return Σ w·m(q) / Σ w over the 5×5 neighbours q of each pixel p of maps (B, H, W).

    w = exp(-|p - q|²/2σ_s² - (m(p) - m(q))²/2σ_r²).
    """
    radius = BILATERAL_TAPS // 2
    total, weights = torch.zeros_like(maps), torch.zeros_like(maps)
    for dy, row in enumerate(_neighbours(maps, radius, 1), start=-radius):
        for dx, value in enumerate(_neighbours(row, radius, 2), start=-radius):
            distance = (dx * dx + dy * dy) / (2 * SPATIAL_SIGMA**2)
            weight = torch.exp(-distance - (maps - value) ** 2 * (0.5 / RANGE_SIGMA**2))
            total += weight * value
            weights += weight
    return total / weights


def _neighbours(maps: Tensor, radius: int, axis: int) -> list[Tensor]:
    """Return the maps shifted by -radius … radius along an axis, padded with zeros."""
    pad = (radius, radius) if axis == 2 else (0, 0, radius, radius)
    padded = torch.nn.functional.pad(maps, pad)
    return [padded.narrow(axis, k, maps.shape[axis]) for k in range(2 * radius + 1)]
