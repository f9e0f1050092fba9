"""tokens: prefix tokens, patches and positions become the residual stream, with its rows' sums of squares.

    x[r, i] = prefix[i] for i < k,  patches[r, i − k] + position[i − k] behind

R rows · N = k + n tokens · C width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dave_fast.kernels import _launch
from dave_fast.kernels._linear import encode_e4m3
from dave_fast.ops.fp8 import E4M3, Codes, TokenScales
from dave_fast.ops.tokens import assemble_ref


@triton.jit
def _assemble_kernel(
    patches, prefix, position, x, codes, squares, T, N, K, C, code_lead, code_rest, code_read,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """BLOCK_T of the T = R·N tokens, each whole."""
    t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    row, token = t // N, t % N
    m = (t < T)[:, None] & (c < C)[None, :]
    is_patch = (token >= K)[:, None]
    o_patch = (row * (N - K) + token - K)[:, None] * C + c[None, :]
    b = tl.load(patches + o_patch, mask=m & is_patch, other=0.0).to(tl.float32)  # [BLOCK_T, BLOCK_C]
    b += tl.load(position + (token - K)[:, None] * C + c[None, :], mask=m & is_patch, other=0.0).to(tl.float32)
    b += tl.load(prefix + token[:, None] * C + c[None, :], mask=m & (token < K)[:, None], other=0.0).to(tl.float32)
    stored = b.to(x.dtype.element_ty)
    tl.store(x + t[:, None] * C + c[None, :], stored, mask=m)
    if codes is not None:
        scale = tl.where(token < code_read, code_lead, code_rest)[:, None]
        tl.store(codes + t[:, None] * C + c[None, :], encode_e4m3(b, scale, INTERPRETED), mask=m)
    if squares is not None:
        b = stored.to(tl.float32)
        tl.store(squares + t, tl.sum(b * b, 1), mask=t < T)


def assemble_triton(
    patches: Tensor, prefix: Tensor, position: Tensor, *, squares: bool = False, code_scale: TokenScales | None = None
) -> Any:
    """As `assemble_ref`, for contiguous tensors."""
    if not _launch.covered(patches):
        return assemble_ref(patches, prefix, position, squares=squares, code_scale=code_scale)
    rows, count, width = patches.shape
    tokens = len(prefix) + count
    x = torch.empty(rows * tokens, width, dtype=patches.dtype, device=patches.device)
    sums = torch.empty(len(x), 1, dtype=torch.float32, device=x.device) if squares else None
    codes = None if code_scale is None else torch.empty(x.shape, dtype=E4M3, device=x.device)
    code_arguments = (None,) * 3 if code_scale is None else (code_scale.lead, code_scale.rest, code_scale.read)
    block_t, block_c = _launch.row_blocks(width)
    _assemble_kernel[(triton.cdiv(len(x), block_t),)](
        *(patches, prefix, position, x, codes, sums, len(x), tokens, len(prefix), width, *code_arguments),
        BLOCK_T=block_t,
        BLOCK_C=block_c,
        INTERPRETED=_launch.INTERPRETED,
    )
    made = x if codes is None else Codes(codes, code_scale, x.dtype, x)
    return (made, sums) if squares else made
