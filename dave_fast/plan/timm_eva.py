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

from dave_fast.plan.reading import Attention, Linear, NoPlanError, Norm, Rotary, Step
from dave_fast.plan.timm_parts import (
    BlockReader,
    read_gamma,
    read_head_norm,
    read_linear,
    read_mlp,
    read_norm,
    read_packed,
    read_scale,
    split,
    timm_family,
)

ROTARIES = (RotaryEmbeddingCat, RotaryEmbeddingDinoV3, RotaryEmbeddingMixed, RotaryEmbeddingMRope)


def _block_reader(model: Any, grid: tuple[int, int]) -> BlockReader:
    """The rotations of this grid, shared by all blocks but for those of learnt frequencies."""
    if model.rope is None:
        return lambda block, index: _read_block(block, None)
    if type(model.rope) not in ROTARIES:
        raise NoPlanError(f"its rotary embedding is a {type(model.rope).__name__}")
    tables = _rotary_tables(model, grid)
    if model.rope_mixed:
        return lambda block, index: _read_block(block, _rotary(block.attn, tables[index]))
    # one reading for all blocks: they are alike
    shared = _rotary(model.blocks[0].attn, tables) if len(model.blocks) else None
    return lambda block, index: _read_block(block, shared)


FAMILY = timm_family(Eva, block_reader=_block_reader)


def _rotary_tables(model: Any, grid: tuple[int, int]) -> Tensor:
    """sin and cos (…, n, 2·D) as the model's forward takes them; training would draw other coordinates."""
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
    norms = read_norm(block.norm1), read_norm(block.norm2)
    if type(block) is EvaBlockPostNorm:
        first = _read_attention(block.attn, rotary, post=norms[0])
        return (first,), (read_mlp(block.mlp, None, post=norms[1]),)
    if type(block) is not EvaBlock:
        raise NoPlanError(f"a {type(block).__name__}, not an EvaBlock")
    first = _read_attention(block.attn, rotary, norms[0], read_gamma(block.gamma_1))
    return (first,), (read_mlp(block.mlp, norms[1], read_gamma(block.gamma_2)),)


def _read_attention(
    attn: Any, rotary: Rotary | None, norm: Norm | None = None, gamma: Tensor | None = None, post: Norm | None = None
) -> Attention:
    if type(attn) not in (EvaAttention, AttentionRope):
        raise NoPlanError(f"its attention is a {type(attn).__name__}")
    if attn.gate is not None:
        raise NoPlanError("its attention gates its output")
    if rotary is not None and (attn.rotate_half, attn.num_prefix_tokens) != (rotary.half, rotary.skip):
        raise NoPlanError("its blocks turn queries and keys in different ways")
    # components of a head are put in another order where neighbours turn: an unknown norm could not follow
    head_norm = read_head_norm if rotary is None or rotary.half else read_norm
    return Attention(
        norm=norm,
        qkv=_read_projections(attn),
        heads=attn.num_heads,
        head_dim=attn.head_dim,
        scale=read_scale(attn, attn.head_dim),
        proj=read_linear(attn.proj),
        groups=getattr(attn, "num_kv_groups", 1),
        q_norm=head_norm(attn.q_norm),
        k_norm=head_norm(attn.k_norm),
        rotary=rotary,
        inner=read_norm(attn.norm),
        gamma=gamma,
        post=post,
    )


def _read_projections(attn: Any) -> tuple[Linear, Linear, Linear]:
    if attn.qkv is None:
        return read_linear(attn.q_proj), read_linear(attn.k_proj), read_linear(attn.v_proj)
    return split(read_packed(attn))
