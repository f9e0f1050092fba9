"""timm's VisionTransformer and its distilled form.

Blocks: pre-norm, with post-norm branches (ResPostBlock), parallel (ParallelScalingBlock), and several attentions and
MLPs side by side (ParallelThingsBlock).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import Attention as TimmAttention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import (
    Block,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from torch import Tensor

from dave_fast.plan.reading import Attention, Linear, Mlp, NoPlanError, Norm, Step
from dave_fast.plan.timm_parts import (
    BlockReader,
    activation_name,
    read_gamma,
    read_head_norm,
    read_linear,
    read_mlp,
    read_norm,
    read_scale,
    split,
    timm_family,
)


def _block_reader(model: Any, grid: tuple[int, int]) -> BlockReader:
    return lambda block, index: _read_block(block)


FAMILY = timm_family(VisionTransformer, VisionTransformerDistilled, block_reader=_block_reader)


def _read_block(block: Any) -> tuple[Step, ...]:
    reader = READERS.get(type(block))
    if reader is None:
        raise NoPlanError(f"a {type(block).__name__} is no block that a plan covers")
    return reader(block)


def _read_pre_norm(block: Any) -> tuple[Step, ...]:
    attention = _read_attention(block.attn, read_norm(block.norm1), read_gamma(block.ls1))
    return (attention,), (read_mlp(block.mlp, read_norm(block.norm2), read_gamma(block.ls2)),)


def _read_post_norm(block: Any) -> tuple[Step, ...]:
    attention = _read_attention(block.attn, None, None, read_norm(block.norm1))
    return (attention,), (read_mlp(block.mlp, None, None, read_norm(block.norm2)),)


def _read_things(block: Any) -> tuple[Step, ...]:
    """Several attentions side by side, then several MLPs."""
    attentions = (_read_attention(a.attn, read_norm(a.norm), read_gamma(a.ls)) for a in block.attns)
    mlps = (read_mlp(f.mlp, read_norm(f.norm), read_gamma(f.ls)) for f in block.ffns)
    return tuple(attentions), tuple(mlps)


def _read_parallel(block: Any) -> tuple[Step, ...]:
    """Attention and MLP side by side, with one norm and one packed projection."""
    norm, gamma, packed = read_norm(block.in_norm), read_gamma(block.ls), read_linear(block.in_proj)
    hidden, width = block.in_split[0], block.num_heads * block.head_dim
    if block.in_split != [hidden, width, width, width]:
        raise NoPlanError("its packed projection is split in another way")
    fc1 = packed.rows(0, hidden)
    if block.mlp_bias is not None:
        fc1 = Linear(fc1.weight, fc1.bias + block.mlp_bias.detach())
    if block.out_proj is None:
        proj, fc2 = read_linear(block.attn_out_proj), read_linear(block.mlp_out_proj)
    else:
        both = read_linear(block.out_proj)
        proj = Linear(both.weight[:, :width], both.bias)
        fc2 = Linear(both.weight[:, width:], torch.zeros_like(both.bias))
    attention = Attention(
        norm=norm,
        qkv=split(packed.rows(hidden, hidden + 3 * width)),
        heads=block.num_heads,
        head_dim=block.head_dim,
        scale=read_scale(block, block.head_dim),
        proj=proj,
        q_norm=read_head_norm(block.q_norm),
        k_norm=read_head_norm(block.k_norm),
        gamma=gamma,
    )
    return ((attention, Mlp(norm, (fc1,), activation_name(block.mlp_act), fc2, gamma=gamma)),)


READERS: dict[type, Callable[[Any], tuple[Step, ...]]] = {
    Block: _read_pre_norm,
    ResPostBlock: _read_post_norm,
    ParallelScalingBlock: _read_parallel,
    ParallelThingsBlock: _read_things,
}


def _read_attention(attn: Any, norm: Norm | None, gamma: Tensor | None, post: Norm | None = None) -> Attention:
    if type(attn) is not TimmAttention:
        raise NoPlanError(f"its attention is a {type(attn).__name__}")
    if attn.gate is not None:
        raise NoPlanError("its attention gates its output")
    return Attention(
        norm=norm,
        qkv=split(read_linear(attn.qkv)),
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
