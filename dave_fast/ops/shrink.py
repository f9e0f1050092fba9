"""shrink: raw without what its own variance accounts for, so that few samples make no positive background of noise.

The ReLU of `smooth` turns the noise that is left in a mean into positive background: E[relu(m + σz)] > relu(m). Before
it, m is multiplied by an estimate of the share of m² around a pixel that is not noise (an empirical Wiener filter). For
S → ∞ the variance tends to 0, the factor to 1 and the map to that of DAVE, arXiv 2602.06613.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dave_fast.errors import InputError
from dave_fast.ops import _ext, _library, _registry
from dave_fast.ops.precision import COMPUTED, check_dtype
from dave_fast.ops.smooth import blur, gaussian_weights

# G: an 11×11 Gaussian of this σ, in pixels; csrc/shrink.h and csrc/blur.h have the same constants for C++ and CUDA
WINDOW_TAPS, WINDOW_SIGMA = 11, 1.5


def shrink(raw: Tensor, variance: Tensor, *, backend: str = "auto") -> Tensor:
    """Return raw times max(G*m² - G*variance, 0) / (G*m²), m = Σ_channels raw, G a Gaussian of σ = 1.5 pixels.

    Both windows are padded with zeros at the border, where they lose the same pixels; their ratio needs no weight. The
    factor is 0 where m is 0 in the whole window, and exactly 1 where the variance is 0 in it and m is not.

    Args:
        raw: (B, C, H, W) float32 or float64.
        variance: (B, H, W) float32 or float64, of m: `robust_mean_variance` has both.
        backend: "auto", or the name of one.

    Returns:
        raw (B, C, H, W) times a factor in [0, 1], the same for all channels of a pixel; the factor is computed in
        float64. A NaN makes its window NaN.

    Raises:
        TypeError: an argument is of another type.
        InputError: shapes or devices do not match.
    """
    if torch.compiler.is_compiling():
        return _library.call("shrink", raw, variance, backend)
    check_dtype("raw", raw, COMPUTED)
    check_dtype("variance", variance, COMPUTED)
    if raw.ndim != 4 or 0 in raw.shape[1:]:
        raise InputError(f"raw must have the shape (B, C, H, W), C, H and W ≥ 1; got {tuple(raw.shape)}")
    if variance.shape != raw.shape[:1] + raw.shape[2:]:
        raise InputError(
            f"variance must have the shape (B, H, W) of raw {tuple(raw.shape)}; got {tuple(variance.shape)}"
        )
    if variance.device != raw.device:
        raise InputError(f"variance is on {variance.device}, raw on {raw.device}; move them to one device")
    return _registry.run("shrink", backend, raw, variance)


def shrink_ref(raw: Tensor, variance: Tensor) -> Tensor:
    """Run `shrink` in PyTorch, on any device."""
    weights = gaussian_weights(WINDOW_TAPS, WINDOW_SIGMA)
    power = blur(raw.double().sum(dim=1) ** 2, weights)
    signal = (power - blur(variance.double(), weights)).clamp(min=0)
    factor = signal / torch.where(power == 0, 1, power)
    return raw * factor.to(raw.dtype)[:, None]


def shrink_native(raw: Tensor, variance: Tensor) -> Tensor:
    """Run `shrink` in C++ on the host."""
    return _compiled(_ext.run_native, raw, variance)


def shrink_cuda(raw: Tensor, variance: Tensor) -> Tensor:
    """Run `shrink` in CUDA C++ on raw's device."""
    return _compiled(_ext.run_cuda, raw, variance)


def _compiled(run: _ext.Run, raw: Tensor, variance: Tensor) -> Tensor:
    """Run `shrink` by `_ext.run_native` or `_ext.run_cuda`."""
    raw = raw.contiguous()
    shrunk = raw.new_empty(raw.shape)
    run("shrink", *_ext.coded(raw), raw.shape, variance.double().contiguous(), shrunk)
    return shrunk
