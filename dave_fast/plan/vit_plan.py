"""ViTPlan: the weights of a supported model, laid out once for the two walks.

A family's reader (`models/`) gives steps of the residual stream, x ← x + Σ branch(x); each becomes layers here
(`layers`, `folding`).

The last step with attention is trimmed where the head reads only the leading tokens (class token, distillation
token): keys and values are still made for all tokens, everything else, from there on, for those that are read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dave_fast.errors import ModelError
from dave_fast.ops.precision import statistics_dtype
from dave_fast.plan import families
from dave_fast.plan.folding import Maker, Pack, centre_writer, double, remove_mean
from dave_fast.plan.layers import AttentionLayer, Layer, MlpLayer, Projection, Step
from dave_fast.plan.reading import NoPlanError, Norm


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


def why_not(model: nn.Module, size: tuple[int, int] | None = None) -> str | None:
    """Why the engine has no plan for this model (at this image size); None when it has one."""
    try:
        families.read(model, size)
    except NoPlanError as reason:
        return str(reason)
    return None


def make_plan(
    model: nn.Module,
    *,
    dtype: torch.dtype,
    pack: Pack,
    pack_embed: Pack | None = None,
    size: tuple[int, int] | None = None,
    device: torch.device | str = "cpu",
    sibling: ViTPlan | None = None,
) -> ViTPlan:
    """Lay a model out for the walks; the model itself is only read.

    Args:
        model: a model for which `why_not` returns None.
        dtype: of weights and activations: float64, float32 or bfloat16.
        pack: what the engine's `linear` wants made of a matrix (O, I) in `dtype`.
        pack_embed: the same for the patch embedding, where that is another `linear`'s.
        size: (H, W) of the images; the model's own by default.
        sibling: a plan of the same model, dtype and device for another size, whose weights are shared.

    Raises ModelError where there is no plan, with the reason.
    """
    try:
        read = families.read(model, size)
    except NoPlanError as reason:
        raise ModelError(f"the engine has no plan for this model: {reason}. Use route='auto' or 'frozen'.") from None
    steps = read.steps
    norms = [branch.norm for step in steps for branch in step]
    centred = read.blind and all(norm is not None and norm.centres for norm in norms)
    maker = Maker(dtype, pack, torch.device(device), read, centred)
    embed, position, prefix = double(read.projection), read.position, read.prefix
    if centred and read.norm_pre is None:
        position, prefix = remove_mean(position), remove_mean(prefix)
        # behind a norm the norm's own result is centred
        embed = centre_writer(embed) if read.patch_norm is None else embed
    if sibling is not None:
        # all but positions, rotations and biases is the same for every image size
        return replace(
            sibling,
            image_size=read.image_size,
            position=maker.cast(position),
            read=maker.read,
            steps=maker.resized(sibling.steps, steps),
        )
    return ViTPlan(
        image_size=read.image_size,
        patch_size=read.patch_size,
        channels=read.channels,
        dtype=dtype,
        device=maker.device,
        embed=replace(maker, pack=pack_embed or pack).projection(embed),
        patch_norm=maker.norm(read.patch_norm),
        position=maker.cast(position),
        prefix=maker.cast(prefix),
        norm_pre=maker.norm(read.norm_pre),
        centred=centred,
        steps=tuple(maker.step(step, i) for i, step in enumerate(steps)),
        read=maker.read,
        tail=read.tail(statistics_dtype(dtype)).to(maker.device),
    )
