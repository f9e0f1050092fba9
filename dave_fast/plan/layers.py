"""The layers of a plan, as the two walks read them.

A step is x ← x + Σ layer(x), a layer an attention or MLP branch whose weights are laid out for both walks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dave_fast.plan.reading import Norm


@dataclass(frozen=True)
class Projection:
    """A linear layer for both walks.

    Attributes:
        weight: packed for x Wᵀ of the forward walk.
        bias: (O,).
        transposed: packed for g W of the VJP walk.
    """

    weight: Any
    bias: Tensor
    transposed: Any


@dataclass(frozen=True)
class FoldedNorm:
    """A norm whose weight and bias were folded into the next linear layer: 1/σ of each row is left to compute.

    Attributes:
        eps: added to the variance.
        centred: whether the rows have no mean to remove.
    """

    eps: float
    centred: bool


@dataclass(frozen=True)
class Rotation:
    """A rotary embedding in which component i of a head turns with i + head_dim/2.

    Attributes:
        cos: (N, heads or 1, head_dim/2); 1 for tokens that do not turn.
        sin: likewise; 0 for tokens that do not turn.
    """

    cos: Tensor
    sin: Tensor


@dataclass(frozen=True, kw_only=True)
class LayerBase:
    """The parts of a branch that attentions and MLPs have alike.

    Attributes:
        norm: ahead of the branch; None where it reads the residual stream itself.
        inner: on the output of the heads or the hidden layer, ahead of `writer`.
        writer: the projection into the stream.
        post: behind `writer`, not folded.
    """

    norm: FoldedNorm | None
    inner: FoldedNorm | None
    writer: Projection
    post: Norm | None

    @property
    def readers(self) -> list[Projection]:
        """The linear layers that read the stream."""
        raise NotImplementedError

    @property
    def projections(self) -> list[Projection]:
        """All linear layers of the branch."""
        return [*self.readers, self.writer]


@dataclass(frozen=True, kw_only=True)
class AttentionLayer(LayerBase):
    """An attention branch.

    Attributes:
        qkv: packed projection; None in a trimmed step.
        query: in a trimmed step, the projection of the tokens that are read.
        key_value: in a trimmed step, the projection of all tokens.
        heads: number of heads.
        head_dim: components of a head.
        scale: multiplies the scores.
        q_norm: of each head's queries.
        k_norm: of each head's keys.
        rotation: turns queries and keys.
        bias: (heads, Q, N), added to the scores; Q is the number of queries.
    """

    qkv: Projection | None
    query: Projection | None
    key_value: Projection | None
    heads: int
    head_dim: int
    scale: float
    q_norm: Norm | nn.Module | None
    k_norm: Norm | nn.Module | None
    rotation: Rotation | None
    bias: Tensor | None

    @property
    def readers(self) -> list[Projection]:
        """The linear layers that read the stream."""
        return [p for p in (self.qkv, self.query, self.key_value) if p is not None]


@dataclass(frozen=True, kw_only=True)
class MlpLayer(LayerBase):
    """An MLP branch.

    Attributes:
        fc1: the first linear layer.
        activation: a name of `ops.activation`.
    """

    fc1: Projection
    activation: str

    @property
    def readers(self) -> list[Projection]:
        """The linear layer that reads the stream."""
        return [self.fc1]


Layer = AttentionLayer | MlpLayer


@dataclass(frozen=True)
class Step:
    """A step x ← x + Σ layer(x) of the residual stream.

    Attributes:
        layers: branches that read the same stream.
        trimmed: whether only the tokens that the tail reads leave the step.
    """

    layers: tuple[Layer, ...]
    trimmed: bool
