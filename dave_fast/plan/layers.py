"""The layers of a plan: what the two walks read.

A step is x ← x + Σ layer(x), a layer an attention or MLP branch whose weights are laid out for both walks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dave_fast.plan.reading import Norm


@dataclass(frozen=True)
class Projection:
    """A linear layer for both walks: `weight` as packed for x Wᵀ, `transposed` for the VJP's g W."""

    weight: Any
    bias: Tensor
    transposed: Any


@dataclass(frozen=True)
class FoldedNorm:
    """What is left of a folded norm: 1/σ of each row; centred: rows have no mean to remove."""

    eps: float
    centred: bool


@dataclass(frozen=True)
class Rotation:
    """Rotary embedding whose halves turn: cos, sin (N, heads or 1, D/2); 1 and 0 for tokens that stay."""

    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class AttentionLayer:
    """An attention branch. `qkv` is split where the step is trimmed: `query` for the read tokens, `key_value` for all.

    norm: ahead of the branch, None where it reads the stream itself · bias: (heads, Q, N) is added to the scores ·
    inner: on the output, ahead of `writer` · post: behind `writer`, not folded.
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
        """Its linear layers."""
        return [p for p in (self.qkv, self.query, self.key_value, self.writer) if p is not None]


@dataclass(frozen=True)
class MlpLayer:
    """An MLP branch; norms as those of `AttentionLayer`, `inner` on the hidden layer."""

    norm: FoldedNorm | None
    fc1: Projection
    activation: str
    inner: FoldedNorm | None
    writer: Projection
    post: Norm | None

    @property
    def projections(self) -> list[Projection]:
        """Its linear layers."""
        return [self.fc1, self.writer]


Layer = AttentionLayer | MlpLayer


@dataclass(frozen=True)
class Step:
    """x ← x + Σ layer(x). trimmed: only the read tokens of x leave it."""

    layers: tuple[Layer, ...]
    trimmed: bool
