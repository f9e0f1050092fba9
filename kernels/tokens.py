"""assemble: the residual stream of prefix tokens, patches and positions, with its rows' sums of squares.

    x[r, i] = prefix[i] for i < PREFIX,  patches[r, i − PREFIX] + position[i − PREFIX] otherwise

R rows · N tokens, the first PREFIX of which are prefix tokens · D width.
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
    patches, prefix, position, x, codes, squares, T, N, PREFIX, D, code_lead, code_rest, code_read,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Compute BLOCK_T of the T = R·N tokens."""
    t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    row, token = t // N, t % N
    m = (t < T)[:, None] & (d < D)[None, :]
    is_patch = (token >= PREFIX)[:, None]
    o_patch = (row * (N - PREFIX) + token - PREFIX)[:, None] * D + d[None, :]
    b = tl.load(patches + o_patch, mask=m & is_patch, other=0.0).to(tl.float32)  # [BLOCK_T, BLOCK_D]
    b += tl.load(position + (token - PREFIX)[:, None] * D + d[None, :], mask=m & is_patch, other=0.0).to(tl.float32)
    b += tl.load(prefix + token[:, None] * D + d[None, :], mask=m & (token < PREFIX)[:, None], other=0.0).to(tl.float32)
    stored = b.to(x.dtype.element_ty)
    tl.store(x + t[:, None] * D + d[None, :], stored, mask=m)
    if codes is not None:
        scale = tl.where(token < code_read, code_lead, code_rest)[:, None]
        tl.store(codes + t[:, None] * D + d[None, :], encode_e4m3(b, scale, INTERPRETED), mask=m)
    if squares is not None:
        b = stored.to(tl.float32)
        tl.store(squares + t, tl.sum(b * b, 1), mask=t < T)


def assemble_triton(
    patches: Tensor, prefix: Tensor, position: Tensor, *, squares: bool = False, code_scale: TokenScales | None = None
) -> Any:
    """Run `assemble_ref` for contiguous tensors."""
    if not _launch.covered(patches):
        return assemble_ref(patches, prefix, position, squares=squares, code_scale=code_scale)
    rows, count, width = patches.shape
    tokens = len(prefix) + count
    x = torch.empty(rows * tokens, width, dtype=patches.dtype, device=patches.device)
    sums = torch.empty(len(x), 1, dtype=torch.float32, device=x.device) if squares else None
    codes = None if code_scale is None else torch.empty(x.shape, dtype=E4M3, device=x.device)
    block_t, block_d = _launch.row_blocks(width)
    _assemble_kernel[(triton.cdiv(len(x), block_t),)](
        *(patches, prefix, position, x, codes, sums, len(x), tokens, len(prefix), width),
        *_launch.scale_arguments(code_scale),
        BLOCK_T=block_t,
        BLOCK_D=block_d,
        INTERPRETED=_launch.INTERPRETED,
    )
    made = x if codes is None else Codes(codes, code_scale, x.dtype, x)
    return (made, sums) if squares else made
