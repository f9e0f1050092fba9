"""ViTPlan: the weights of a supported model, laid out once for the two walks.

A family's reader gives steps of the residual stream, x ← x + Σ branch(x) (`reading`); `folding` turns their branches
into layers.

The last step with attention is trimmed where the head reads only the leading tokens (class token, distillation
token): keys and values are still made for all tokens, everything after them only for the tokens that are read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dave_fast.ops.precision import statistics_dtype
from dave_fast.plan.folding import LayerBuilder, Pack, centre_writer, double, remove_mean
from dave_fast.plan.layers import AttentionLayer, Layer, MlpLayer, Projection, Step
from dave_fast.plan.reading import Linear, Norm, Reading


@dataclass(frozen=True)
class ViTPlan:
    """A Vision Transformer laid out for the engine.

    Attributes:
        image_size: (H, W) in pixels.
        patch_size: (p_h, p_w) in pixels.
        channels: C.
        dtype: of weights and activations.
        stream: dtype of the residual stream, of its cotangent and of biases.
        device: on which all tensors are.
        embed: patch projection, (D, C·p_h·p_w). Its bias is zero unless `patch_norm` follows.
        patch_norm: of the patches alone.
        position: (n, D), added to the patches; includes the projection's bias unless `patch_norm` follows.
        prefix: (N − n, D), class, distillation and register tokens.
        norm_pre: of all tokens, ahead of the first block.
        centred: whether the residual stream has no mean (`folding`).
        steps: of the residual stream.
        first_steps: of each block, the number of its first step.
        read: leading tokens that the tail reads.
        tail: final norm, pooling and head: tokens (R, read, D) -> output (R, ...).
    """

    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    channels: int
    dtype: torch.dtype
    stream: torch.dtype
    device: torch.device
    embed: Projection
    patch_norm: Norm | None
    position: Tensor
    prefix: Tensor
    norm_pre: Norm | None
    centred: bool
    steps: tuple[Step, ...]
    first_steps: tuple[int, ...]
    read: int
    tail: nn.Module

    @property
    def width(self) -> int:
        """D."""
        return self.position.shape[1]

    @property
    def tokens(self) -> int:
        """N, prefix tokens included."""
        return self.position.shape[0] + self.prefix.shape[0]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows of patches, and patches of a row."""
        (height, width), (p_h, p_w) = self.image_size, self.patch_size
        return height // p_h, width // p_w

    @property
    def whole_blocks(self) -> dict[int, int]:
        """Number of the first step -> number of the block, of the blocks that all tokens enter."""
        trimmed = next((i for i, step in enumerate(self.steps) if step.trimmed), len(self.steps))
        return {step: block for block, step in enumerate(self.first_steps) if step <= trimmed}

    @property
    def layers(self) -> list[Layer]:
        """All layers in the order of their steps."""
        return [layer for step in self.steps for layer in step.layers]

    @property
    def attention(self) -> AttentionLayer:
        """The first attention; all others have the same shapes, except in a trimmed step."""
        return next(layer for layer in self.layers if isinstance(layer, AttentionLayer))

    @property
    def mlp(self) -> MlpLayer:
        """The first MLP; all others have the same shapes."""
        return next(layer for layer in self.layers if isinstance(layer, MlpLayer))

    def projections(self) -> list[Projection]:
        """Return all linear layers from the embedding to the last block."""
        return [self.embed, *(p for layer in self.layers for p in layer.projections)]

    def tables(self) -> list[Tensor]:
        """Return the tensors that depend on the image size besides the positions: rotations and biases, each once."""
        found: dict[int, Tensor] = {}
        for layer in self.layers:
            if isinstance(layer, AttentionLayer):
                rotation = () if layer.rotation is None else (layer.rotation.cos, layer.rotation.sin)
                found |= {id(t): t for t in (layer.bias, *rotation) if t is not None}
        return list(found.values())


def make_plan(
    reading: Reading,
    *,
    dtype: torch.dtype,
    pack: Pack,
    pack_embed: Pack | None = None,
    packed: torch.dtype | None = None,
    stream: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    sibling: ViTPlan | None = None,
) -> ViTPlan:
    """Lay out a model that was read (`families.read`) for the two walks.

    Args:
        reading: the model for images of one size.
        dtype: of weights and activations: float64, float32 or bfloat16.
        pack: makes the form that the engine's `linear` takes of a matrix (O, I) in `packed`.
        pack_embed: the same for the patch embedding, of a matrix in `dtype`; `pack` by default.
        packed: dtype of the other matrices before they are packed; `dtype` by default.
        stream: dtype of the residual stream, its cotangent and biases; `dtype` by default.
        device: on which the plan's tensors are made.
        sibling: a plan of the same model, dtype and device for another image size, whose weights are shared.
    """
    norms = [branch.norm for step in reading.steps for branch in step]
    centred = reading.blind and all(norm is not None and norm.centres for norm in norms)
    stream = stream or dtype
    builder = LayerBuilder(dtype, stream, packed or dtype, pack, torch.device(device), reading, centred)
    embed, position, prefix = _embedding(reading, centred=centred)
    sized: dict[str, Any] = {
        "image_size": reading.image_size,
        "position": builder.cast(position, stream),
        "read": builder.read,
    }
    if sibling is not None:
        # the other fields do not depend on the image size
        return replace(sibling, steps=builder.resized(sibling.steps, reading.steps), **sized)
    return ViTPlan(
        **sized,
        patch_size=reading.patch_size,
        channels=reading.channels,
        dtype=dtype,
        stream=stream,
        device=builder.device,
        embed=replace(builder, packed=dtype, pack=pack_embed or pack).projection(embed),
        patch_norm=builder.norm(reading.patch_norm),
        prefix=builder.cast(prefix, stream),
        norm_pre=builder.norm(reading.norm_pre),
        centred=centred,
        steps=tuple(builder.step(step, i) for i, step in enumerate(reading.steps)),
        first_steps=reading.first_steps,
        tail=reading.tail(statistics_dtype(dtype), builder.device),
    )


def _embedding(reading: Reading, *, centred: bool) -> tuple[Linear, Tensor, Tensor]:
    """Return projection, positions and prefix tokens in float64, centred where they enter a centred stream."""
    embed = double(reading.projection)
    if not centred or reading.norm_pre is not None:
        return embed, reading.position, reading.prefix
    # where a norm follows the projection, the engine centres the norm's result
    embed = centre_writer(embed) if reading.patch_norm is None else embed
    return embed, remove_mean(reading.position), remove_mean(reading.prefix)
