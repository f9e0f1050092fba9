"""What a plan's tail computes in C++, for float32 on a CPU: a row has the same bits in any batch, with any threads.

PyTorch multiplies by MKL and oneDNN, which choose the order of a sum by the number of rows, of threads, and by where
operands lie in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dave_fast.ops.activation import activate_native
from dave_fast.ops.attention import attention_native, attention_vjp_native
from dave_fast.ops.linear import NativeWeight, linear_native, pack_panels

# rows of which products with a matrix of activations are summed one by one: a copy of the matrix for each
FEW_ROWS = 4


class TailForms:
    """Forms of PyTorch's products with a tail's own matrices, attention and GELU; other operands are left to PyTorch.

    Args:
        tail: the module, of this engine alone.

    Attributes:
        forms: function of PyTorch -> the same function, for `frozen.mode.FrozenMode`.
    """

    def __init__(self, tail: nn.Module) -> None:
        own = [p for p in tail.parameters() if _fits(p) and p.numel()]
        # what lies in the memory of a parameter is a part of it, or its transpose
        self._own = {parameter.untyped_storage().data_ptr() for parameter in own}
        self._packed: dict[Any, tuple[int, NativeWeight, NativeWeight]] = {}
        self.forms: dict[Callable[..., Any], Callable[..., Any]] = {
            F.linear: self._linear,
            F.scaled_dot_product_attention: _attention,
            torch.bmm: _products_of_few_rows,
            F.gelu: _gelu,
            **{function: self._matmul(function) for function in (torch.matmul, Tensor.matmul, Tensor.__matmul__)},
        }

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if not self._takes(input, weight) or (bias is not None and bias.requires_grad):
            return F.linear(input, weight, bias)
        product: Tensor = _Product.apply(input, *self._pack(weight), bias)
        return product

    def _matmul(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def multiply(x: Any, other: Any) -> Any:
            if isinstance(x, Tensor) and isinstance(other, Tensor) and self._takes(x, other):
                return self._linear(x, other.T)
            return function(x, other)

        return multiply

    def _takes(self, x: Tensor, matrix: Tensor) -> bool:
        own = matrix.untyped_storage().data_ptr() in self._own
        return own and matrix.ndim == 2 and _fits(matrix) and not matrix.requires_grad and _fits(x) and x.numel() > 0

    def _pack(self, weight: Tensor) -> tuple[NativeWeight, NativeWeight]:
        """Return a matrix (O, I) packed for x Wᵀ and for g W, once for each of its versions."""
        key = weight.data_ptr(), weight.shape, weight.stride()
        found = self._packed.get(key)
        if found is None or found[0] != weight._version:
            found = weight._version, pack_panels(weight, "fp32"), pack_panels(weight.T, "fp32")
            self._packed[key] = found
        return found[1:]


def _fits(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu"


class _Product(torch.autograd.Function):
    """x Wᵀ + b of x (..., I), and g W of its cotangent."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: NativeWeight, transposed: NativeWeight, bias: Tensor | None) -> Tensor:
        ctx.transposed = transposed
        return _of_rows(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        return _of_rows(g, ctx.transposed, None), None, None, None


def _of_rows(x: Tensor, weight: NativeWeight, bias: Tensor | None) -> Tensor:
    y: Tensor = linear_native(x.reshape(-1, x.shape[-1]), weight, bias)
    return y.view(*x.shape[:-1], -1)


def _gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """Run F.gelu, of which PyTorch computes the last few values, and so a row's, by other functions than the rest."""
    if not _fits(input) or input.requires_grad or not input.ndim:
        return F.gelu(input, approximate=approximate)
    u = input.clone(memory_format=torch.contiguous_format)
    return activate_native(u.view(-1, u.shape[-1]), "gelu" if approximate == "none" else "gelu_tanh")[0].view_as(input)


def _products_of_few_rows(a: Tensor, b: Tensor) -> Tensor:
    """Run torch.bmm of (B, q, n) and (B, n, m), where rows q are few, as they are where nn.MultiheadAttention pools."""
    if a.ndim != 3 or a.shape[1] > FEW_ROWS or not (_fits(a) and _fits(b)):
        return torch.bmm(a, b)
    return (a[..., None] * b[:, None]).sum(2)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Run F.scaled_dot_product_attention (R, heads, tokens, head_dim) with q and k held constant."""
    plain = attn_mask is None and not (dropout_p or is_causal or enable_gqa)
    alike = value.shape == key.shape and query.ndim == 4 and query.shape[:2] == key.shape[:2] and key.numel() > 0
    frozen = not query.requires_grad and not key.requires_grad
    if not (plain and alike and frozen and all(map(_fits, (query, key, value)))):
        more: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **more)
    attended: Tensor = _Attention.apply(query, key, value, query.shape[-1] ** -0.5 if scale is None else scale)
    return attended


class _Attention(torch.autograd.Function):
    """P v of heads (R, heads, tokens, head_dim), and Pᵀ g of its cotangent."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (query, key, value))
        out, ctx.operators = attention_native(q, k, v, scale)
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, None, Tensor, None]:
        return None, None, attention_vjp_native(ctx.operators, g.transpose(1, 2)).transpose(1, 2), None
