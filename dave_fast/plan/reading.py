"""The neutral form in which a family's reader hands a model over: embedding, steps of the residual stream, tail.

`plan` makes the same plan of it whatever the family. A block is one or more *steps*, a step the sum of *branches* that
read the same stream:

    x ← x + Σ branch(x)          branch(x) = post(γ ⊙ W₂ inner(core(W₁ norm(x))))

with attention or an activation, gated or not, as the core; γ and each norm may be missing. A pre-norm block is two
steps of one branch, a parallel block one step of two, a post-norm block has `post` instead of `norm`. Readings hold
the model's own tensors, not copies of them, so that reading is quick: whatever a reader does not know it refuses
(`NoPlanError`), and that is how the engine knows why it has no plan.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class NoPlanError(Exception):
    """The model has something that a plan does not cover; the message says what. Never leaves `plan`."""


@dataclass(frozen=True)
class Linear:
    """weight (O, I), bias (O,)."""

    weight: Tensor
    bias: Tensor

    def rows(self, first: int, last: int) -> Linear:
        """Outputs first to last - 1."""
        return Linear(self.weight[first:last], self.bias[first:last])


@dataclass(frozen=True)
class Norm:
    """A LayerNorm (`centres`) or RMSNorm; weight, bias (C,)."""

    centres: bool
    weight: Tensor
    bias: Tensor
    eps: float


@dataclass(frozen=True)
class Rotary:
    """Rotary embedding of queries and keys: sin, cos (n, D) or (heads, n, D), for all but the first `skip` tokens.

    half: component i turns with i + D/2; else neighbours turn with each other.
    """

    sin: Tensor
    cos: Tensor
    half: bool
    skip: int


@dataclass(frozen=True)
class Attention:
    """An attention branch.

    qkv: query (heads·D, C), key and value (heads/groups·D, C) · groups: query heads that share a head of keys and
    values · q_norm, k_norm: of each head, ahead of the rotation; any module will do where there is none, as nothing
    flows back through it · bias: makes what is added to the scores, (heads, N, N).
    """

    norm: Norm | None
    qkv: tuple[Linear, Linear, Linear]
    heads: int
    head_dim: int
    scale: float
    proj: Linear
    groups: int = 1
    q_norm: Norm | nn.Module | None = None
    k_norm: Norm | nn.Module | None = None
    rotary: Rotary | None = None
    bias: Callable[[], Tensor] | None = None
    inner: Norm | None = None
    gamma: Tensor | None = None
    post: Norm | None = None


@dataclass(frozen=True)
class Mlp:
    """An MLP branch.

    fc1: layers whose outputs follow each other, two for a gated MLP that is not packed · activation: a name of
    `ops.activation`, which says whether there is a gate and where.
    """

    norm: Norm | None
    fc1: tuple[Linear, ...]
    activation: str
    fc2: Linear
    inner: Norm | None = None
    gamma: Tensor | None = None
    post: Norm | None = None


Branch = Attention | Mlp
Step = tuple[Branch, ...]


@dataclass(frozen=True)
class Reading:
    """A model for images of one size.

    projection: of patches (C, c·p_h·p_w), its bias only where `patch_norm` follows it · position: (n, C) is added to
    the patches, the projection's bias included where it is not there ·
    prefix: (k, C) class, distillation and register tokens · read: leading tokens that the tail reads, None for all ·
    tail: makes what follows the last block, (R, tokens, C) -> output, in a dtype · blind: whether the tail is blind to
    a token's mean.
    """

    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    channels: int
    projection: Linear
    patch_norm: Norm | None
    position: Tensor
    prefix: Tensor
    norm_pre: Norm | None
    blocks: tuple[tuple[Step, ...], ...]
    read: int | None
    tail: Callable[[torch.dtype], nn.Module]
    blind: bool

    @property
    def steps(self) -> list[Step]:
        """All blocks' steps in their order."""
        return [step for block in self.blocks for step in block]


@dataclass(frozen=True)
class Family:
    """Model classes, exactly these, and their reader.

    read: (model, (H, W) of the images, or None for those the model was built for) -> Reading; raises NoPlanError.
    """

    classes: tuple[type[nn.Module], ...]
    read: Callable[[Any, tuple[int, int] | None], Reading]
