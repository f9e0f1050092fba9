"""The image towers of open_clip: its own VisionTransformer, and timm's models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dave_fast.given.isolation import isolated
from dave_fast.plan.multihead import expect, read_attention, read_mlp
from dave_fast.plan.parts import is_layer_norm, pre_norm, read_norm
from dave_fast.plan.reading import Family, NoPlanError, Reading, Step
from dave_fast.plan.whole import Tail, check_size, read_blocks, whole, without

_FILE = "open_clip.transformer"
_TIMM = "open_clip.timm_model.TimmModel"
# a model and (H, W), as of a family
Reader = Callable[[Any, tuple[int, int] | None], Reading]


def open_clip_family(read_trunk: Reader) -> Family:
    """Return the family of open_clip's models, whose output for images is that of their image tower.

    Args:
        read_trunk: of timm's models.
    """
    return Family(("open_clip.model.CLIP", "open_clip.model.CustomTextCLIP"), partial(_read, read_trunk))


def _read(read_trunk: Reader, model: Any, size: tuple[int, int] | None) -> Reading:
    tower = model.visual
    expect(tower, f"{_FILE}.VisionTransformer", _TIMM)
    if type(tower).__name__ == "TimmModel":
        reading = read_trunk(tower.trunk, size)
        return replace(reading, tail=partial(_timm_tail, reading, tower.head))
    return _read_tower(tower, size)


def _timm_tail(reading: Reading, head: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module:
    return nn.Sequential(reading.tail(dtype, device), isolated(head, dtype, device)).eval()


def _read_tower(tower: Any, size: tuple[int, int] | None) -> Reading:
    if tower.output_tokens:
        raise NoPlanError("its image tower returns tokens besides the embedding")
    own = (int(tower.image_size[0]), int(tower.image_size[1]))
    size = size or own
    check_size(size, own)
    transformer = tower.transformer
    expect(transformer, f"{_FILE}.Transformer")
    pooled = tower.attn_pool is not None
    return whole(
        size,
        tower.conv1,
        [tower.class_embedding],
        tower.positional_embedding,
        read_blocks(
            transformer.resblocks,
            "visual.transformer.resblocks",
            lambda block, index: _read_block(block, transformer.batch_first),
        ),
        tail=partial(Tail, without(tower, "conv1", "ln_pre", "transformer", keep=("proj",)), _head),
        read=1 if tower.pool_type == "tok" and not pooled else None,
        blind=is_layer_norm(tower.ln_post) and not pooled,
        norm_pre=read_norm(tower.ln_pre),
    )


def _read_block(block: Any, batch_first: bool) -> tuple[Step, ...]:
    expect(block, f"{_FILE}.ResidualAttentionBlock")
    attention, mlp = read_attention(block.attn, batch_first=batch_first), read_mlp(block.mlp)
    return pre_norm(attention, mlp, (block.ln_1, block.ln_2), (_read_gamma(block.ls_1), _read_gamma(block.ls_2)))


def _read_gamma(scale: Any) -> Tensor | None:
    if type(scale) is nn.Identity:
        return None
    expect(scale, f"{_FILE}.LayerScale")
    gamma: Tensor = scale.gamma.detach()
    return gamma


def _head(shell: Any, x: Tensor) -> Tensor:
    pooled, _ = shell._pool(x)
    output: Tensor = pooled if shell.proj is None else pooled @ shell.proj
    return output
