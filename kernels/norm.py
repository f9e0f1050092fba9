"""row_rstd: one scalar a row, of rows or of the partial sums of squares that `linear` left.

    r[t] = 1/√(mean_c x[t, c]² + eps)         centred, or from squares[t, part]
    r[t] = 1/√(mean_c (x[t, c] − mean)² + eps)  else, in two passes over registers

T rows · C columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dave_fast.kernels import _launch
from dave_fast.ops.norm import row_rstd_ref


@triton.jit
def _row_rstd_kernel(
    x, rstd, T, C, stride, count, eps, CENTRED: tl.constexpr, SQUARES: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """rstd (T,) of x (T, C), or with SQUARES of sums of squares (T, C) over `count` values a row."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.arange(0, BLOCK_C)
    m = (t < T)[:, None] & (c < C)[None, :]
    b = tl.load(x + t.to(tl.int64)[:, None] * stride + c[None, :], mask=m, other=0.0).to(tl.float32)  # [T, C]
    if not SQUARES:
        if not CENTRED:
            b = tl.where(m, b - (tl.sum(b, 1) / C)[:, None], 0.0)
        b *= b
    tl.store(rstd + t, tl.rsqrt(tl.sum(b, 1) / count + eps), mask=t < T)


def row_rstd_triton(x: Tensor, eps: float, *, centred: bool, squares: Tensor | None = None) -> Tensor:
    """As `row_rstd_ref` for rows (T, C)."""
    if not _launch.covered(x):
        return row_rstd_ref(x, eps, centred=centred, squares=squares)
    rstd = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    read = squares if centred and squares is not None else x
    T, C = read.shape
    block_c = triton.next_power_of_2(C)
    # about 4096 values a program
    block_t = max(1, min(128, 4096 // block_c))
    _row_rstd_kernel[(triton.cdiv(T, block_t),)](
        *(read, rstd, T, C, read.stride(0), x.shape[1], eps),
        CENTRED=centred,
        SQUARES=read is squares,
        BLOCK_T=block_t,
        BLOCK_C=block_c,
        num_warps=4,
    )
    return rstd
