"""timm's VisionTransformerRelPos: relative position biases from a table or from an MLP on log coordinates."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from timm.layers import RelPosBias, RelPosMlp
from timm.models.vision_transformer_relpos import (
    RelPosAttention,
    RelPosBlock,
    ResPostRelPosBlock,
    VisionTransformerRelPos,
)
from torch import Tensor

from dave_fast.plan.reading import Attention, NoPlanError, Norm, Step
from dave_fast.plan.timm_parts import (
    BlockReader,
    read_gamma,
    read_head_norm,
    read_linear,
    read_mlp,
    read_norm,
    read_scale,
    split,
    timm_family,
)

Bias = Callable[[], Tensor]


def _block_reader(model: Any, grid: tuple[int, int]) -> BlockReader:
    shared = _read_bias(model.shared_rel_pos)
    return lambda block, index: _read_block(block, shared)


FAMILY = timm_family(VisionTransformerRelPos, block_reader=_block_reader)


def _read_bias(module: Any) -> Bias | None:
    """(heads, N, N), made in float64 and as in evaluation mode."""
    if module is None:
        return None
    if type(module) not in (RelPosBias, RelPosMlp):
        raise NoPlanError(f"its relative position bias is a {type(module).__name__}")

    def bias() -> Tensor:
        with torch.no_grad():
            made: Tensor = copy.deepcopy(module).double().eval().get_bias()[0]
        return made

    return bias


def _read_block(block: Any, shared: Bias | None) -> tuple[Step, ...]:
    norms = read_norm(block.norm1), read_norm(block.norm2)
    if type(block) is ResPostRelPosBlock:
        first = _read_attention(block.attn, shared, post=norms[0])
        return (first,), (read_mlp(block.mlp, None, post=norms[1]),)
    if type(block) is not RelPosBlock:
        raise NoPlanError(f"a {type(block).__name__}, not a RelPosBlock")
    first = _read_attention(block.attn, shared, norms[0], read_gamma(block.ls1))
    return (first,), (read_mlp(block.mlp, norms[1], read_gamma(block.ls2)),)


def _read_attention(
    attn: Any, shared: Bias | None, norm: Norm | None = None, gamma: Tensor | None = None, post: Norm | None = None
) -> Attention:
    if type(attn) is not RelPosAttention:
        raise NoPlanError(f"its attention is a {type(attn).__name__}")
    return Attention(
        norm=norm,
        qkv=split(read_linear(attn.qkv)),
        heads=attn.num_heads,
        head_dim=attn.head_dim,
        scale=read_scale(attn, attn.head_dim),
        proj=read_linear(attn.proj),
        q_norm=read_head_norm(attn.q_norm),
        k_norm=read_head_norm(attn.k_norm),
        bias=shared if attn.rel_pos is None else _read_bias(attn.rel_pos),
        gamma=gamma,
        post=post,
    )
