"""ViTPlan: the weights of a supported model, laid out once for the two walks.

Folding, in float64, with one cast at the end. With P = I − 11ᵀ/C (the projection that removes a token's mean):

- A norm's weight and bias go into the linear layer that reads it: W ← W·diag(w), b ← b + W·β. Of the norm
  itself one scalar a row is left, its 1/σ, in the forward walk and in the VJP alike.
- A LayerNorm's centring goes into the same reader: W ← W·P. So the reader may be given rows with a mean.
- Where everything that reads the residual stream is blind to a token's mean (all norms are LayerNorms, the
  tail's too), the writers are centred as well: W ← P·W, b ← P·b. The stream then has no mean, 1/σ is that
  of an RMSNorm, and no low-precision digits are spent on the mean. Otherwise 1/σ is taken from the variance.
- LayerScale goes into the writer before it is centred.

The forward half of this is known (Jiang et al., arXiv 2305.14858); the frozen VJP half holds because the
operators that remain are the same.

The last block is trimmed where the head reads only the leading tokens (class token, distillation token):
keys and values are still made for all tokens, everything else for those that are read.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dave_fast.errors import ModelError
from dave_fast.models import timm_vit
from dave_fast.models.timm_vit import BlockReading, Linear, Norm
from dave_fast.precision import statistics_dtype

Pack = Callable[[Tensor], Any]


@dataclass(frozen=True)
class Projection:
    """A linear layer for both walks: `weight` as packed for x Wᵀ, `transposed` for the VJP's g W."""

    weight: Any
    bias: Tensor
    transposed: Any


@dataclass(frozen=True)
class Layer:
    """One block. `qkv` is split where the block is trimmed: `query` for the read tokens, `key_value` for all."""

    qkv: Projection | None
    query: Projection | None
    key_value: Projection | None
    proj: Projection
    fc1: Projection
    fc2: Projection
    heads: int
    head_dim: int
    scale: float
    q_norm: Norm | nn.Module | None
    k_norm: Norm | nn.Module | None
    activation: str
    eps1: float
    eps2: float
    centred1: bool
    centred2: bool


@dataclass(frozen=True)
class ViTPlan:
    """A Vision Transformer laid out for the engine. C width, n patches, N tokens, K classes.

    embed: patch projection (C, c·p_h·p_w), its bias left out · position: (n, C) added to the patches, the
    projection's bias included · prefix: (N − n, C) class, distillation and register tokens ·
    norm_pre: (weight, bias, eps, centres) where the model normalises before the first block ·
    read: leading tokens that the tail reads · tail: final norm, pooling and head as a module.
    """

    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    channels: int
    dtype: torch.dtype
    device: torch.device
    embed: Projection
    position: Tensor
    prefix: Tensor
    norm_pre: Norm | None
    centred: bool
    layers: tuple[Layer, ...]
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

    def projections(self) -> list[Projection]:
        """Every linear layer, from the embedding to the last block."""
        of_layers = [(x.qkv, x.query, x.key_value, x.proj, x.fc1, x.fc2) for x in self.layers]
        return [self.embed, *(p for layer in of_layers for p in layer if p is not None)]


def why_not(model: nn.Module, size: tuple[int, int] | None = None) -> str | None:
    """Why the engine has no plan for this model (at this image size); None when it has one."""
    reason = timm_vit.why_not(model)
    if reason is None and size is not None and timm_vit.grid(model, size) is None:
        return f"images of {size[0]}×{size[1]} do not fit its patches or its position embedding"
    return reason


def make_plan(
    model: nn.Module,
    *,
    dtype: torch.dtype,
    pack: Pack,
    size: tuple[int, int] | None = None,
    device: torch.device | str = "cpu",
    sibling: ViTPlan | None = None,
) -> ViTPlan:
    """Lay a model out for the walks; the model itself is only read.

    Args:
        model: a model for which `why_not` returns None.
        dtype: of weights and activations: float64, float32 or bfloat16.
        pack: what the engine's `linear` wants made of a matrix (O, I) in `dtype`.
        size: (H, W) of the images; the model's own by default.
        sibling: a plan of the same model, dtype and device for another size, whose weights are shared.

    Raises ModelError where there is no plan, with the reason.
    """
    reason = why_not(model, size)
    if reason is not None:
        raise ModelError(f"the engine has no plan for this model: {reason}. Use route='auto' or 'frozen'.")
    vit: Any = model
    size = size or timm_vit.image_size(vit)
    maker = _Maker(dtype, pack, torch.device(device))
    embed, position, prefix = timm_vit.read_embedding(vit, size)
    norm_pre = None
    if type(vit.norm_pre) is not nn.Identity:
        norm_pre = timm_vit.read_norm(vit.norm_pre, position.shape[1])
    centred = timm_vit.tail_centres(vit) and all(
        type(norm) in timm_vit.LAYER_NORMS for block in vit.blocks for norm in (block.norm1, block.norm2)
    )
    if centred and norm_pre is None:
        embed = _centre_writer(embed)
        position, prefix = _remove_mean(position), _remove_mean(prefix)
    read = timm_vit.read_tokens(vit) or position.shape[0] + prefix.shape[0]
    if sibling is not None:
        # all but the positions is the same for every image size
        return replace(sibling, image_size=size, position=maker.cast(position), read=read)
    last = len(vit.blocks) - 1
    layers = tuple(
        maker.layer(reading, centred, trimmed=i == last and read < position.shape[0] + prefix.shape[0])
        for i, reading in enumerate(timm_vit.read_blocks(vit))
    )
    return ViTPlan(
        image_size=size,
        patch_size=tuple(vit.patch_embed.patch_size),
        channels=vit.patch_embed.proj.in_channels,
        dtype=dtype,
        device=maker.device,
        embed=maker.projection(Linear(embed.weight, torch.zeros_like(embed.bias))),
        position=maker.cast(position),
        prefix=maker.cast(prefix),
        norm_pre=None if norm_pre is None else maker.norm(norm_pre),
        centred=centred,
        layers=layers,
        read=read,
        tail=timm_vit.Tail(vit, statistics_dtype(dtype)).to(maker.device),
    )


