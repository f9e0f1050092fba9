"""rotate: rotary position embedding of queries or keys, whose two halves are the coordinates that are rotated.

    y₁ = x₁·cos − x₂·sin,   y₂ = x₂·cos + x₁·sin          x₁, x₂: the two halves of a head

(RoFormer, arXiv 2104.09864, Eq. 34.) It only acts on P, which is held constant, so it has no VJP.
R rows · N tokens · heads · head_dim.
"""

from __future__ import annotations

from torch import Tensor


def rotate_ref(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return every head rotated by its token's angles.

    Args:
        heads: (R, N, heads, head_dim), any strides.
        cos: (N, heads or 1, head_dim/2) float32 (float64 for float64 heads); 1 leaves a token unchanged.
        sin: as cos; 0 leaves a token unchanged.

    Returns:
        (R, N, heads, head_dim) contiguous, in heads' dtype; computed in that of the tables.
    """
    turned = heads.new_empty(heads.shape)
    half = heads.shape[-1] // 2
    first, second = heads[..., :half].to(cos.dtype), heads[..., half:].to(cos.dtype)
    turned[..., :half] = first * cos - second * sin
    turned[..., half:] = second * cos + first * sin
    return turned
