"""robust_mean: the median/MAD-masked mean over the samples. DAVE, arXiv 2602.06613, Eq. 8 as its authors compute it.

robust_mean_variance: the same, and how far the sum over channels of that mean is expected to be from its limit.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dave_fast.errors import InputError
from dave_fast.ops import _ext, _library, _registry
from dave_fast.ops.precision import STORED, check_tensor, statistics_dtype

# The ratio of a normal distribution's standard deviation to its MAD; the deviations within which values are kept; what
# is added to the MAD, so that equal values are kept where it is 0.
MAD_TO_SIGMA, KEPT_SIGMAS, EPSILON = 1.4826, 2.5, 1e-8
# Kernels number the values of a sorting network in 32 bits; csrc/arguments.h has the same constant.
MOST_SAMPLES = 1 << 26


def robust_mean(contributions: Tensor, *, backend: str = "auto") -> Tensor:
    """Return the mean over the S samples of the values that lie near their median.

    med is the lower median of c and mad the lower median of |c - med|; values with |c - med| ≤ 2.5·(1.4826·mad + 1e-8)
    are kept.

    Args:
        contributions: (B, S, ...) float32, float64, bfloat16 or float16.
        backend: "auto", or the name of one.

    Returns:
        raw (B, ...) float32, or float64 for float64 contributions; NaN where any of the S values is NaN, and where the
        median is infinite.

    Raises:
        TypeError: the contributions are of another type.
        InputError: there is no sample.
    """
    if torch.compiler.is_compiling():
        return _library.call("robust_mean", contributions, backend)
    check(contributions)
    return _registry.run("robust_mean", backend, contributions)


def robust_mean_variance(contributions: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Return the robust mean, and the variance of its sum over the channels as the samples themselves tell it.

    With c_s the contributions of sample s, keep what the robust mean keeps of them and n̄ the number kept, averaged over
    the channels: variance = Σ_s (Σ_channels keep·(c_s - raw))² / (n̄·(n̄ - 1)), and 0 where n̄ is 1.

    Where nothing is left out it is unbiased. What the mask leaves out makes the kept samples lie closer together, and
    the mean vary more: of normal samples it is about 0.57, 0.65, 0.74, 0.78 and, for S → ∞, 0.83 of the true variance
    at S = 8, 16, 32, 64.

    Args:
        contributions: (B, S, C, ...) float32, float64, bfloat16 or float16.
        backend: "auto", or the name of one.

    Returns:
        raw (B, C, ...), bit for bit that of `robust_mean`, and the variance (B, ...) float64, NaN where raw is NaN in
        any channel. Squares of float32 values need the range of float64.

    Raises:
        TypeError: the contributions are of another type.
        InputError: there is no sample or no channel.
    """
    if torch.compiler.is_compiling():
        return _library.call("robust_mean_variance", contributions, backend)
    check_channels(contributions)
    return _registry.run("robust_mean_variance", backend, contributions)


def check(contributions: Tensor) -> None:
    """Raise TypeError or InputError where there is no (B, S, ...) to take a mean of."""
    check_tensor("contributions", contributions, STORED)
    if contributions.ndim < 2 or not 1 <= contributions.shape[1] < MOST_SAMPLES:
        shape = tuple(contributions.shape)
        raise InputError(f"contributions must have the shape (B, S, ...), S ≥ 1 and below 2²⁶; got {shape}")


def check_channels(contributions: Tensor) -> None:
    """Raise TypeError or InputError where there is no (B, S, C, ...) to take a mean of."""
    check_tensor("contributions", contributions, STORED)
    if contributions.ndim < 3 or not 1 <= contributions.shape[1] < MOST_SAMPLES or not contributions.shape[2]:
        shape = tuple(contributions.shape)
        raise InputError(f"contributions must have the shape (B, S, C, ...), S and C ≥ 1, S below 2²⁶; got {shape}")


def robust_mean_ref(contributions: Tensor) -> Tensor:
    """Run `robust_mean` in PyTorch, on any device."""
    raw = _raw_like(contributions)
    for mean, one_image in zip(raw, contributions, strict=True):
        values = one_image.to(raw.dtype)
        mean.copy_(mean_and_kept(values)[0])
    return raw


def robust_mean_variance_ref(contributions: Tensor) -> tuple[Tensor, Tensor]:
    """Run `robust_mean_variance` in PyTorch, on any device."""
    raw = _raw_like(contributions)
    variance = variance_like(raw)
    for mean, spread, one_image in zip(raw, variance, contributions, strict=True):
        values = one_image.to(raw.dtype)
        found, kept = mean_and_kept(values)
        mean.copy_(found)
        spread.copy_(variance_of_sum(values, kept, found))
    return raw, variance


