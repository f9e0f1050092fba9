"""timm's Eva: EVA and EVA02, DINOv3, Perception Encoder, ViTs with rotary embeddings.

Blocks: pre-norm and post-norm; attention with packed or separate projections, biases of q and v only, norms of q and
k or of the output, keys and values shared by several heads; any MLP of timm's. Rotary embeddings: axial ("cat",
"dinov3", "mrope"), or with learnt frequencies of each block and head ("mixed").
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from timm.layers import AttentionRope
from timm.layers.pos_embed_sincos import (
    RotaryEmbeddingCat,
    RotaryEmbeddingDinoV3,
    RotaryEmbeddingMixed,
    RotaryEmbeddingMRope,
)
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from torch import Tensor

from dave_fast.plan.reading import NoPlanError, Rotary, Step
from dave_fast.plan.timm_model import BlockReader, timm_family
from dave_fast.plan.timm_parts import check_block, read_attention, residual_steps

ROTARIES = (RotaryEmbeddingCat, RotaryEmbeddingDinoV3, RotaryEmbeddingMixed, RotaryEmbeddingMRope)


def _block_reader(model: Any, grid: tuple[int, int]) -> BlockReader:
    """Return a reader with the rotations of this grid; all blocks share them unless frequencies are learnt."""
    if model.rope is None:
        return lambda block, index: _read_block(block, None)
    if type(model.rope) not in ROTARIES:
        raise NoPlanError(f"its rotary embedding is a {type(model.rope).__name__}")
    tables = _rotary_tables(model, grid)
    if model.rope_mixed:
        return lambda block, index: _read_block(block, _rotary(block.attn, tables[index]))
    # one object for all blocks, so that the plan makes one table of it
    shared = _rotary(model.blocks[0].attn, tables) if len(model.blocks) else None
    return lambda block, index: _read_block(block, shared)


FAMILY = timm_family(Eva, block_reader=_block_reader)


def _rotary_tables(model: Any, grid: tuple[int, int]) -> Tensor:
    """Return sin and cos (…, n, 2·head_dim) as in evaluation mode; in training other coordinates are drawn."""
    rope = copy.copy(model.rope)
    rope.training = False
    with torch.no_grad():
        if model.dynamic_img_size or not hasattr(rope, "feat_shape"):
            tables: Tensor = rope.get_embed(shape=list(grid))
        else:
            tables = rope.get_embed()
    return tables


def _rotary(attn: Any, tables: Tensor) -> Rotary:
    sin, cos = tables.chunk(2, -1)
    return Rotary(sin, cos, attn.rotate_half, attn.num_prefix_tokens)


def _read_block(block: Any, rotary: Rotary | None) -> tuple[Step, ...]:
    check_block(block, EvaBlock, EvaBlockPostNorm)
    attn = block.attn
    attention = read_attention(attn, EvaAttention, AttentionRope, rotary=rotary)
    if rotary is not None and (attn.rotate_half, attn.num_prefix_tokens) != (rotary.half, rotary.skip):
        raise NoPlanError("its blocks turn queries and keys in different ways")
    return residual_steps(block, attention, post_norm=type(block) is EvaBlockPostNorm)
