"""shrink: the channel sum without what its own variance accounts for, so that few samples make no background of noise.

The ReLU of `smooth` turns the noise that is left in a mean into positive background: E[relu(m + σz)] > relu(m). Before
it, m and its fine detail are multiplied by an estimate of the share of their power around a pixel that is not noise
(empirical Wiener filters). For S → ∞ the variance tends to 0, the factors to 1 and the map to that of DAVE,
arXiv 2602.06613.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dave_fast.errors import InputError
from dave_fast.ops import _ext, _library, _registry
from dave_fast.ops.precision import COMPUTED, check_images, check_tensor
from dave_fast.ops.smooth import blur, gaussian_weights

# σ in pixels and taps of the local mean μ, and σ of the windows in which power is compared with variance, which end at
# 3σ; csrc/shrink.h has the same constants for C++ and CUDA
MEAN_SIGMA, MEAN_TAPS = 1.0, 9
POWER_SIGMA = 5.0


def shrink(raw: Tensor, variance: Tensor, *, backend: str = "auto") -> Tensor:
    """Return (μ + d·max(1 - V/(G*d²), 0))·max(1 - V/(G*m²), 0), what is left of the channel sum m = Σ_channels raw.

    μ is the local mean of m, by a Gaussian of σ = 1 pixel over the part of its window inside of the image; d = m - μ;
    G is a Gaussian of σ = 5 pixels and V = G*variance. Power and variance are padded with zeros at the border, where
    they lose the same pixels: their ratio needs no weight.

    Args:
        raw: (B, C, H, W) float32 or float64.
        variance: (B, H, W) float32 or float64, of m: `robust_mean_variance` has both.
        backend: "auto", or the name of one.

    Returns:
        (B, 1, H, W) of raw's dtype, computed in float64: with its sign, for `smooth`. A factor is 0 where there is no
        power in the window. Without variance it is m to rounding. A NaN makes all NaN that its windows reach.

    Raises:
        TypeError: an argument is of another type.
        InputError: shapes or devices do not match.
    """
    if torch.compiler.is_compiling():
        return _library.call("shrink", raw, variance, backend)
    check(raw, variance)
    return _registry.run("shrink", backend, raw, variance)


def check(raw: Tensor, variance: Tensor) -> None:
    """Raise TypeError or InputError where a map and its variance do not match."""
    check_images("raw", raw)
    check_tensor("variance", variance, COMPUTED)
    if variance.shape != raw.shape[:1] + raw.shape[2:]:
        raise InputError(
            f"variance must have the shape (B, H, W) of raw {tuple(raw.shape)}; got {tuple(variance.shape)}"
        )
    if variance.device != raw.device:
        raise InputError(f"variance is on {variance.device}, raw on {raw.device}; move them to one device")


def shrink_ref(raw: Tensor, variance: Tensor, power_sigma: float = POWER_SIGMA) -> Tensor:
    """Run `shrink` in PyTorch, on any device; with windows of another size for comparisons."""
    window = gaussian_weights(2 * math.ceil(3 * power_sigma) + 1, power_sigma)
    m = raw.double().sum(dim=1)
    mean = gaussian_weights(MEAN_TAPS, MEAN_SIGMA)
    local = blur(m, mean) / blur(torch.ones_like(m), mean)
    noise = blur(variance.double(), window)
    detail = m - local
    shrunk = (local + detail * _share_of_signal(detail, noise, window)) * _share_of_signal(m, noise, window)
    return shrunk.to(raw.dtype)[:, None]


def _share_of_signal(values: Tensor, noise: Tensor, window: list[float]) -> Tensor:
    """Return max(1 - noise/(G*values²), 0) of values and noise (B, H, W); 0 where there is no power."""
    power = blur(values**2, window)
    return (power - noise).clamp(min=0) / torch.where(power == 0, 1, power)


def shrink_native(raw: Tensor, variance: Tensor) -> Tensor:
    """Run `shrink` in C++ on the host."""
    raw = raw.contiguous()
    shrunk = raw.new_empty(raw[:, :1].shape)
    _ext.run_native("shrink", variance.double().contiguous(), raw, raw.shape, shrunk)
    return shrunk


def shrink_cuda(raw: Tensor, variance: Tensor) -> Tensor:
    """Run `shrink` in CUDA C++ on raw's device."""
    raw = raw.contiguous()
    shrunk = raw.new_empty(raw[:, :1].shape)
    # the channel sum and its detail
    scratch = raw.new_empty(2 * shrunk.numel(), dtype=torch.float64)
    _ext.run_cuda("shrink", variance.double().contiguous(), raw, raw.shape, scratch, shrunk)
    return shrunk
