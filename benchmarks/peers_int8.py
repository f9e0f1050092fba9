"""The peers' product in eight-bit integers: PyTorch's own, by oneDNN, and its gradient, explicitly by a second one.

Rows of x are quantised as they come, each with its own scale, as torchao's dynamic quantisation does; the compiler
fuses that into what stands ahead of the product, and the scales into what follows it. The product is an operator of its
own, because the compiler takes no weights in oneDNN's layout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LARGEST = 127.0
# oneDNN multiplies bytes without a sign hundreds of times as fast as those with one
ZERO = 128
# weights in oneDNN's layout, each with its scales and zero points, by number
_PACKED: list[tuple[Tensor, Tensor, Tensor]] = []


def packed(matrix: Tensor) -> int:
    """Pack matrix (O, I) with a scale for each row, and return its number."""
    scale = matrix.abs().amax(1).clamp(min=1e-12) / LARGEST
    codes = (matrix / scale[:, None]).round().to(torch.int8)
    zeros = torch.zeros(len(matrix), dtype=torch.int64)
    _PACKED.append((torch.ops.onednn.qlinear_prepack(codes, None), scale, zeros))
    return len(_PACKED) - 1


@torch.library.custom_op("dave_fast_peers::product", mutates_args=())
def product(codes: Tensor, number: int, dtype: torch.dtype) -> Tensor:
    """Return (codes − 128)·Ŵᵀ (T, O) of codes (T, I) uint8 and a packed weight, in float32 or bfloat16."""
    weight, scale, zeros = _PACKED[number]
    return torch.ops.onednn.qlinear_pointwise(
        codes, 1.0, ZERO, weight, scale, zeros, None, 1.0, 0, dtype, "none", [], ""
    )


@product.register_fake
def _(codes: Tensor, number: int, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(len(codes), len(_PACKED[number][1]), dtype=dtype)


class Integers(torch.autograd.Function):
    """The product x Wᵀ + b and its gradient g W, both with operands of eight-bit integers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, forward: int, back: int) -> Tensor:
        """Return x Wᵀ + b."""
        ctx.back = back
        return _rounded_product(x, forward, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        """Return the gradient of x."""
        return _rounded_product(g, ctx.back, None), None, None, None


def _rounded_product(x: Tensor, number: int, bias: Tensor | None) -> Tensor:
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True).clamp(min=1e-12) / LARGEST
    codes = ((wide / scale).round() + ZERO).to(torch.uint8)
    y = product(codes, number, x.dtype).float() * scale
    return (y if bias is None else y + bias).to(x.dtype)
