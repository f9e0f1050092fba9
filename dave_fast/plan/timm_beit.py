"""timm's Beit: relative position biases, each block's own, shared by all blocks, or both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.models.beit import Attention as BeitAttention
from timm.models.beit import Beit, Block, RelativePositionBias
from torch import Tensor

from dave_fast.plan.reading import Attention, NoPlanError, Step
from dave_fast.plan.timm_parts import (
    BlockReader,
    read_gamma,
    read_linear,
    read_mlp,
    read_norm,
    read_packed,
    read_scale,
    split,
    timm_family,
)


def _block_reader(model: Any, grid: tuple[int, int]) -> BlockReader:
    shared = model.rel_pos_bias
    if shared is not None and type(shared) is not RelativePositionBias:
        raise NoPlanError(f"its relative position bias is a {type(shared).__name__}")
    common = None if shared is None else lambda: shared().detach().double()
    return lambda block, index: _read_block(block, common)


FAMILY = timm_family(Beit, block_reader=_block_reader)


def _read_block(block: Any, shared: Callable[[], Tensor] | None) -> tuple[Step, ...]:
    if type(block) is not Block:
        raise NoPlanError(f"a {type(block).__name__}, not BEiT's Block")
    attn = block.attn
    if type(attn) is not BeitAttention:
        raise NoPlanError(f"its attention is a {type(attn).__name__}")
    qkv = split(read_packed(attn))
    head_dim = len(qkv[0].bias) // attn.num_heads
    attention = Attention(
        norm=read_norm(block.norm1),
        qkv=qkv,
        heads=attn.num_heads,
        head_dim=head_dim,
        scale=read_scale(attn, head_dim),
        proj=read_linear(attn.proj),
        bias=_read_bias(attn, shared),
        gamma=read_gamma(block.gamma_1),
    )
    return (attention,), (read_mlp(block.mlp, read_norm(block.norm2), read_gamma(block.gamma_2)),)


def _read_bias(attn: Any, shared: Callable[[], Tensor] | None) -> Callable[[], Tensor] | None:
    """(heads, N, N)."""
    if attn.relative_position_bias_table is None:
        return shared

    def own() -> Tensor:
        with torch.no_grad():
            bias: Tensor = attn._get_rel_pos_bias()[0].double()
        return bias if shared is None else bias + shared()

    return own
