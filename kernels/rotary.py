"""rotate: rotary position embedding of queries or keys, whose two halves are the coordinates that are rotated.

    y₁ = x₁·cos − x₂·sin,   y₂ = x₂·cos + x₁·sin          x₁, x₂: the two halves of a head

R rows · N tokens · H heads · T = R·N·H · HALF components, in blocks of BLOCK_D.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dave_fast.kernels import _launch
from dave_fast.ops.rotary import rotate_ref


@triton.jit
def _rotate_kernel(
    x, cos, sin, y, T, N, H, x_row, x_token, x_head, table_token, table_head,
    HALF: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rotate BLOCK_T of the T heads; the tables' strides of heads are zero where all heads share them."""
    t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    c = tl.arange(0, BLOCK_D)
    m = (t < T)[:, None] & (c < HALF)[None, :]
    i_token, i_head = t // H % N, t % H
    p_x = x + (t // (N * H) * x_row + i_token * x_token + i_head * x_head)[:, None] + c[None, :]
    o_table = (i_token * table_token + i_head * table_head)[:, None] + c[None, :]
    b_first = tl.load(p_x, mask=m, other=0.0).to(tl.float32)  # [BLOCK_T, BLOCK_D]
    b_second = tl.load(p_x + HALF, mask=m, other=0.0).to(tl.float32)
    b_cos, b_sin = tl.load(cos + o_table, mask=m, other=0.0), tl.load(sin + o_table, mask=m, other=0.0)
    p_y = y + (t * 2 * HALF)[:, None] + c[None, :]
    tl.store(p_y, (b_first * b_cos - b_second * b_sin).to(y.dtype.element_ty), mask=m)
    tl.store(p_y + HALF, (b_second * b_cos + b_first * b_sin).to(y.dtype.element_ty), mask=m)


def rotate_triton(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Run `rotate_ref` for heads whose last axis is contiguous."""
    if not _launch.covered(heads) or heads.stride(-1) != 1:
        return rotate_ref(heads, cos, sin)
    rows, tokens, count, dim = heads.shape
    y = torch.empty(heads.shape, dtype=heads.dtype, device=heads.device)
    block_t, block_d = _launch.row_blocks(dim // 2)
    total = rows * tokens * count
    _rotate_kernel[(triton.cdiv(total, block_t),)](
        *(heads, cos, sin, y, total, tokens, count, *heads.stride()[:3]),
        *(cos.stride(0), cos.stride(1) if cos.shape[1] > 1 else 0),
        HALF=dim // 2,
        BLOCK_T=block_t,
        BLOCK_D=block_d,
    )
    return y