def robust_mean_native(contributions: Tensor) -> Tensor:
    """Run `robust_mean` in C++ on the host."""
    return _compiled(_ext.run_native, contributions)


def robust_mean_cuda(contributions: Tensor) -> Tensor:
    """Run `robust_mean` in CUDA C++ on the contributions' device."""
    return _compiled(_ext.run_cuda, contributions)


def robust_mean_variance_native(contributions: Tensor) -> tuple[Tensor, Tensor]:
    """Run `robust_mean_variance` in C++ on the host."""
    contributions = contributions.contiguous()
    raw = _raw_like(contributions)
    variance = variance_like(raw)
    _ext.run_native("robust_mean_variance", *_sizes(contributions), raw, variance)
    return raw, variance


def robust_mean_variance_cuda(contributions: Tensor) -> tuple[Tensor, Tensor]:
    """Run `robust_mean_variance` in CUDA C++ on the contributions' device."""
    contributions = contributions.contiguous()
    raw = _raw_like(contributions)
    variance = variance_like(raw)
    # the median and the threshold of every mean
    scratch = raw.new_empty(2 * raw.numel())
    _ext.run_cuda("robust_mean_variance", *_sizes(contributions), scratch, raw, variance)
    return raw, variance


def _sizes(contributions: Tensor) -> tuple[Any, ...]:
    """Return a compiled kernel's arguments for contributions (B, S, C, ...)."""
    images, samples, channels, *rest = contributions.shape
    return contributions, images, samples, channels, math.prod(rest)


def variance_like(raw: Tensor) -> Tensor:
    """Return memory for the variance (B, ...) of raw (B, C, ...)."""
    return raw.new_empty(raw.shape[:1] + raw.shape[2:], dtype=torch.float64)


def _raw_like(contributions: Tensor) -> Tensor:
    """Return memory for raw (B, ...)."""
    shape = contributions.shape[:1] + contributions.shape[2:]
    return contributions.new_empty(shape, dtype=statistics_dtype(contributions.dtype))


def _compiled(run: _ext.Run, contributions: Tensor) -> Tensor:
    """Run `robust_mean` by `_ext.run_native` or `_ext.run_cuda`."""
    contributions = contributions.contiguous()
    images, samples, *rest = contributions.shape
    raw = _raw_like(contributions)
    run("robust_mean", contributions, images, samples, math.prod(rest), raw)
    return raw


def mean_and_kept(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the robust mean over dimension 0, and which values (S, ...) it keeps."""
    median = values.median(dim=0).values
    deviations = (values - median).abs()
    mad = deviations.median(dim=0).values
    kept = deviations <= KEPT_SIGMAS * (MAD_TO_SIGMA * mad + EPSILON)
    return torch.where(mad.isnan(), torch.nan, mean_of_kept(values, kept)), kept


def mean_of_kept(values: Tensor, kept: Tensor) -> Tensor:
    """Return the mean over dimension 0 of the kept values, summed in float64, sample by sample, and rounded once.

    Sums of float64 values carry their rounding error (Knuth's two-sum).
    """
    total = torch.zeros_like(values[0], dtype=torch.float64)
    carry = torch.zeros_like(total)
    for value, keep in zip(values, kept, strict=True):
        addend = torch.where(keep, value.double(), 0)
        grown = total + addend
        if values.dtype == torch.float64:
            back = grown - total
            carry += (total - (grown - back)) + (addend - back)
        total = grown
    # The rounding error of an infinite sum is NaN.
    total = total + torch.where(carry.isfinite(), carry, 0)
    return (total / kept.sum(0).clamp(min=1)).to(values.dtype)


def variance_of_sum(values: Tensor, kept: Tensor, mean: Tensor) -> Tensor:
    """Return the variance (...) float64 of the channel sum of a mean (C, ...) of the kept of values (S, C, ...).

    Deviations and their sum over the channels, in order, are in the values' dtype; squares and their sum, sample by
    sample, are in float64.
    """
    squares = torch.zeros_like(mean[0], dtype=torch.float64)
    for value, keep in zip(values, kept, strict=True):
        deviations = torch.where(keep, value - mean, 0)
        in_all = deviations[0]
        for deviation in deviations[1:]:
            in_all = in_all + deviation
        squares += in_all.double() ** 2
    number = kept.sum(dim=(0, 1)).double() / len(mean)
    variance = torch.where(number <= 1, 0, squares / (number * (number - 1)))
    return torch.where(mean.isnan().any(dim=0), torch.nan, variance)
