"""attention: softmax attention that keeps two numbers a query, and its frozen VJP.

    forward:  s = log₂e·(scale·q kᵀ + bias),  peak = max s,  share = 1/Σ exp₂(s − peak),  out = share·exp₂(s − peak) v
    VJP:      dv = Pᵀ d_out  with  Pᵀ = exp₂(sᵀ − peak)·share  made again, tile by tile

Peak and share are the log-sum-exp in two parts: one float32 of it would cost P up to three binary digits. Operands of
sixteen bits have no use for these: for them peak is the log-sum-exp itself, log₂ Σ exp₂ s, and there is no share.
Scores are kept as s/scale until the exponential takes them, so a bias is divided by the scale; without one its
pointer is None and nothing of it is compiled.

The VJP is shaped like a forward kernel, not like attention's usual backward: a block of keys stands still, queries pass
by, Pᵀ goes from the first product's registers into the second, nothing is rescaled and nothing is added atomically.
(Online softmax: Milakov & Gimelshein, arXiv 1805.02867; in tiles: Dao et al., arXiv 2205.14135.)

R rows · Q queries · N tokens · H heads · D head dimension, in blocks of D_BLOCK ≥ D.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dave_fast.kernels import _launch
from dave_fast.ops.attention import attention_ref, attention_vjp_ref


@triton.jit
def _place(tokens, H, BLOCK: tl.constexpr):
    """This program's block of tokens, row · H + head, row and head. One axis: CUDA's others end at 65,535 programs."""
    blocks = tl.cdiv(tokens, BLOCK)
    i_flat = (tl.program_id(0) // blocks).to(tl.int64)
    return tl.program_id(0) % blocks, i_flat, i_flat // H, i_flat % H


@triton.jit
def _load(base, o, limit, stride, D: tl.constexpr, D_BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Tokens o of one head: [BLOCK, D_BLOCK], zeros beyond `limit` where MASKED, and beyond D."""
    d = tl.arange(0, D_BLOCK)
    p = base + o.to(tl.int64)[:, None] * stride + d[None, :]
    if MASKED:
        return tl.load(p, mask=(o < limit)[:, None] & (d < D)[None, :], other=0.0)
    if D == D_BLOCK:
        return tl.load(p)
    return tl.load(p, mask=(d < D)[None, :], other=0.0)


