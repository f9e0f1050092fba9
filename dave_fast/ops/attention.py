"""attention: softmax attention forward, and its frozen VJP.

    P = softmax(scale · q kᵀ),   out = P v            per row and head
    dv = Pᵀ d_out                                     P is the operator, so q and k get no gradient

(DAVE, arXiv 2602.06613, Eq. 3-5.) R rows · Q queries · N tokens · heads · D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# up to this many keys a CPU keeps P, which costs less than computing it twice
KEEP_PROBABILITIES = 400
# queries that are handled together where P is not kept: memory stays linear in tokens
QUERY_BLOCK = 128


@dataclass(frozen=True)
class SavedAttention:
    """What the VJP needs: P itself where it is small, else q, k and each query's log-sum-exp."""

    scale: float
    probabilities: Tensor | None = None  # (R, heads, Q, N)
    q: Tensor | None = None  # (R, heads, Q, D)
    k: Tensor | None = None  # (R, heads, N, D)
    lse: Tensor | None = None  # (R, heads, Q, 1)


def attention_ref(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, SavedAttention]:
    """Forward.

    Args:
        q: (R, Q, heads, D), any strides.
        k, v: (R, N, heads, D), any strides.
        scale: multiplies q kᵀ.

    Returns:
        out (R, Q, heads, D) contiguous, in q's dtype; what the VJP needs.
    """
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if k.shape[2] <= KEEP_PROBABILITIES:
        probabilities = _scores(q, k, scale).softmax(-1, dtype=q.dtype)
        out = probabilities @ v
        return out.transpose(1, 2).contiguous(), SavedAttention(scale, probabilities)
    out = torch.empty(q.shape[:1] + q.shape[2:3] + q.shape[1:2] + q.shape[3:], dtype=q.dtype, device=q.device)
    lse = []
    for start in range(0, q.shape[2], QUERY_BLOCK):
        block = slice(start, start + QUERY_BLOCK)
        scores = _scores(q[:, :, block], k, scale)
        lse.append(scores.to(_statistics(q.dtype)).logsumexp(-1, keepdim=True))
        out[:, block] = ((scores - lse[-1]).exp_().to(q.dtype) @ v).transpose(1, 2)
    return out, SavedAttention(scale, None, q, k, torch.cat(lse, dim=2))


def attention_vjp_ref(saved: SavedAttention, d_out: Tensor) -> Tensor:
    """Frozen VJP: d_out (R, Q, heads, D) -> dv (R, N, heads, D) contiguous, in d_out's dtype."""
    d_out = d_out.transpose(1, 2)
    if saved.probabilities is not None:
        return (saved.probabilities.transpose(-1, -2) @ d_out).transpose(1, 2).contiguous()
    assert saved.q is not None and saved.k is not None and saved.lse is not None
    dv = torch.zeros(saved.k.shape, dtype=_statistics(d_out.dtype), device=d_out.device)
    for start in range(0, saved.q.shape[2], QUERY_BLOCK):
        block = slice(start, start + QUERY_BLOCK)
        scores = _scores(saved.q[:, :, block], saved.k, saved.scale)
        p = (scores - saved.lse[:, :, block]).exp_().to(d_out.dtype)
        dv += p.transpose(-1, -2) @ d_out[:, :, block]
    return dv.to(d_out.dtype).transpose(1, 2).contiguous()


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return (q * scale) @ k.transpose(-1, -2)


def _statistics(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