@dataclass(frozen=True)
class _Maker:
    dtype: torch.dtype
    pack: Pack
    device: torch.device

    def cast(self, t: Tensor) -> Tensor:
        return t.to(device=self.device, dtype=self.dtype).contiguous()

    def projection(self, linear: Linear, transposed: Tensor | None = None) -> Projection:
        """transposed: what the VJP multiplies with, where it is not the whole weight."""
        back = linear.weight if transposed is None else transposed
        return Projection(self.pack(self.cast(linear.weight)), self.cast(linear.bias), self.pack(self.cast(back.T)))

    def layer(self, block: BlockReading, centred: bool, *, trimmed: bool) -> Layer:
        qkv, fc1 = _fold_reader(block.qkv, block.norm1), _fold_reader(block.fc1, block.norm2)
        proj, fc2 = block.proj, block.fc2
        if centred:
            proj, fc2 = _centre_writer(proj), _centre_writer(fc2)
        width = block.heads * block.head_dim
        values = qkv.weight[2 * width :]
        whole = query = key_value = None
        if trimmed:
            query = self.projection(Linear(qkv.weight[:width], qkv.bias[:width]))
            key_value = self.projection(Linear(qkv.weight[width:], qkv.bias[width:]), values)
        else:
            whole = self.projection(qkv, values)
        return Layer(
            qkv=whole,
            query=query,
            key_value=key_value,
            proj=self.projection(proj),
            fc1=self.projection(fc1, _value_half(fc1.weight, block.activation)),
            fc2=self.projection(fc2),
            heads=block.heads,
            head_dim=block.head_dim,
            scale=block.scale,
            q_norm=self._head_norm(block.q_norm, block.head_dim),
            k_norm=self._head_norm(block.k_norm, block.head_dim),
            activation=block.activation,
            eps1=block.norm1.eps,
            eps2=block.norm2.eps,
            centred1=centred or not block.norm1.centres,
            centred2=centred or not block.norm2.centres,
        )

    def norm(self, norm: Norm) -> Norm:
        """A norm that is not folded: its numbers on the device, in the dtype of statistics."""
        weight, bias = (t.to(self.device, statistics_dtype(self.dtype)) for t in (norm.weight, norm.bias))
        return replace(norm, weight=weight, bias=bias)

    def _head_norm(self, module: nn.Module | None, dim: int) -> Norm | nn.Module | None:
        """A known norm as its numbers, any other as it is."""
        if module is None:
            return None
        if timm_vit.norm_reason(module) is None:
            return self.norm(timm_vit.read_norm(module, dim))
        return copy.deepcopy(module).to(device=self.device, dtype=self.dtype).requires_grad_(False)


def _value_half(weight: Tensor, activation: str) -> Tensor:
    """The rows of a gated MLP's first weight that make the value; all rows where there is no gate."""
    if "_glu" not in activation:
        return weight
    first, last = weight.chunk(2)
    return first if activation.endswith("_glu_last") else last


def _remove_mean(rows: Tensor) -> Tensor:
    return rows - rows.mean(-1, keepdim=True)


def _fold_reader(linear: Linear, norm: Norm) -> Linear:
    """W·diag(w)[·P] and b + W·β."""
    scale, shift = norm.weight.to(linear.weight), norm.bias.to(linear.weight)
    weight = linear.weight * scale
    return Linear(_remove_mean(weight) if norm.centres else weight, linear.bias + linear.weight @ shift)


def _centre_writer(linear: Linear) -> Linear:
    """P·W and P·b."""
    return Linear(linear.weight - linear.weight.mean(0), linear.bias - linear.bias.mean())
