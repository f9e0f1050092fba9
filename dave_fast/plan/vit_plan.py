"""ViTPlan: the weights of a supported model, laid out once for the two walks.

A family's reader (`models/`) gives steps of the residual stream, x ← x + Σ branch(x); each becomes layers here
(`layers`, `folding`).

The last step with attention is trimmed where the head reads only the leading tokens (class token, distillation
token): keys and values are still made for all tokens, everything else, from there on, for those that are read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dave_fast.ops.precision import statistics_dtype
from dave_fast.plan.folding import LayerBuilder, Pack, centre_writer, double, remove_mean
from dave_fast.plan.layers import AttentionLayer, Layer, MlpLayer, Projection, Step
from dave_fast.plan.reading import Norm, Reading


@dataclass(frozen=True)
class ViTPlan:
    """A Vision Transformer laid out for the engine. C width, n patches, N tokens, K classes.

    embed: patch projection (C, c·p_h·p_w), its bias left out but ahead of a norm · patch_norm: of the patches alone ·
    position: (n, C) added to the patches, with the projection's bias where that was left out · prefix: (N − n, C)
    class, distillation and register tokens · norm_pre: of all tokens, before the first block ·
    read: leading tokens that the tail reads · tail: final norm, pooling and head as a module.
    """

    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    channels: int
    dtype: torch.dtype
    device: torch.device
    embed: Projection
    patch_norm: Norm | None
    position: Tensor
    prefix: Tensor
    norm_pre: Norm | None
    centred: bool
    steps: tuple[Step, ...]
    read: int
    tail: nn.Module

    @property
    def width(self) -> int:
        """C."""
        return self.position.shape[1]

    @property
    def tokens(self) -> int:
        """N, prefix tokens included."""
        return self.position.shape[0] + self.prefix.shape[0]

    @property
    def layers(self) -> list[Layer]:
        """Every step's layers."""
        return [layer for step in self.steps for layer in step.layers]

    @property
    def attention(self) -> AttentionLayer:
        """The first one: all are of one size, but for a trimmed one."""
        return next(layer for layer in self.layers if isinstance(layer, AttentionLayer))

    @property
    def mlp(self) -> MlpLayer:
        """The first one: all are of one size."""
        return next(layer for layer in self.layers if isinstance(layer, MlpLayer))

    def projections(self) -> list[Projection]:
        """Every linear layer, from the embedding to the last block."""
        return [self.embed, *(p for layer in self.layers for p in layer.projections)]

    def tables(self) -> list[Tensor]:
        """What depends on the image size beside the positions: rotations and biases, each once."""
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
    device: torch.device | str = "cpu",
    sibling: ViTPlan | None = None,
) -> ViTPlan:
    """Lay out a model that was read (`families.read`) for the two walks.

    Args:
        reading: the model for images of one size.
        dtype: of weights and activations: float64, float32 or bfloat16.
        pack: makes the form that the engine's `linear` takes of a matrix (O, I) in `dtype`.
        pack_embed: the same for the patch embedding; `pack` by default.
        device: on which the plan's tensors are made.
        sibling: a plan of the same model, dtype and device for another image size, whose weights are shared.
    """
    norms = [branch.norm for step in reading.steps for branch in step]
    centred = reading.blind and all(norm is not None and norm.centres for norm in norms)
    builder = LayerBuilder(dtype, pack, torch.device(device), reading, centred)
    embed, position, prefix = double(reading.projection), reading.position, reading.prefix
    if centred and reading.norm_pre is None:
        position, prefix = remove_mean(position), remove_mean(prefix)
        # behind a norm the norm's own result is centred
        embed = centre_writer(embed) if reading.patch_norm is None else embed
    sized: dict[str, Any] = {"image_size": reading.image_size, "position": builder.cast(position), "read": builder.read}
    if sibling is not None:
        # the other fields do not depend on the image size
        return replace(sibling, steps=builder.resized(sibling.steps, reading.steps), **sized)
    return ViTPlan(
        **sized,
        patch_size=reading.patch_size,
        channels=reading.channels,
        dtype=dtype,
        device=builder.device,
        embed=replace(builder, pack=pack_embed or pack).projection(embed),
        patch_norm=builder.norm(reading.patch_norm),
        prefix=builder.cast(prefix),
        norm_pre=builder.norm(reading.norm_pre),
        centred=centred,
        steps=tuple(builder.step(step, i) for i, step in enumerate(reading.steps)),
        tail=reading.tail(statistics_dtype(dtype)).to(builder.device),
    )
