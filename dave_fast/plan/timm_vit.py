"""timm's VisionTransformer and its distilled form.

Blocks: pre-norm, with post-norm branches (ResPostBlock), parallel (ParallelScalingBlock), and several attentions and
MLPs side by side (ParallelThingsBlock).
"""

from __future__ import annotations

from dataclasses import replace
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

from dave_fast.plan.parts import activation_name, read_linear, read_norm, split
from dave_fast.plan.reading import Linear, Mlp, NoPlanError, Step
from dave_fast.plan.timm_model import BlockReader, timm_family
from dave_fast.plan.timm_parts import check_block, read_attention, read_gamma, read_heads, read_mlp, residual_steps


def _block_reader(model: Any, grid: tuple[int, int]) -> BlockReader:
    return lambda block, index: _read_block(block)


FAMILY = timm_family(VisionTransformer, VisionTransformerDistilled, block_reader=_block_reader)


def _read_block(block: Any) -> tuple[Step, ...]:
    check_block(block, Block, ResPostBlock, ParallelScalingBlock, ParallelThingsBlock)
    if type(block) is ParallelScalingBlock:
        return _read_parallel(block)
    if type(block) is ParallelThingsBlock:
        return _read_things(block)
    attention = read_attention(block.attn, TimmAttention)
    return residual_steps(block, attention, post_norm=type(block) is ResPostBlock)


def _read_things(block: Any) -> tuple[Step, ...]:
    """Read several attentions side by side, then several MLPs."""
    attentions = (
        replace(read_attention(a.attn, TimmAttention), norm=read_norm(a.norm), gamma=read_gamma(a.ls))
        for a in block.attns
    )
    mlps = (replace(read_mlp(f.mlp), norm=read_norm(f.norm), gamma=read_gamma(f.ls)) for f in block.ffns)
    return tuple(attentions), tuple(mlps)


def _read_parallel(block: Any) -> tuple[Step, ...]:
    """Read attention and MLP side by side, with one norm and one packed projection."""
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
    attention = read_heads(block, split(packed.rows(hidden, hidden + 3 * width)), proj)
    mlp = Mlp((fc1,), activation_name(block.mlp_act), fc2)
    return ((replace(attention, norm=norm, gamma=gamma), replace(mlp, norm=norm, gamma=gamma)),)
