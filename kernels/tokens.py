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
from dave_fast.ops.tokens import assemble_ref


@triton.jit
def _assemble_kernel(patches, prefix, position, x, squares, T, N, K, C, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
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
    if squares is not None:
        b = stored.to(tl.float32)
        tl.store(squares + t, tl.sum(b * b, 1), mask=t < T)


def assemble_triton(patches: Tensor, prefix: Tensor, position: Tensor, *, squares: bool = False) -> Any:
    """As `assemble_ref`, for contiguous tensors."""
    if not _launch.covered(patches):
        return assemble_ref(patches, prefix, position, squares=squares)
    rows, count, width = patches.shape
    tokens = len(prefix) + count
    x = torch.empty(rows * tokens, width, dtype=patches.dtype, device=patches.device)
    sums = torch.empty(len(x), 1, dtype=torch.float32, device=x.device) if squares else None
    block_t, block_c = _launch.row_blocks(width)
    _assemble_kernel[(triton.cdiv(len(x), block_t),)](
        *(patches, prefix, position, x, sums, len(x), tokens, len(prefix), width),
        BLOCK_T=block_t,
        BLOCK_C=block_c,
    )
    return (x, sums) if squares else x
