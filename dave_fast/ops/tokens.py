"""assemble: the residual stream of prefix tokens and embedded patches.

    x[r] = prefix tokens, then patches[r] + position

R rows · n patches · N = prefix tokens + n · D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dave_fast.ops.fp8 import Codes, TokenScales, encode
from dave_fast.ops.linear import row_squares


def assemble_ref(
    patches: Tensor, prefix: Tensor, position: Tensor, *, squares: bool = False, code_scale: TokenScales | None = None
) -> Any:
    """Return the residual stream ahead of the first block.

    Args:
        patches: (R, n, D) embedded patches, without their bias.
        prefix: (N - n, D) class, distillation and register tokens.
        position: (n, D) position embedding of the patches, plus their bias.
        squares: whether the sums of squares of x are returned too, as `linear` returns them.
        code_scale: scales with which x is also encoded in e4m3; None for none.

    Returns:
        x (R·N, D) in the positions' dtype, or `ops.fp8.Codes` of it with a code_scale; with squares a pair of that and
        (R·N, parts) float32.
    """
    rows, count, width = patches.shape
    x = position.new_empty(rows, len(prefix) + count, width)
    x[:, : len(prefix)] = prefix
    torch.add(patches, position, out=x[:, len(prefix) :])
    x = x.view(-1, width)
    made = x if code_scale is None else Codes(encode(x, code_scale), code_scale, x.dtype, x)
    return (made, row_squares(x)) if squares else made
