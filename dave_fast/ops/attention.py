"""attention: softmax attention forward, and its frozen VJP.

    P = softmax(scale · q kᵀ + bias),   out = P v     per row and head
    dv = Pᵀ d_out                                     P is held constant: q, k and the bias get no gradient

(DAVE, arXiv 2602.06613, Eq. 3-5.) R rows · Q queries · N tokens · heads · head_dim · P attention probabilities.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dave_fast.errors import BackendError
from dave_fast.ops import _ext
from dave_fast.ops.precision import statistics_dtype

# Up to this many keys a CPU stores P, which costs less than computing it twice.
KEEP_PROBABILITIES = 400
# Queries in a block where P is not stored, so that memory is linear in tokens.
QUERY_BLOCK = 128


@dataclass(frozen=True)
class SavedAttention:
    """The forward's results that the VJP needs: P itself where it is small, else the parts of exp(s − peak)·share.

    Peak and share, a query's largest score and 1/Σ exp(s − peak), are its log-sum-exp in two parts: as a single number
    it would cost P digits.

    Attributes:
        scale: multiplies q kᵀ.
        bias: (heads, Q, N), or None.
        probabilities: P (R, heads, Q, N), or None.
        parts: q (R, heads, Q, head_dim), k (R, heads, N, head_dim), peak (R, heads, Q, 1), the bias included, and share
            (R, heads, Q, 1); None where P is stored.
    """

    scale: float
    bias: Tensor | None
    probabilities: Tensor | None = None
    parts: tuple[Tensor, Tensor, Tensor, Tensor] | None = None


def attention_ref(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None
) -> tuple[Tensor, SavedAttention]:
    """Return softmax attention, and what its VJP needs.

    Args:
        q: (R, Q, heads, head_dim), any strides.
        k: (R, N, heads, head_dim), any strides.
        v: (R, N, heads, head_dim), any strides.
        scale: multiplies q kᵀ.
        bias: (heads, Q, N), finite, in q's dtype; added to the scores of every row: relative positions.

    Returns:
        out (R, Q, heads, head_dim) contiguous, in q's dtype; the argument `saved` of the VJP.
    """
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if k.shape[2] <= KEEP_PROBABILITIES:
        probabilities = _scores(q, k, scale, bias).softmax(-1, dtype=q.dtype)
        out = probabilities @ v
        return out.transpose(1, 2).contiguous(), SavedAttention(scale, None, probabilities)
    out = torch.empty(q.shape[:1] + q.shape[2:3] + q.shape[1:2] + q.shape[3:], dtype=q.dtype, device=q.device)
    peaks, shares = [], []
    for start in range(0, q.shape[2], QUERY_BLOCK):
        block = slice(start, start + QUERY_BLOCK)
        scores = _scores(q, k, scale, bias, block).to(statistics_dtype(q.dtype))
        peaks.append(scores.amax(-1, keepdim=True))
        p = scores.sub_(peaks[-1]).exp_()
        shares.append(1 / p.sum(-1, keepdim=True))
        out[:, block] = (p.mul_(shares[-1]).to(q.dtype) @ v).transpose(1, 2)
    return out, SavedAttention(scale, bias, parts=(q, k, torch.cat(peaks, dim=2), torch.cat(shares, dim=2)))


def attention_vjp_ref(saved: SavedAttention, d_out: Tensor) -> Tensor:
    """Return dv (R, N, heads, head_dim), contiguous, for d_out (R, Q, heads, head_dim) of the same dtype."""
    d_out = d_out.transpose(1, 2)
    if saved.probabilities is not None:
        return (saved.probabilities.transpose(-1, -2) @ d_out).transpose(1, 2).contiguous()
    assert saved.parts is not None
    q, k, peak, share = saved.parts
    dv = torch.zeros(k.shape, dtype=statistics_dtype(d_out.dtype), device=d_out.device)
    for start in range(0, q.shape[2], QUERY_BLOCK):
        block = slice(start, start + QUERY_BLOCK)
        scores = _scores(q, k, saved.scale, saved.bias, block)
        p = (scores - peak[:, :, block]).exp_().mul_(share[:, :, block]).to(d_out.dtype)
        dv += p.transpose(-1, -2) @ d_out[:, :, block]
    return dv.to(d_out.dtype).transpose(1, 2).contiguous()


def attention_native(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None) -> tuple[Tensor, Any]:
    """Run `attention_ref` in C++ on the host, one (row, head) a task; above 400 tokens memory is linear in them.

    It takes float32, and bfloat16 for heads of even width; any other dtype is left to PyTorch.

    Raises:
        BackendError: an operand has another dtype or shape than `attention_ref` names: C++ would read past it.
    """
    _check_operand("q", q, q.dtype, (*q.shape[:2], *k.shape[2:]))
    rows, queries, heads, dim = q.shape
    _check_operand("k", k, q.dtype, (rows, *k.shape[1:2], heads, dim))
    _check_operand("v", v, q.dtype, (rows, *k.shape[1:2], heads, dim))
    if bias is not None:
        _check_operand("bias", bias, q.dtype, (heads, queries, k.shape[1]))
    bf16 = q.dtype == torch.bfloat16
    if not (q.dtype == torch.float32 or (bf16 and dim % 2 == 0)):
        return attention_ref(q, k, v, scale, bias)
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    # bfloat16 queries are read two at a time
    if bf16 and (q.data_ptr() % 4 or any(stride % 2 for stride in q.stride()[:3])):
        q = q.clone(memory_format=torch.contiguous_format)
    shape = (rows, queries, k.shape[1], heads, dim)
    out = torch.empty(rows, queries, heads, dim, dtype=q.dtype)
    stored = shape[2] <= KEEP_PROBABILITIES
    # A word is one float, or the bfloat16 of two queries.
    lines = -(-queries // (2 if bf16 else 1)) if stored else 0
    words = torch.empty(rows, heads, lines, -(-shape[2] // 16) * 16, dtype=torch.int32)
    kept = torch.empty(2, rows, heads, 0 if stored else queries, dtype=torch.float32)
    saved = SavedNative(
        *(shape, q.dtype, scale, words, None if stored else (q, k), kept),
        None if bias is None else bias.contiguous(),
    )
    operands = (*_view(q), *_view(k), *_view(v), out, kept, words)
    _ext.run_native("attention", shape, scale, saved.bias, *operands)
    return out, saved


def attention_vjp_native(saved: Any, d_out: Tensor) -> Tensor:
    """Run `attention_vjp_ref` in C++ on the host, for what `attention_native` saved."""
    if not isinstance(saved, SavedNative):
        return attention_vjp_ref(saved, d_out)
    rows, queries, tokens, heads, dim = saved.shape
    _check_operand("d_out", d_out, saved.dtype, (rows, queries, heads, dim))
    d_out = d_out if d_out.stride(-1) == 1 else d_out.contiguous()
    d_v = torch.empty(rows, tokens, heads, dim, dtype=d_out.dtype)
    q, k = saved.queries_keys or (d_out, d_out)
    _ext.run_native(
        "attention_vjp",
        *(saved.shape, saved.scale, saved.bias, *_view(q), *_view(k)),
        *(saved.peak_and_share, saved.words, *_view(d_out), d_v),
    )
    return d_v


@dataclass(frozen=True)
class SavedNative:
    """The forward's results that the C++ VJP needs: P as words of 32 bits, else q, k, and each query's peak and share.

    Attributes:
        shape: (R, Q, N, heads, head_dim).
        dtype: of the operands.
        scale: multiplies q kᵀ.
        words: P, int32 (R, heads, ·, N rounded up to 16); empty where it is not stored.
        queries_keys: q and k as they were given, None where P is stored.
        peak_and_share: (2, R, heads, Q) float32, empty where P is stored.
        bias: (heads, Q, N), or None.
    """

    shape: tuple[int, int, int, int, int]
    dtype: torch.dtype
    scale: float
    words: Tensor
    queries_keys: tuple[Tensor, Tensor] | None
    peak_and_share: Tensor
    bias: Tensor | None


def _check_operand(name: str, operand: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raise BackendError where an operand is not (R, tokens, heads, head_dim), or a bias, that fits the others."""
    if operand.dtype != dtype or operand.shape != shape or operand.device.type != "cpu":
        raise BackendError(
            f"attention's {name} is {operand.dtype} of {tuple(operand.shape)} on {operand.device}; it goes with "
            f"{dtype} of {shape} on cpu"
        )


def _view(heads: Tensor) -> tuple[_ext.Memory, tuple[int, ...]]:
    """Return the memory and the strides of (R, tokens, heads, head_dim) whose last axis is contiguous."""
    return _ext.strided(heads), heads.stride()[:3]


def _scores(q: Tensor, k: Tensor, scale: float, bias: Tensor | None, queries: slice = slice(None)) -> Tensor:
    scores = (q[:, :, queries] * scale) @ k.transpose(-1, -2)
    return scores if bias is None else scores.add_(bias[:, queries])
