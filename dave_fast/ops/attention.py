"""attention: softmax attention forward, and its frozen VJP.

    P = softmax(scale · q kᵀ + bias),   out = P v     per row and head
    dv = Pᵀ d_out                                     P is the operator, so q, k and the bias get no gradient

(DAVE, arXiv 2602.06613, Eq. 3-5.) R rows · Q queries · N tokens · heads · D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dave_fast.ops import _ext
from dave_fast.ops.precision import statistics_dtype

# up to this many keys a CPU keeps P, which costs less than computing it twice
KEEP_PROBABILITIES = 400
# queries that are handled together where P is not kept: memory stays linear in tokens
QUERY_BLOCK = 128


@dataclass(frozen=True)
class SavedAttention:
    """What the VJP needs: P itself where it is small, else what makes it again, exp(s − peak)·share.

    Peak and share, a query's largest score and 1/Σ exp(s − peak), are its log-sum-exp in two parts: one number of it
    would cost P digits.
    """

    scale: float
    probabilities: Tensor | None = None  # (R, heads, Q, N)
    q: Tensor | None = None  # (R, heads, Q, D)
    k: Tensor | None = None  # (R, heads, N, D)
    peak: Tensor | None = None  # (R, heads, Q, 1), the bias included
    share: Tensor | None = None  # (R, heads, Q, 1)
    bias: Tensor | None = None  # (heads, Q, N)


def attention_ref(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None
) -> tuple[Tensor, SavedAttention]:
    """Forward.

    Args:
        q: (R, Q, heads, D), any strides.
        k, v: (R, N, heads, D), any strides.
        scale: multiplies q kᵀ.
        bias: (heads, Q, N), finite, in q's dtype; added to the scores of every row: relative positions.

    Returns:
        out (R, Q, heads, D) contiguous, in q's dtype; what the VJP needs.
    """
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if k.shape[2] <= KEEP_PROBABILITIES:
        probabilities = _scores(q, k, scale, bias).softmax(-1, dtype=q.dtype)
        out = probabilities @ v
        return out.transpose(1, 2).contiguous(), SavedAttention(scale, probabilities)
    out = torch.empty(q.shape[:1] + q.shape[2:3] + q.shape[1:2] + q.shape[3:], dtype=q.dtype, device=q.device)
    peaks, shares = [], []
    for start in range(0, q.shape[2], QUERY_BLOCK):
        block = slice(start, start + QUERY_BLOCK)
        scores = _scores(q[:, :, block], k, scale, None if bias is None else bias[:, block])
        scores = scores.to(statistics_dtype(q.dtype))
        peaks.append(scores.amax(-1, keepdim=True))
        p = scores.sub_(peaks[-1]).exp_()
        shares.append(1 / p.sum(-1, keepdim=True))
        out[:, block] = (p.mul_(shares[-1]).to(q.dtype) @ v).transpose(1, 2)
    return out, SavedAttention(scale, None, q, k, torch.cat(peaks, dim=2), torch.cat(shares, dim=2), bias)


def attention_vjp_ref(saved: SavedAttention, d_out: Tensor) -> Tensor:
    """Frozen VJP: d_out (R, Q, heads, D) -> dv (R, N, heads, D) contiguous, in d_out's dtype."""
    d_out = d_out.transpose(1, 2)
    if saved.probabilities is not None:
        return (saved.probabilities.transpose(-1, -2) @ d_out).transpose(1, 2).contiguous()
    assert saved.q is not None and saved.k is not None and saved.peak is not None and saved.share is not None
    dv = torch.zeros(saved.k.shape, dtype=statistics_dtype(d_out.dtype), device=d_out.device)
    for start in range(0, saved.q.shape[2], QUERY_BLOCK):
        block = slice(start, start + QUERY_BLOCK)
        bias = None if saved.bias is None else saved.bias[:, block]
        scores = _scores(saved.q[:, :, block], saved.k, saved.scale, bias)
        p = (scores - saved.peak[:, :, block]).exp_().mul_(saved.share[:, :, block]).to(d_out.dtype)
        dv += p.transpose(-1, -2) @ d_out[:, :, block]
    return dv.to(d_out.dtype).transpose(1, 2).contiguous()


def attention_native(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None) -> tuple[Tensor, Any]:
    """`attention_ref` in C++ on the host, one (row, head) a task, nothing quadratic in memory above 400 tokens.

    float32, and bfloat16 where the CPU multiplies it; anything else stays with PyTorch.
    """
    rows, queries, heads, dim = q.shape
    bf16 = q.dtype == torch.bfloat16
    if not (q.dtype == torch.float32 or (bf16 and dim % 2 == 0 and _ext.module().multiplies_bfloat16())):
        return attention_ref(q, k, v, scale, bias)
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    shape = (rows, queries, k.shape[1], heads, dim)
    out = torch.empty(rows, queries, heads, dim, dtype=q.dtype)
    words = kept = None
    if shape[2] <= KEEP_PROBABILITIES:
        # a word holds one float, or bfloat16 of two queries
        words = torch.empty(rows, heads, -(-queries // (2 if bf16 else 1)), -(-shape[2] // 16) * 16, dtype=torch.int32)
    else:
        kept = torch.empty(2, rows, heads, queries, dtype=torch.float32)
    bias = None if bias is None else bias.contiguous()
    saved = SavedNative(shape, scale, words, None if words is not None else (q, k), kept, bias)
    operands = (*_view(q), *_view(k), *_view(v), out)
    _ext.run_native("attention", shape, scale, _ext.DTYPE_CODES[q.dtype], bias, *operands, kept, words, saved.stride)
    return out, saved


def attention_vjp_native(saved: Any, d_out: Tensor) -> Tensor:
    """`attention_vjp_ref` in C++ on the host, for what `attention_native` saved."""
    if not isinstance(saved, SavedNative):
        return attention_vjp_ref(saved, d_out)
    rows, _, tokens, heads, dim = saved.shape
    d_out = d_out if d_out.stride(-1) == 1 else d_out.contiguous()
    d_v = torch.empty(rows, tokens, heads, dim, dtype=d_out.dtype)
    q, k = saved.queries_keys or (d_out, d_out)
    _ext.run_native(
        "attention_vjp",
        *(saved.shape, saved.scale, _ext.DTYPE_CODES[d_out.dtype], saved.bias, *_view(q), *_view(k)),
        *(saved.peak_and_share, saved.words, saved.stride, *_view(d_out), d_v),
    )
    return d_v


@dataclass(frozen=True)
class SavedNative:
    """What the C++ VJP needs: P as words of 32 bits, else q and k and each query's peak and share.

    shape: (R, Q, N, heads, D) · words: (R, heads, ·, N rounded up to 16) int32 · peak_and_share: (2, R, heads, Q)
    float32 · bias: (heads, Q, N).
    """

    shape: tuple[int, int, int, int, int]
    scale: float
    words: Tensor | None
    queries_keys: tuple[Tensor, Tensor] | None
    peak_and_share: Tensor | None
    bias: Tensor | None

    @property
    def stride(self) -> int:
        """Words of one (row, head)."""
        return 0 if self.words is None else self.words.stride(1)


def _view(heads: Tensor) -> tuple[int, list[int]]:
    """Address and strides of (R, tokens, heads, D) with contiguous D."""
    return heads.data_ptr(), list(heads.stride()[:3])


def _scores(q: Tensor, k: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    scores = (q * scale) @ k.transpose(-1, -2)
    return scores if bias is None else scores.add_(bias)
