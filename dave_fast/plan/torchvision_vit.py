"""torchvision's VisionTransformer."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from dave_fast.plan.multihead import expect, read_attention, read_mlp
from dave_fast.plan.parts import is_layer_norm, pre_norm
from dave_fast.plan.reading import Family, NoPlanError, Reading, Step
from dave_fast.plan.whole import Tail, check_size, patch_grid, read_blocks, shell_of, whole

_FILE = "torchvision.models.vision_transformer"


def _read(model: Any, size: tuple[int, int] | None) -> Reading:
    own = model.image_size, model.image_size
    size = size or own
    check_size(size, own)
    patch_grid(model.conv_proj, size)
    if model.conv_proj.kernel_size != (model.patch_size, model.patch_size):
        raise NoPlanError("its patch embedding has patches of another size than it says")
    encoder = model.encoder
    expect(encoder, f"{_FILE}.Encoder")
    return whole(
        size,
        model.conv_proj,
        [model.class_token],
        encoder.pos_embedding[0],
        read_blocks(encoder.layers, "encoder.layers", lambda block, index: _read_block(block)),
        tail=partial(Tail, shell_of(norm=encoder.ln, heads=model.heads), _head),
        read=1,
        blind=is_layer_norm(encoder.ln),
    )


def _read_block(block: Any) -> tuple[Step, ...]:
    expect(block, f"{_FILE}.EncoderBlock")
    expect(block.mlp, f"{_FILE}.MLPBlock")
    return pre_norm(read_attention(block.self_attention), read_mlp(block.mlp), (block.ln_1, block.ln_2))


def _head(shell: Any, x: Tensor) -> Tensor:
    output: Tensor = shell.heads(shell.norm(x)[:, 0])
    return output


FAMILY = Family((f"{_FILE}.VisionTransformer",), _read)