@triton.jit
def _scores(
    b_still, still, o_still, limit_still, stride_still, passing, o_passing, limit_passing, stride_passing,
    D: tl.constexpr, D_BLOCK: tl.constexpr, D_STEP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """still · passingᵀ of two blocks of tokens, D_STEP components at a time; whole, `still` is kept in b_still.

    Beyond the last token that passes, where MASKED, scores are those of the last.
    """
    if MASKED:
        o_passing = tl.minimum(o_passing, limit_passing - 1)
    if D_STEP == D_BLOCK:
        b_passing = _load(passing, o_passing, limit_passing, stride_passing, D, D_BLOCK, False)
        s = tl.dot(b_still, b_passing.T, input_precision="ieee")
    else:
        s = tl.zeros((o_still.shape[0], o_passing.shape[0]), dtype=tl.float32)
        for d in tl.static_range(0, D_BLOCK, D_STEP):
            b_still = _load(still + d, o_still, limit_still, stride_still, D - d, D_STEP, True)
            b_passing = _load(passing + d, o_passing, limit_passing, stride_passing, D - d, D_STEP, False)
            s = tl.dot(b_still, b_passing.T, s, input_precision="ieee")
    return s


@triton.jit
def _add_bias(s, bias, over_scale, o_q, o_n, Q, N, TRANSPOSED: tl.constexpr):
    """s + bias/scale, with s [BLOCK_Q, BLOCK_N], or [BLOCK_N, BLOCK_Q] where TRANSPOSED; bias of one head, (Q, N)."""
    if TRANSPOSED:
        p = bias + o_q.to(tl.int64)[None, :] * N + o_n[:, None]
        m = (o_q < Q)[None, :] & (o_n < N)[:, None]
    else:
        p = bias + o_q.to(tl.int64)[:, None] * N + o_n[None, :]
        m = (o_q < Q)[:, None] & (o_n < N)[None, :]
    return s + tl.load(p, mask=m, other=0.0).to(tl.float32) * over_scale


@triton.jit
def _forward_block(
    b_q, q, o_q, Q, stride_q, k, v, start, N, stride_k, stride_v, factor, acc, top, total, bias, over_scale,
    D: tl.constexpr, D_BLOCK: tl.constexpr, D_STEP: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of keys: the running maximum score `top`, sum `total` and product `acc` of the online softmax."""
    o_n = start + tl.arange(0, BLOCK_N)
    s = _scores(b_q, q, o_q, Q, stride_q, k, o_n, N, stride_k, D, D_BLOCK, D_STEP, MASKED)  # [BLOCK_Q, BLOCK_N]
    if bias is not None:
        s = _add_bias(s, bias, over_scale, o_q, o_n, Q, N, False)
    if MASKED:
        s = tl.where((o_n < N)[None, :], s, float("-inf"))
    higher = tl.maximum(top, tl.max(s, 1))
    p = tl.exp2(s * factor - (higher * factor)[:, None])
    shrink = tl.exp2((top - higher) * factor)
    total = total * shrink + tl.sum(p, 1)
    b_v = _load(v, o_n, N, stride_v, D, D_BLOCK, MASKED)  # [BLOCK_N, D_BLOCK]
    acc = tl.dot(p.to(b_v.dtype), b_v, acc * shrink[:, None], input_precision="ieee")
    return acc, higher, total


@triton.jit
def _attention_kernel(
    q, k, v, out, peak, share, Q, N, H, factor,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head, bias, over_scale,
    D: tl.constexpr, D_BLOCK: tl.constexpr, D_STEP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
    PEELED: tl.constexpr,
):  # fmt: skip
    """A block of queries of one head; PEELED: the last block of keys has code of its own, the others go unmasked."""
    i_q, i_flat, i_row, i_head = _place(Q, H, BLOCK_Q)
    q += i_row * q_row + i_head * q_head
    k += i_row * k_row + i_head * k_head
    v += i_row * v_row + i_head * v_head
    if bias is not None:
        bias += i_head * Q * N
    o_q = i_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    b_q = _load(q, o_q, Q, q_token, D, D_BLOCK, True)  # [BLOCK_Q, D_BLOCK]
    acc = tl.zeros((BLOCK_Q, D_BLOCK), dtype=tl.float32)
    top = tl.full((BLOCK_Q,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_Q,), dtype=tl.float32)
    last = (N - 1) // BLOCK_N * BLOCK_N
    for start in range(0, last if PEELED else N, BLOCK_N):
        acc, top, total = _forward_block(
            b_q, q, o_q, Q, q_token, k, v, start, N, k_token, v_token, factor, acc, top, total, bias, over_scale,
            D, D_BLOCK, D_STEP, BLOCK_N, not PEELED,
        )  # fmt: skip
    if PEELED:
        acc, top, total = _forward_block(
            b_q, q, o_q, Q, q_token, k, v, last, N, k_token, v_token, factor, acc, top, total, bias, over_scale,
            D, D_BLOCK, D_STEP, BLOCK_N, True,
        )  # fmt: skip
    m_q = o_q < Q
    d = tl.arange(0, D_BLOCK)
    p = out + ((i_row * Q + o_q)[:, None] * H + i_head) * D + d[None, :]
    tl.store(p, (acc * (1 / total)[:, None]).to(out.dtype.element_ty), mask=m_q[:, None] & (d < D)[None, :])
    o_kept = i_flat * Q + o_q
    if share is not None:
        tl.store(peak + o_kept, top * factor, mask=m_q)
        tl.store(share + o_kept, 1 / total, mask=m_q)
    else:
        tl.store(peak + o_kept, top * factor + tl.log2(total), mask=m_q)


@triton.jit
def _vjp_block(
    b_k, k, o_n, N, stride_k, q, d_out, peak, share, start, Q, stride_q, stride_o, factor, acc, bias, over_scale,
    D: tl.constexpr, D_BLOCK: tl.constexpr, D_STEP: tl.constexpr, BLOCK_Q: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """acc += Pᵀ d_out of one block of queries."""
    o_q = start + tl.arange(0, BLOCK_Q)
    # an infinite peak makes every p beyond the last query zero
    b_peak = tl.load(peak + o_q, mask=o_q < Q, other=float("inf")) if MASKED else tl.load(peak + o_q)
    s = _scores(b_k, k, o_n, N, stride_k, q, o_q, Q, stride_q, D, D_BLOCK, D_STEP, MASKED)  # [BLOCK_N, BLOCK_Q]
    if bias is not None:
        s = _add_bias(s, bias, over_scale, o_q, o_n, Q, N, True)
    p = tl.exp2(s * factor - b_peak[None, :])
    if share is not None:
        p *= (tl.load(share + o_q, mask=o_q < Q, other=0.0) if MASKED else tl.load(share + o_q))[None, :]
    b_o = _load(d_out, o_q, Q, stride_o, D, D_BLOCK, MASKED)  # [BLOCK_Q, D_BLOCK]
    return tl.dot(p.to(b_o.dtype), b_o, acc, input_precision="ieee")


@triton.jit
def _attention_vjp_kernel(
    q, k, peak, share, d_out, d_v, Q, N, H, factor,
    q_row, q_token, q_head, k_row, k_token, k_head, o_row, o_token, o_head, bias, over_scale,
    D: tl.constexpr, D_BLOCK: tl.constexpr, D_STEP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
    PEELED: tl.constexpr,
):  # fmt: skip
    """dv of a block of keys of one head; PEELED: the last block of queries has code of its own."""
    i_n, i_flat, i_row, i_head = _place(N, H, BLOCK_N)
    q += i_row * q_row + i_head * q_head
    k += i_row * k_row + i_head * k_head
    d_out += i_row * o_row + i_head * o_head
    peak += i_flat * Q
    if share is not None:
        share += i_flat * Q
    if bias is not None:
        bias += i_head * Q * N
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    b_k = _load(k, o_n, N, k_token, D, D_BLOCK, True)  # [BLOCK_N, D_BLOCK]
    acc = tl.zeros((BLOCK_N, D_BLOCK), dtype=tl.float32)
    last = (Q - 1) // BLOCK_Q * BLOCK_Q
    for start in range(0, last if PEELED else Q, BLOCK_Q):
        acc = _vjp_block(
            b_k, k, o_n, N, k_token, q, d_out, peak, share, start, Q, q_token, o_token, factor, acc, bias, over_scale,
            D, D_BLOCK, D_STEP, BLOCK_Q, not PEELED,
        )  # fmt: skip
    if PEELED:
        acc = _vjp_block(
            b_k, k, o_n, N, k_token, q, d_out, peak, share, last, Q, q_token, o_token, factor, acc, bias, over_scale,
            D, D_BLOCK, D_STEP, BLOCK_Q, True,
        )  # fmt: skip
    d = tl.arange(0, D_BLOCK)
    p = d_v + ((i_row * N + o_n)[:, None] * H + i_head) * D + d[None, :]
    tl.store(p, acc.to(d_v.dtype.element_ty), mask=(o_n < N)[:, None] & (d < D)[None, :])


# PyTorch's flash attention, which returns the log-sum-exp; it has no form with a bias
FLASH = _launch.Library("scaled_dot_product_flash_attention")


@dataclass(frozen=True)
class SavedTriton:
    """What the VJP needs.

    factor: scale·log₂e · q: (R, Q, heads, D), k: (R, N, heads, D), as they were given · peak, share: (R, heads, Q) ·
    bias: (heads, Q, N), over_scale: 1/scale; None without a bias.
    """

    factor: float
    q: Tensor
    k: Tensor
    peak: Tensor
    share: Tensor | None
    bias: Tensor | None
    over_scale: float | None


def configurations(
    arch: int, dtype: torch.dtype, dim: int, queries: int, *, vjp: bool, biased: bool = False
) -> list[triton.Config]:
    """The fixed configuration, then the other candidates. dim: D_BLOCK.

    The tile that stands still (queries, or keys in the VJP) has 128 tokens on tensor cores, what passes by 64, in as
    many stages as leave registers for two programs a multiprocessor; wide heads and float32, which is multiplied
    without tensor cores, get smaller ones, for registers, and so do those that read a bias. The one or two queries of
    a trimmed block take the smallest tile that a product has. Every block is masked: a last block with code of its own
    (PEELED) makes sm_90 wait for each product before the next.
    """
    few = queries <= 16

    def configuration(still: int, passing: int, warps: int, stages: int, *, peeled: bool = False) -> triton.Config:
        block_q, block_n = (passing, still) if vjp else (still, passing)
        tile = {"BLOCK_Q": 16 if few else block_q, "BLOCK_N": block_n}
        step = 16 if dtype == torch.float32 else dim
        return triton.Config(tile | {"D_STEP": step, "PEELED": peeled}, num_warps=warps, num_stages=stages)

    if arch == 0:
        return [configuration(64, 32, 4, 1)]
    if dtype == torch.float32:
        if dim > 64:
            # masked, the VJP spills on sm_100
            return [configuration(32, 16, 8, 1, peeled=vjp and arch >= 100)]
        return [configuration(64, 32 if dim > 32 else 16, 8, 1)]
    if few and not vjp:
        return [configuration(16, 64, 4, 2)]
    if biased and dim > 64:
        return [configuration(64, 32, 4, 2)] if vjp else [configuration(64, 32, 8, 2)]
    if biased:
        return [configuration(128, 32 if vjp else 64, 8, 2), configuration(64, 32, 4, 2)]
    if dim > 64:
        high = 64 if 90 <= arch < 100 else 32
        return [configuration(64, high, 4, 2), configuration(128, high, 8, 2), configuration(128, 32, 8, 3)]
    return [
        configuration(128, 64, 8, 2 if vjp else 3),
        configuration(64, 64, 4, 2),
        configuration(128, 32, 8, 3),
        configuration(128, 64, 8, 3, peeled=True),
    ]


def attention_triton(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None) -> tuple[Tensor, Any]:
    """As `attention_ref` for positive scales and head dimensions up to 128, any strides but of the last axis."""
    rows, queries, heads, dim = q.shape
    if not _launch.covered(q) or scale <= 0 or dim > 128:
        return attention_ref(q, k, v, scale, bias)
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    tokens, factor = k.shape[1], scale * math.log2(math.e)
    bias, over_scale = (None, None) if bias is None else (bias.contiguous(), 1 / scale)
    block = max(16, triton.next_power_of_2(dim))

    def launch(candidate: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        if candidate is FLASH:
            return *_flash(q, k, v, scale), None
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        peak = torch.empty(rows, heads, queries, dtype=torch.float32, device=q.device)
        share = torch.empty_like(peak) if q.dtype == torch.float32 else None
        grid = triton.cdiv(queries, candidate.kwargs["BLOCK_Q"]) * rows * heads
        _attention_kernel[(grid,)](
            *(q, k, v, out, peak, share, queries, tokens, heads, factor),
            *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], bias, over_scale, dim, block),
            **candidate.all_kwargs(),
        )
        return out, peak, share

    arch = _launch.architecture(q.device)
    found: list[_launch.Candidate] = [
        *configurations(arch, q.dtype, block, queries, vjp=False, biased=bias is not None)
    ]
    if arch and bias is None and q.dtype != torch.float32 and dim % 8 == 0:
        found.append(FLASH)
    problem = _problem("attention", q, tokens, bias)
    out, peak, share = _launch.run(problem, rows * heads, q.device, found, launch)
    return out, SavedTriton(factor, q, k, peak, share, bias, over_scale)


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return the heads' outputs (R, Q, heads, D) and log₂ Σ exp₂ s (R, heads, Q), both contiguous."""
    heads = (t.transpose(1, 2) for t in (q, k, v))
    out, log_sum, *_ = torch.ops.aten._scaled_dot_product_flash_attention(*heads, scale=scale)
    return out.transpose(1, 2).contiguous(), (log_sum * math.log2(math.e)).contiguous()


def attention_vjp_triton(saved: Any, d_out: Tensor) -> Tensor:
    """As `attention_vjp_ref`, for what `attention_triton` saved."""
    if not isinstance(saved, SavedTriton):
        return attention_vjp_ref(saved, d_out)
    q, k = saved.q, saved.k
    d_out = d_out if d_out.stride(-1) == 1 else d_out.contiguous()
    rows, tokens, heads, dim = k.shape
    queries = q.shape[1]
    d_v = torch.empty(rows, tokens, heads, dim, dtype=d_out.dtype, device=d_out.device)
    block = max(16, triton.next_power_of_2(dim))

    def launch(configuration: Any) -> None:
        grid = triton.cdiv(tokens, configuration.kwargs["BLOCK_N"]) * rows * heads
        _attention_vjp_kernel[(grid,)](
            *(q, k, saved.peak, saved.share, d_out, d_v, queries, tokens, heads, saved.factor),
            *(*q.stride()[:3], *k.stride()[:3], *d_out.stride()[:3], saved.bias, saved.over_scale, dim, block),
            **configuration.all_kwargs(),
        )

    found = configurations(
        _launch.architecture(q.device), q.dtype, block, queries, vjp=True, biased=saved.bias is not None
    )
    _launch.run(_problem("attention_vjp", q, tokens, saved.bias), rows * heads, q.device, found, launch)
    return d_v


def _problem(op: str, q: Tensor, tokens: int, bias: Tensor | None) -> str:
    """What decides between candidates, but the number of rows and heads."""
    dtype = str(q.dtype).removeprefix("torch.")
    return f"{op} {dtype} Q={q.shape[1]} N={tokens} D={q.shape[3]}{'' if bias is None else ' bias'}"
