"""robust_mean: the median/MAD-masked mean over the samples. DAVE, arXiv 2602.06613, Eq. 8 as its authors compute it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dave_fast.errors import InputError
from dave_fast.ops import _ext, _library, _registry
from dave_fast.ops.precision import STORED, check_dtype, statistics_dtype

# The ratio of a normal distribution's standard deviation to its MAD; the deviations within which values are kept; what
# is added to the MAD, so that equal values are kept where it is 0.
MAD_TO_SIGMA, KEPT_SIGMAS, EPSILON = 1.4826, 2.5, 1e-8


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
    check_dtype("contributions", contributions, STORED)
    if contributions.ndim < 2 or contributions.shape[1] < 1:
        raise InputError(f"contributions must have the shape (B, S, ...), S ≥ 1; got {tuple(contributions.shape)}")
    return _registry.run("robust_mean", backend, contributions)


def robust_mean_ref(contributions: Tensor) -> Tensor:
    """Run `robust_mean` in PyTorch, on any device."""
    statistics = statistics_dtype(contributions.dtype)
    raw = contributions.new_empty(contributions.shape[:1] + contributions.shape[2:], dtype=statistics)
    for mean, one_image in zip(raw, contributions, strict=True):
        values = one_image.to(statistics)
        median = values.median(dim=0).values
        deviations = (values - median).abs()
        mad = deviations.median(dim=0).values
        kept = deviations <= KEPT_SIGMAS * (MAD_TO_SIGMA * mad + EPSILON)
        mean.copy_(torch.where(mad.isnan(), torch.nan, mean_of_kept(values, kept)))
    return raw


def robust_mean_native(contributions: Tensor) -> Tensor:
    """Run `robust_mean` in C++ on the host."""
    return _compiled(_ext.run_native, contributions)


def robust_mean_cuda(contributions: Tensor) -> Tensor:
    """Run `robust_mean` in CUDA C++ on the contributions' device."""
    return _compiled(_ext.run_cuda, contributions)


def _compiled(run: _ext.Run, contributions: Tensor) -> Tensor:
    """Run `robust_mean` by `_ext.run_native` or `_ext.run_cuda`."""
    contributions = contributions.contiguous()
    images, samples, *rest = contributions.shape
    raw = contributions.new_empty(images, *rest, dtype=statistics_dtype(contributions.dtype))
    run("robust_mean", *_ext.coded(contributions), images, samples, math.prod(rest), raw)
    return raw


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
