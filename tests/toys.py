"""Models that are one function, frozen gradients of them, and engines of models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dave_fast.engine.build import build_engine
from dave_fast.engine.walks import Engine
from dave_fast.frozen.mode import freeze, run_frozen
from dave_fast.plan.families import read


class Calls(nn.Module):
    """A model that is one function of its input, whose frozen gradient a test can compute by hand."""

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


def frozen_forward(model: nn.Module, inputs: Tensor) -> Tensor:
    """Return a model's output for inputs (B, C, H, W) with frozen operators and a graph, also under `no_grad`."""
    with torch.inference_mode(False), torch.enable_grad():
        return run_frozen(model, inputs.clone(), freeze(inputs))


def frozen_vjp(model: nn.Module, inputs: Tensor, target_fn: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Return a model's output (B, K) and the frozen gradient (B, C, H, W) of one score an image.

    target_fn maps the output to scores (B,); score b may depend on row b alone, so that one backward pass of the sum
    serves the batch.
    """
    with torch.inference_mode(False), torch.enable_grad():
        leaf = inputs.clone().detach().requires_grad_()
        output = frozen_forward(model, leaf)
        scores = target_fn(output)
        # the backward pass of a checkpointed model repeats its forward pass
        with freeze(leaf):
            (gradient,) = torch.autograd.grad(scores.sum(), leaf)
    return output.detach(), gradient


def slope(function: Callable[[Tensor], Tensor], x: Tensor, cotangent: Tensor) -> Tensor:
    """Return the frozen gradient of ⟨cotangent, function(x)⟩ with respect to x."""
    model = Calls(function).eval()
    return frozen_vjp(model, x, lambda y: (y * cotangent).flatten(1).sum(1))[1]


def engine_of(model: nn.Module, size: tuple[int, int] | None = None, **settings: Any) -> Engine:
    """Build the engine of a model for images (H, W), by default those that it was built for."""
    return build_engine(read(model, size), **settings)
