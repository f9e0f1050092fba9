"""attention: softmax attention that keeps two numbers a query, and its frozen VJP.

    forward:  s = log₂e·(scale·q kᵀ + bias),  peak = max s,  share = 1/Σ exp₂(s − peak),  out = share·exp₂(s − peak) v
    VJP:      dv = Pᵀ d_out  with  Pᵀ = exp₂(sᵀ − peak)·share  made again, tile by tile

Peak and share are the log-sum-exp in two parts: as a single float32 it would cost P up to three binary digits. With
operands of sixteen bits these digits are lost anyway, so peak is the log-sum-exp itself, log₂ Σ exp₂ s, and there is no
share. Scores stay divided by the scale until the exponential, so a bias is divided by it too; without a bias its
pointer is None and its code is not compiled.

The VJP has the structure of a forward kernel, unlike attention's usual backward: a program has one block of keys and
loops over queries, Pᵀ stays in registers between the two products, and there is neither rescaling nor an atomic
addition. (Online softmax: Milakov & Gimelshein, arXiv 1805.02867; in tiles: Dao et al., arXiv 2205.14135.)

R rows · Q queries · N tokens · H heads · D head_dim, in blocks of D_BLOCK ≥ D · P attention probabilities.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from dave_fast.kernels import _launch
from dave_fast.kernels._attention import _attention_kernel, _attention_vjp_kernel
from dave_fast.ops.attention import attention_ref, attention_vjp_ref
from dave_fast.ops.fp8 import E4M3, Codes, TokenScales

# PyTorch's flash attention, which returns the log-sum-exp; it takes no bias.
FLASH = _launch.Library("scaled_dot_product_flash_attention")


@dataclass(frozen=True)
class SavedTriton:
    """The forward's results that the VJP needs.

    Attributes:
        factor: scale·log₂e.
        q: (R, Q, heads, head_dim), as it was given.
        k: (R, N, heads, head_dim), as it was given.
        peak: (R, heads, Q) float32.
        share: (R, heads, Q) float32; None for operands of sixteen bits.
        bias: (heads, Q, N), or None.
        over_scale: 1/scale; None without a bias.
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
    """Return the fixed configuration, then the other candidates.

    On tensor cores the tile that a program keeps (queries, or keys in the VJP) has 128 tokens and the one that it loops
    over 64, in as many stages as leave registers for two programs a multiprocessor. Wide heads, float32, which is
    multiplied without tensor cores, and a bias need more registers and get smaller tiles. The one or two queries of a
    trimmed block take the smallest tile of a product. Every block is masked: separate code for the last block (PEELED)
    makes sm_90 wait for each product before the next.

    Args:
        arch: 80, 90, 100 ...; 0 for the interpreter.
        dtype: of the operands.
        dim: D_BLOCK.
        queries: Q.
        vjp: whether it is for the VJP.
        biased: whether there is a bias.
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
            # With every block masked, the VJP spills on sm_100.
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


def attention_triton(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None, *, code_scale: TokenScales | None = None
) -> tuple[Tensor | Codes, Any]:
    """Run `attention_ref` for positive scales and head_dim up to 128; anything else is left to PyTorch.

    With a code_scale the result is stored in e4m3 with these scales instead, as `ops.fp8.Codes`.
    """
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
        out = torch.empty(q.shape, dtype=q.dtype if code_scale is None else E4M3, device=q.device)
        peak = torch.empty(rows, heads, queries, dtype=torch.float32, device=q.device)
        share = torch.empty_like(peak) if q.dtype == torch.float32 else None
        grid = triton.cdiv(queries, candidate.kwargs["BLOCK_Q"]) * rows * heads
        _attention_kernel[(grid,)](
            *(q, k, v, out, peak, share, queries, tokens, heads, factor),
            *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], bias, over_scale),
            *(*_launch.scale_arguments(code_scale), dim, block),
            INTERPRETED=_launch.INTERPRETED,
            **candidate.all_kwargs(),
        )
        return out, peak, share

    arch, biased = _launch.architecture(q.device), bias is not None
    found: list[_launch.Candidate] = [*configurations(arch, q.dtype, block, queries, vjp=False, biased=biased)]
    if arch and bias is None and code_scale is None and q.dtype != torch.float32 and dim % 8 == 0:
        found.append(FLASH)
    problem = _problem("attention", q, tokens, bias, code_scale)
    out, peak, share = _launch.run(problem, rows * heads, q.device, found, launch)
    kept = SavedTriton(factor, q, k, peak, share, bias, over_scale)
    return out if code_scale is None else Codes(out, code_scale, q.dtype, None), kept


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return the heads' outputs (R, Q, heads, head_dim) and log₂ Σ exp₂ s (R, heads, Q), both contiguous."""
    heads = (t.transpose(1, 2) for t in (q, k, v))
    out, log_sum, *_ = torch.ops.aten._scaled_dot_product_flash_attention(*heads, scale=scale)
    return out.transpose(1, 2).contiguous(), (log_sum * math.log2(math.e)).contiguous()


def attention_vjp_triton(saved: Any, d_out: Tensor, *, code_scale: TokenScales | None = None) -> Tensor | Codes:
    """Run `attention_vjp_ref` for what `attention_triton` saved; code_scale as there."""
    if not isinstance(saved, SavedTriton):
        return attention_vjp_ref(saved, d_out)
    q, k = saved.q, saved.k
    d_out = d_out if d_out.stride(-1) == 1 else d_out.contiguous()
    rows, tokens, heads, dim = k.shape
    queries = q.shape[1]
    d_v = torch.empty(k.shape, dtype=d_out.dtype if code_scale is None else E4M3, device=d_out.device)
    block = max(16, triton.next_power_of_2(dim))

    def launch(configuration: Any) -> None:
        grid = triton.cdiv(tokens, configuration.kwargs["BLOCK_N"]) * rows * heads
        _attention_vjp_kernel[(grid,)](
            *(q, k, saved.peak, saved.share, d_out, d_v, queries, tokens, heads, saved.factor),
            *(*q.stride()[:3], *k.stride()[:3], *d_out.stride()[:3], saved.bias, saved.over_scale),
            *(*_launch.scale_arguments(code_scale), dim, block),
            INTERPRETED=_launch.INTERPRETED,
            **configuration.all_kwargs(),
        )

    arch, biased = _launch.architecture(q.device), saved.bias is not None
    found = configurations(arch, q.dtype, block, queries, vjp=True, biased=biased)
    problem = _problem("attention_vjp", q, tokens, saved.bias, code_scale)
    _launch.run(problem, rows * heads, q.device, found, launch)
    return d_v if code_scale is None else Codes(d_v, code_scale, d_out.dtype, None)


def _problem(op: str, q: Tensor, tokens: int, bias: Tensor | None, code_scale: TokenScales | None) -> str:
    """Return the name of the problem for the choice of a candidate: all that decides except rows and heads."""
    options = [name for name, given in (("bias", bias), ("codes", code_scale)) if given is not None]
    dtype = str(q.dtype).removeprefix("torch.")
    return " ".join([op, dtype, f"Q={q.shape[1]}", f"N={tokens}", f"D={q.shape[3]}", *options])
