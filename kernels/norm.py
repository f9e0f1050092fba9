"""row_rstd: one scalar a row, from the row or from the partial sums of squares that `linear` returned.

    r[t] = 1/√(mean_d x[t, d]² + eps)           for centred rows, or from squares[t, part]
    r[t] = 1/√(mean_d (x[t, d] − mean)² + eps)  otherwise, in two passes over registers

normalize: a whole norm, and its frozen VJP, M = I − 11ᵀ/D:

    y = [M] (r·([M] x) ⊙ w + b)               g ← r·[M] (w ⊙ [M] g)

T rows · D width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dave_fast.kernels import _launch
from dave_fast.ops.norm import normalize_ref, normalize_vjp_ref, row_rstd_ref


@triton.jit
def _remove_mean(b, m, D):
    """Return rows b without their means, zero outside of m."""
    return tl.where(m, b - (tl.sum(b, 1) / D)[:, None], 0.0)


@triton.jit
def _row_rstd_kernel(
    x, rstd, T, D, stride, count, eps, CENTRED: tl.constexpr, SQUARES: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute rstd (T,) of x (T, D), or with SQUARES of sums of squares (T, D) over `count` values a row."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.arange(0, BLOCK_D)
    m = (t < T)[:, None] & (d < D)[None, :]
    b = tl.load(x + t.to(tl.int64)[:, None] * stride + d[None, :], mask=m, other=0.0).to(tl.float32)  # [T, D]
    if not SQUARES:
        if not CENTRED:
            b = _remove_mean(b, m, D)
        b *= b
    tl.store(rstd + t, tl.rsqrt(tl.sum(b, 1) / count + eps), mask=t < T)


def row_rstd_triton(x: Tensor, eps: float, *, centred: bool, squares: Tensor | None = None) -> Tensor:
    """Run `row_rstd_ref` for rows (T, D)."""
    if not _launch.covered(x):
        return row_rstd_ref(x, eps, centred=centred, squares=squares)
    rstd = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    read = squares if centred and squares is not None else x
    T, D = read.shape
    block_t, block_d = _launch.row_blocks(D)
    _row_rstd_kernel[(triton.cdiv(T, block_t),)](
        *(read, rstd, T, D, read.stride(0), x.shape[1], eps),
        CENTRED=centred,
        SQUARES=read is squares,
        BLOCK_T=block_t,
        BLOCK_D=block_d,
    )
    return rstd


@triton.jit
def _normalize_kernel(
    x, weight, bias, rstd, y, T, N, H, D, x_row, x_token, x_head, eps,
    CENTRES: tl.constexpr, CENTRED: tl.constexpr, VJP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute y (T, D) of x (T / (N·H), N, H, D), whole rows a program; rstd is written, and read in the VJP."""
    t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    m = (t < T)[:, None] & (d < D)[None, :]
    start = t // (N * H) * x_row + t // H % N * x_token + t % H * x_head
    b = tl.load(x + start[:, None] + d[None, :], mask=m, other=0.0).to(tl.float32)  # [BLOCK_T, BLOCK_D]
    w = tl.load(weight + d, mask=d < D, other=0.0)[None, :]
    if VJP:
        r = tl.load(rstd + t, mask=t < T, other=0.0)
        b = (_remove_mean(b, m, D) if CENTRED else b) * w
        b = (_remove_mean(b, m, D) if CENTRES else b) * r[:, None]
    else:
        b = _remove_mean(b, m, D) if CENTRES else b
        r = tl.rsqrt(tl.sum(b * b, 1) / D + eps)
        tl.store(rstd + t, r, mask=t < T)
        b = b * r[:, None] * w + tl.load(bias + d, mask=d < D, other=0.0)[None, :]
        b = _remove_mean(b, m, D) if CENTRED else b
    tl.store(y + t[:, None] * D + d[None, :], b.to(y.dtype.element_ty), mask=m)


def normalize_triton(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, centres: bool, centred: bool = False
) -> tuple[Tensor, Tensor]:
    """Run `normalize_ref` for x (T, D) or (R, N, heads, D) whose last axis is contiguous."""
    if not _launch.covered(x):
        return normalize_ref(x, weight, bias, eps, centres=centres, centred=centred)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    return _normalize(x, weight, bias, rstd, eps, centres, centred, vjp=False), rstd


def normalize_vjp_triton(g: Tensor, weight: Tensor, rstd: Tensor, *, centres: bool, centred: bool = False) -> Tensor:
    """Run `normalize_vjp_ref` for g (T, D) or (R, N, heads, D) whose last axis is contiguous."""
    if not _launch.covered(g):
        return normalize_vjp_ref(g, weight, rstd, centres=centres, centred=centred)
    return _normalize(g, weight, weight, rstd, 0.0, centres, centred, vjp=True)


def _normalize(
    x: Tensor, weight: Tensor, bias: Tensor, rstd: Tensor, eps: float, centres: bool, centred: bool, *, vjp: bool
) -> Tensor:
    heads = x if x.ndim == 4 else x[None, :, None]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block_t, block_d = _launch.row_blocks(x.shape[-1])
    _normalize_kernel[(triton.cdiv(rstd.numel(), block_t),)](
        *(x, weight, bias, rstd, y, rstd.numel(), *heads.shape[1:], *heads.stride()[:3], eps),
        CENTRES=centres,
        CENTRED=centred,
        VJP=vjp,
        BLOCK_T=block_t,
        BLOCK_D=block_d,
    )
    return y
