"""tokens: embedded patches become the residual stream that blocks read.

    x[r] = prefix tokens, then patches[r] + position

R rows · n patches · k prefix tokens · N = k + n · C width.
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
    """The stream ahead of the first block.

    Args:
        patches: (R, n, C) embedded patches, without their bias.
        prefix: (k, C) class, distillation and register tokens.
        position: (n, C) is added to the patches, their bias included.
        squares: the sums of squares of x are returned too, as `linear` does.
        code_scale: x in e4m3 with these scales as well: `ops.fp8.Codes` take its place.

    Returns:
        x (R·N, C) in the patches' dtype, or (x, (R·N, parts) float32).
    """
    rows, count, width = patches.shape
    x = patches.new_empty(rows, len(prefix) + count, width)
    x[:, : len(prefix)] = prefix
    torch.add(patches, position, out=x[:, len(prefix) :])
    x = x.view(-1, width)
    made = x if code_scale is None else Codes(encode(x, code_scale), code_scale, x.dtype, x)
    return (made, row_squares(x)) if squares else made
