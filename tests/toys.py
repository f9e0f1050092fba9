"""Models that are one function, the slopes to expect of them, and engines of models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dave_fast.engine.build import build_engine
from dave_fast.engine.walks import Engine
from dave_fast.frozen.mode import frozen_vjp
from dave_fast.plan.families import read


class Calls(nn.Module):
    """A model that is one function of its input, so that a test can hold its slope in hand."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def relative(a: Tensor, b: Tensor) -> float:
    return float(((a - b).norm() / b.norm()).detach())


def second_score(output: Tensor) -> Tensor:
    return output[:, 1]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slope(function: Callable[[Tensor], Tensor], x: Tensor, cotangent: Tensor) -> Tensor:
    """The frozen gradient of ⟨cotangent, function(x)⟩."""
    model = Calls(function).eval()
    return frozen_vjp(model, x, lambda y: (y * cotangent).flatten(1).sum(1))[1]


def engine_of(model: nn.Module, size: tuple[int, int] | None = None, **settings: Any) -> Engine:
    """Build the engine of a model for images (H, W), by default those that it was built for."""
    return build_engine(read(model, size), **settings)
