"""row_rstd: the one scalar a row that a norm still needs once its weights are folded into its neighbours.

RMSNorm, or LayerNorm of rows whose mean is zero:  r = 1/√(mean(x²) + eps)
LayerNorm:                                         r = 1/√(var(x) + eps)

normalize: a norm that cannot be folded, ahead of the blocks or of queries and keys, and its frozen VJP:

    y = r·x ⊙ w + b,   g ← r·(w ⊙ g)

M = I − 11ᵀ/D is applied to x in a LayerNorm (`centres`), and to y where a centred stream starts after the norm
(`centred`); the VJP applies it to the cotangents of both. D width of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dave_fast.ops import _ext


@dataclass(frozen=True)
class RowSums:
    """1/σ of centred rows, to be computed by their readers from sums of squares that their writer stored.

    Attributes:
        sums: (T, parts) float32, sums of squares of parts of each row.
        count: values of a row.
        eps: is added to the mean square.
    """

    sums: Tensor
    count: int
    eps: float

    def rstd(self) -> Tensor:
        """Return 1/√(Σ sums / count + eps), (T,) float32."""
        return (self.sums.sum(-1) / self.count + self.eps).rsqrt_()


def row_rstd_ref(x: Tensor, eps: float, *, centred: bool, squares: Tensor | None = None) -> Tensor:
    """Return r (...,) of rows x (..., D), in float32 (float64 for float64 rows).

    Args:
        x: (..., D) rows.
        eps: is added to the mean square.
        centred: whether the rows' means are zero already.
        squares: (..., parts) sums of squares of parts of each row, as `linear` returns them; centred rows are then not
            read again.
    """
    if centred and squares is not None:
        return RowSums(squares, x.shape[-1], eps).rstd()
    x = x if x.dtype == torch.float64 else x.float()
    variance = x.square().mean(-1) if centred else x.var(-1, correction=0)
    return (variance + eps).rsqrt_()


def row_rstd_native(x: Tensor, eps: float, *, centred: bool, squares: Tensor | None = None) -> Tensor:
    """Run `row_rstd_ref` for rows (T, D) in C++ on the host, in one pass; float64 is left to PyTorch."""
    if x.dtype == torch.float64 or (centred and squares is not None):
        return row_rstd_ref(x, eps, centred=centred, squares=squares)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32)
    _ext.run_native("row_rstd", x, rstd.numel(), x.shape[-1], eps, centred, rstd)
    return rstd


def normalize_ref(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, centres: bool, centred: bool = False
) -> tuple[Tensor, Tensor]:
    """Return a norm of x, and r for its VJP.

    Args:
        x: (..., D), any strides.
        weight: w (D,) float32 (float64 for float64 rows).
        bias: b (D,), as weight.
        eps: is added to the variance.
        centres: True for LayerNorm, False for RMSNorm.
        centred: whether the mean of each result is removed too.

    Returns:
        y of x's shape and dtype, contiguous; r (...,) float32 (float64), an argument of `normalize_vjp_ref`.
    """
    wide = x.to(weight.dtype)
    if centres and not centred:
        # one pass in PyTorch's own kernel
        y, _, rstd = torch.native_layer_norm(wide, wide.shape[-1:], weight, bias, eps)
        return y.to(x.dtype).contiguous(), rstd.squeeze(-1)
    rstd = row_rstd_ref(wide, eps, centred=not centres)
    y = (_remove_mean(wide) if centres else wide) * rstd[..., None] * weight + bias
    return (_remove_mean(y) if centred else y).to(x.dtype).contiguous(), rstd


def normalize_vjp_ref(g: Tensor, weight: Tensor, rstd: Tensor, *, centres: bool, centred: bool = False) -> Tensor:
    """Return the cotangent of x for g, that of y, with r held constant: the frozen VJP of `normalize_ref`."""
    wide = g.to(weight.dtype)
    wide = (_remove_mean(wide) if centred else wide) * weight
    return ((_remove_mean(wide) if centres else wide) * rstd[..., None]).to(g.dtype)


def _remove_mean(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)
