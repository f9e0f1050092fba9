"""The neutral form in which a family's reader hands a model over: embedding, steps of the residual stream, tail.

The same plan is made of it whatever the family. A block is one or more *steps*, a step the sum of *branches* that read
the same stream:

    x ← x + Σ branch(x)          branch(x) = post(γ ⊙ W₂ inner(core(W₁ norm(x))))

with attention or an activation, gated or not, as the core; γ and each norm may be missing. A pre-norm block is two
steps of one branch, a parallel block one step of two, a post-norm block has `post` instead of `norm`.

Readings hold the model's own tensors, not copies of them, so that reading is quick. A reader raises `NoPlanError` for
anything that it does not know.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dave_fast.errors import ModelError


class NoPlanError(ModelError):
    """A model that the engine has no plan for; the message is the reason, as the end of a sentence."""


class ImageSizeError(NoPlanError):
    """Images of a size that the model itself refuses."""


@dataclass(frozen=True)
class Linear:
    """A linear layer.

    Attributes:
        weight: (O, I).
        bias: (O,).
    """

    weight: Tensor
    bias: Tensor

    def rows(self, first: int, last: int) -> Linear:
        """Return the layer of the outputs first to last - 1."""
        return Linear(self.weight[first:last], self.bias[first:last])


@dataclass(frozen=True)
class Norm:
    """A LayerNorm or an RMSNorm.

    Attributes:
        centres: whether it subtracts the mean, as LayerNorm does.
        weight: (D,).
        bias: (D,).
        eps: added to the variance or the mean square.
    """

    centres: bool
    weight: Tensor
    bias: Tensor
    eps: float


@dataclass(frozen=True)
class Rotary:
    """A rotary embedding of queries and keys.

    Attributes:
        sin: (n, head_dim) or (heads, n, head_dim).
        cos: as `sin`.
        half: whether component i turns with i + head_dim/2; otherwise components are interleaved, neighbours turning
            with each other.
        skip: leading tokens that do not turn.
    """

    sin: Tensor
    cos: Tensor
    half: bool
    skip: int


@dataclass(frozen=True, kw_only=True)
class BranchBase:
    """The parts of a branch that attentions and MLPs have alike.

    Attributes:
        norm: ahead of the branch.
        inner: on the output of the heads or the hidden layer, ahead of the last linear layer.
        gamma: (D,), LayerScale's γ.
        post: behind the branch.
    """

    norm: Norm | None = None
    inner: Norm | None = None
    gamma: Tensor | None = None
    post: Norm | None = None


@dataclass(frozen=True)
class Attention(BranchBase):
    """An attention branch.

    Attributes:
        qkv: query (heads·head_dim, D), key and value (heads/groups·head_dim, D).
        heads: of the queries.
        head_dim: components of a head.
        scale: multiplies the scores.
        proj: (D, heads·head_dim).
        groups: query heads that share a head of keys and values.
        q_norm: of each head's queries, ahead of the rotation. Any module will do where the norm is not known, since
            no cotangent flows back through it.
        k_norm: of each head's keys, likewise.
        rotary: turns queries and keys.
        bias: makes what is added to the scores, (heads, N, N).
    """

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


@dataclass(frozen=True)
class Mlp(BranchBase):
    """An MLP branch.

    Attributes:
        fc1: layers whose outputs are concatenated; two for a gated MLP that is not packed.
        activation: a name of `ops.activation`, which says whether there is a gate and where.
        fc2: (D, M).
    """

    fc1: tuple[Linear, ...]
    activation: str
    fc2: Linear


Branch = Attention | Mlp
Step = tuple[Branch, ...]


@dataclass(frozen=True)
class Reading:
    """A model for images of one size.

    Attributes:
        image_size: (H, W) in pixels.
        patch_size: (p_h, p_w) in pixels.
        channels: C.
        projection: of patches, (D, C·p_h·p_w). Its bias is zero unless `patch_norm` follows.
        patch_norm: of the patches alone.
        position: (n, D) float64, added to the patches; includes the projection's bias unless `patch_norm` follows.
        prefix: (N − n, D) float64, class, distillation and register tokens.
        norm_pre: of all tokens, ahead of the blocks.
        blocks: the steps of each block.
        paths: names of the blocks' modules, without those of what stands around the model that has them.
        read: leading tokens that the tail reads; None for all.
        tail: (dtype, device) -> module of what follows the last block, tokens (R, read, D) -> output (R, ...).
        blind: whether the tail ignores each token's mean.
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
    paths: tuple[str, ...]
    read: int | None
    tail: Callable[[torch.dtype, torch.device], nn.Module]
    blind: bool

    @property
    def steps(self) -> list[Step]:
        """All blocks' steps in their order."""
        return [step for block in self.blocks for step in block]

    @property
    def first_steps(self) -> tuple[int, ...]:
        """Of each block, the number of its first step."""
        return tuple(sum(map(len, self.blocks[:block])) for block in range(len(self.blocks)))


@dataclass(frozen=True)
class Family:
    """Model classes and their reader.

    Attributes:
        classes: full names of exact types, since their library may be absent; subclasses are not read.
        read: (model, (H, W) of the images or None for those that the model was built for) -> Reading; raises
            NoPlanError.
    """

    classes: tuple[str, ...]
    read: Callable[[Any, tuple[int, int] | None], Reading]
