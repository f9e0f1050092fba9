"""row_rstd: what is left of a norm once its weights are folded into its neighbours: a scalar per row.

RMSNorm, or LayerNorm of rows whose mean is zero:  r = 1/√(mean(x²) + eps)
LayerNorm:                                         r = 1/√(var(x) + eps)

normalize: a norm that cannot be folded, ahead of the blocks or of queries and keys, and its frozen VJP:

    y = r·x ⊙ w + b,   g ← r·(w ⊙ g)      with M = I − 11ᵀ/C applied to x (`centres`: LayerNorm), and to y (`centred`:
                                          a centred stream starts behind it); in the VJP the same, transposed
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dave_fast.ops import _ext


@dataclass(frozen=True)
class RowSums:
    """1/σ of centred rows, not made yet: readers of the rows make it of the sums of squares that their writer left.

    Args:
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
    """x (..., C) -> r (...,), float32 (float64 for float64 rows).

    centred: rows have no mean to remove. squares: (..., parts) sums of squares of parts of each row, as `linear` gives
    them; what is centred is then not read again.
    """
    if centred and squares is not None:
        return RowSums(squares, x.shape[-1], eps).rstd()
    x = x if x.dtype == torch.float64 else x.float()
    variance = x.square().mean(-1) if centred else x.var(-1, correction=0)
    return (variance + eps).rsqrt_()


def row_rstd_native(x: Tensor, eps: float, *, centred: bool, squares: Tensor | None = None) -> Tensor:
    """`row_rstd_ref` for rows (T, C) in C++ on the host, one pass; float64 stays with PyTorch."""
    if x.dtype == torch.float64 or (centred and squares is not None):
        return row_rstd_ref(x, eps, centred=centred, squares=squares)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32)
    _ext.run_native("row_rstd", *_ext.coded(x), rstd.numel(), x.shape[-1], eps, centred, rstd)
    return rstd


def normalize_ref(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, centres: bool, centred: bool = False
) -> tuple[Tensor, Tensor]:
    """A whole norm.

    Args:
        x: (..., C), any strides.
        weight, bias: (C,) float32 (float64 for float64 rows).
        eps: is added to the variance.
        centres: LayerNorm; else RMSNorm.
        centred: whether the results' own means are removed.

    Returns:
        y of x's shape and dtype, contiguous; r (...,) float32 (float64), which `normalize_vjp` wants.
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
    """Frozen VJP of `normalize_ref`: the cotangent of y -> that of x, with r held constant; g's shape and dtype."""
    wide = g.to(weight.dtype)
    wide = (_remove_mean(wide) if centred else wide) * weight
    return ((_remove_mean(wide) if centres else wide) * rstd[..., None]).to(g.dtype)


def _remove_mean(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)
