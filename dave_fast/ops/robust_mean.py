"""robust_mean: the median/MAD-masked mean over the samples. DAVE, arXiv 2602.06613, Eq. 8 as its authors compute it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dave_fast.errors import InputError
from dave_fast.ops import _ext, _library, _registry
from dave_fast.ops.precision import statistics_dtype

READ = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# MAD of a normal distribution to its standard deviation; how many deviations are kept; what keeps a MAD of 0 apart
MAD_TO_SIGMA, KEPT_SIGMAS, EPSILON = 1.4826, 2.5, 1e-8


def robust_mean(contributions: Tensor, *, backend: str = "auto") -> Tensor:
    """The mean over the S samples of what lies near their median.

    med = lower median of c, mad = lower median of |c - med|; kept is |c - med| ≤ 2.5·(1.4826·mad + 1e-8).
    contributions: (B, S, ...) float32, float64, bfloat16 or float16.
    Returns raw (B, ...): float32, or float64 for float64 contributions. NaN where any of the S values is NaN, and
    where the median is infinite.
    """
    if torch.compiler.is_compiling():
        return _library.call("robust_mean", contributions, backend)
    if not isinstance(contributions, Tensor) or contributions.dtype not in READ:
        kind = getattr(contributions, "dtype", type(contributions).__name__)
        raise TypeError(f"contributions must be a tensor of one of {', '.join(map(str, READ))}; got {kind}")
    if contributions.ndim < 2 or contributions.shape[1] < 1:
        raise InputError(f"contributions must have the shape (B, S, ...), S ≥ 1; got {tuple(contributions.shape)}")
    run = _registry.bind("robust_mean", backend, contributions.device.type)
    raw: Tensor = run(contributions)
    return raw


def robust_mean_ref(contributions: Tensor) -> Tensor:
    """`robust_mean` in PyTorch, on any device."""
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
    contributions = contributions.contiguous()
    images, samples, *rest = contributions.shape
    raw = contributions.new_empty(images, *rest, dtype=statistics_dtype(contributions.dtype))
    run("robust_mean", *_ext.coded(contributions), images, samples, math.prod(rest), raw)
    return raw


def mean_of_kept(values: Tensor, kept: Tensor) -> Tensor:
    """Mean over dimension 0 of the values that are kept, summed in float64, sample by sample, and rounded once.

    float64 values are summed with their rounding error carried (Knuth's two-sum).
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
    # an infinite sum has no rounding error to carry
    total = total + torch.where(carry.isfinite(), carry, 0)
    return (total / kept.sum(0).clamp(min=1)).to(values.dtype)
