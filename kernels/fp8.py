"""linear with e4m3 operands, multiplied by `linear`'s kernel with scales in its epilogue.

An x that its producer stored in e4m3 (`ops.fp8.Codes`) is read directly. Any other is quantised row by row first:

    s[t] = max_i |x[t, i]| / 448        codes[t, i] = e4m3(x[t, i] / s[t])
    y[t, o] = row_scale[t] · s[t] · s_w[o] · Σ_i codes[t, i] codes_w[o, i] + …

T rows · I in-features. One program quantises a row; its second read of the row comes from the L1.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dave_fast.kernels import _launch
from dave_fast.kernels._linear import nearest_e4m3
from dave_fast.kernels.linear import linear_triton
from dave_fast.ops.fp8 import E4M3, LARGEST, Codes, Fp8Weight
from dave_fast.ops.norm import RowSums

# The most numbers that a program loads at once.
WIDEST = 4096


@triton.jit
def _quantise_kernel(
    x, row_scale, codes, scale, I, stride_x,
    LARGEST: tl.constexpr, TINY: tl.constexpr, BLOCK_I: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Compute codes and scale[t] = s[t] · row_scale[t], which is not finite where x[t] is not."""
    t = tl.program_id(0).to(tl.int64)
    o_i = tl.arange(0, BLOCK_I)
    most = tl.zeros((BLOCK_I,), dtype=tl.float32)
    for i in range(0, I, BLOCK_I):
        b_x = tl.load(x + t * stride_x + i + o_i, mask=o_i < I - i, other=0.0).to(tl.float32)  # [BLOCK_I]
        most = tl.maximum(most, tl.abs(b_x), propagate_nan=tl.PropagateNan.ALL)
    s = tl.maximum(tl.div_rn(tl.max(most, 0), LARGEST), TINY)
    # A reduction may drop NaN.
    s = tl.where(tl.max((most != most).to(tl.int32), 0) > 0, float("nan"), s)
    for i in range(0, I, BLOCK_I):
        m = o_i < I - i
        b_x = tl.load(x + t * stride_x + i + o_i, mask=m, other=0.0).to(tl.float32)  # [BLOCK_I]
        u = tl.minimum(tl.maximum(tl.div_rn(b_x, s), -LARGEST), LARGEST)
        if INTERPRETED:
            u = nearest_e4m3(u)
        tl.store(codes + t * I + i + o_i, u.to(codes.dtype.element_ty), mask=m)
    if row_scale is not None:
        s *= tl.load(row_scale + t)
    tl.store(scale + t, s)


def quantise_triton(x: Tensor, row_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Run `ops.fp8.quantise` for x (T, I), with row_scale (T,) multiplied into the scales."""
    x = x if x.stride(1) == 1 else x.contiguous()
    T, I = x.shape
    codes = torch.empty(T, I, dtype=E4M3, device=x.device)
    scale = torch.empty(T, dtype=torch.float32, device=x.device)
    _quantise_kernel[(T,)](
        *(x, row_scale, codes, scale, I, x.stride(0)),
        LARGEST=LARGEST,
        TINY=torch.finfo(torch.float32).tiny,
        BLOCK_I=min(WIDEST, triton.next_power_of_2(I)),
        INTERPRETED=_launch.INTERPRETED,
        num_warps=4,
    )
    return codes, scale


def linear_fp8_triton(
    x: Tensor | Codes,
    weight: Fp8Weight,
    bias: Tensor | None = None,
    *,
    row_scale: Tensor | RowSums | None = None,
    **epilogue: Any,
) -> Any:
    """Run `linear_fp8_ref`; gates in [0, 1] are stored in eight bits. Only an x without codes needs a second launch."""
    epilogue |= {"column_scale": weight.scale, "dtype": x.dtype}
    if isinstance(x, Codes):
        return linear_triton(x.values, weight.codes, bias, row_scale=row_scale, x_scale=x.scale, **epilogue)
    codes, scale = quantise_triton(x, row_scale.rstd() if isinstance(row_scale, RowSums) else row_scale)
    return linear_triton(codes, weight.codes, bias, row_scale=scale, **epilogue)
