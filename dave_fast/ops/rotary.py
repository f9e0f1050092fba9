"""rotate: rotary position embedding of queries or keys, whose halves turn with each other.

    y₁ = x₁·cos − x₂·sin,   y₂ = x₂·cos + x₁·sin          x₁, x₂: the two halves of a head

(RoFormer, arXiv 2104.09864, Eq. 34.) It goes with P, which is frozen, so it has no VJP.
R rows · N tokens · heads · D head dimension.
"""

from __future__ import annotations

from torch import Tensor


def rotate_ref(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Every head turned by its token's angles.

    Args:
        heads: (R, N, heads, D), any strides.
        cos, sin: (N, heads or 1, D/2) float32 (float64 for float64 heads); 1 and 0 leave a token as it is.

    Returns:
        (R, N, heads, D) contiguous, in heads' dtype; computed in that of the tables.
    """
    turned = heads.new_empty(heads.shape)
    half = heads.shape[-1] // 2
    first, second = heads[..., :half].to(cos.dtype), heads[..., half:].to(cos.dtype)
    turned[..., :half] = first * cos - second * sin
    turned[..., half:] = second * cos + first * sin
    return turned
