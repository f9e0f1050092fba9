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


@dataclass(frozen=True)
class AttentionLayer:
    """An attention branch.

    Attributes:
        norm: ahead of the branch; None where it reads the residual stream itself.
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
        inner: on the output of the heads, ahead of `writer`.
        writer: the projection into the stream.
        post: behind `writer`, not folded.
    """

    norm: FoldedNorm | None
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
    inner: FoldedNorm | None
    writer: Projection
    post: Norm | None

    @property
    def projections(self) -> list[Projection]:
        """All linear layers of the branch."""
        return [p for p in (self.qkv, self.query, self.key_value, self.writer) if p is not None]


@dataclass(frozen=True)
class MlpLayer:
    """An MLP branch.

    Attributes:
        norm: ahead of the branch; None where it reads the residual stream itself.
        fc1: the first linear layer.
        activation: a name of `ops.activation`.
        inner: on the hidden layer, ahead of `writer`.
        writer: the projection into the stream.
        post: behind `writer`, not folded.
    """

    norm: FoldedNorm | None
    fc1: Projection
    activation: str
    inner: FoldedNorm | None
    writer: Projection
    post: Norm | None

    @property
    def projections(self) -> list[Projection]:
        """All linear layers of the branch."""
        return [self.fc1, self.writer]


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
