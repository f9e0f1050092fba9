"""timm's VisionTransformer and its distilled form.

Blocks: pre-norm, with post-norm branches (ResPostBlock), parallel (ParallelScalingBlock), and several attentions and
MLPs side by side (ParallelThingsBlock).
"""

from __future__ import annotations

from typing import Any

from timm.layers import Attention as TimmAttention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor

from dave_fast.models.reading import Attention, NoPlanError, Norm, Step
from dave_fast.models.timm_parts import (
    BlockReader,
    read_gamma,
    read_head_norm,
    read_linear,
    read_mlp,
    read_norm,
    read_scale,
    timm_family,
)


def _block_reader(model: Any, grid: tuple[int, int]) -> BlockReader:
    return lambda block, index: _read_block(block)


FAMILY = timm_family(VisionTransformer, VisionTransformerDistilled, block_reader=_block_reader)


def _read_block(block: Any) -> tuple[Step, ...]:
    if type(block) is not Block:
        raise NoPlanError(f"a {type(block).__name__}, not a pre-norm Block")
    attention = _read_attention(block.attn, read_norm(block.norm1), read_gamma(block.ls1))
    return (attention,), (read_mlp(block.mlp, read_norm(block.norm2), read_gamma(block.ls2)),)


def _read_attention(attn: Any, norm: Norm | None, gamma: Tensor | None, post: Norm | None = None) -> Attention:
    if type(attn) is not TimmAttention:
        raise NoPlanError(f"its attention is a {type(attn).__name__}")
    if attn.gate is not None:
        raise NoPlanError("its attention gates its output")
    packed, width = read_linear(attn.qkv), attn.num_heads * attn.head_dim
    return Attention(
        norm=norm,
        qkv=(packed.rows(0, width), packed.rows(width, 2 * width), packed.rows(2 * width, 3 * width)),
        heads=attn.num_heads,
        head_dim=attn.head_dim,
        scale=read_scale(attn, attn.head_dim),
        proj=read_linear(attn.proj),
        q_norm=read_head_norm(attn.q_norm),
        k_norm=read_head_norm(attn.k_norm),
        inner=read_norm(attn.norm),
        gamma=gamma,
        post=post,
    )
