"""timm's VisionTransformerRelPos: relative position biases from a table or from an MLP on log coordinates."""

from __future__ import annotations

import copy
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

from dave_fast.plan.parts import Bias
from dave_fast.plan.reading import NoPlanError, Step
from dave_fast.plan.timm_model import BlockReader, timm_family
from dave_fast.plan.timm_parts import check_block, read_attention, residual_steps


def _block_reader(model: Any, grid: tuple[int, int]) -> BlockReader:
    shared = _read_bias(model.shared_rel_pos)
    return lambda block, index: _read_block(block, shared)


FAMILY = timm_family(VisionTransformerRelPos, block_reader=_block_reader)


def _read_bias(module: Any) -> Bias | None:
    """Return a function that makes the bias (heads, N, N), in float64 and as in evaluation mode."""
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
    check_block(block, RelPosBlock, ResPostRelPosBlock)
    own = getattr(block.attn, "rel_pos", None)
    attention = read_attention(block.attn, RelPosAttention, bias=shared if own is None else _read_bias(own))
    return residual_steps(block, attention, post_norm=type(block) is ResPostRelPosBlock)
