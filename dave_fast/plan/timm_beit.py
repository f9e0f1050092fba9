"""timm's Beit: relative position biases, each block's own, shared by all blocks, or both."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.beit import Attention as BeitAttention
from timm.models.beit import Beit, Block, RelativePositionBias
from torch import Tensor

from dave_fast.plan.parts import Bias
from dave_fast.plan.reading import NoPlanError, Step
from dave_fast.plan.timm_model import BlockReader, timm_family
from dave_fast.plan.timm_parts import check_block, read_attention, residual_steps


def _block_reader(model: Any, grid: tuple[int, int]) -> BlockReader:
    shared = model.rel_pos_bias
    if shared is not None and type(shared) is not RelativePositionBias:
        raise NoPlanError(f"its relative position bias is a {type(shared).__name__}")
    common = None if shared is None else lambda: shared().detach().double()
    return lambda block, index: _read_block(block, common)


FAMILY = timm_family(Beit, block_reader=_block_reader)


def _read_block(block: Any, shared: Bias | None) -> tuple[Step, ...]:
    check_block(block, Block)
    attention = read_attention(block.attn, BeitAttention, bias=_read_bias(block.attn, shared))
    return residual_steps(block, attention)


def _read_bias(attn: Any, shared: Bias | None) -> Bias | None:
    """Return a function that makes the bias (heads, N, N) of one block."""
    if getattr(attn, "relative_position_bias_table", None) is None:
        return shared

    def own() -> Tensor:
        with torch.no_grad():
            bias: Tensor = attn._get_rel_pos_bias()[0].double()
        return bias if shared is None else bias + shared()

    return own
