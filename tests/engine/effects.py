"""What patches do to the output of a step of a model."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# the output of a step and its first argument -> another output
Effect = Callable[[Tensor, Any], Tensor]


def _mixed(y: Tensor, x: Any) -> Tensor:
    return 0.5 * y + 0.5 * x if isinstance(x, Tensor) and x.shape == y.shape else y - 0.5 * y.mean(-1, keepdim=True)


def _masked(y: Tensor, x: Any) -> Tensor:
    return y * (torch.arange(y.shape[-1]) % 3 != 0)


# the last effects have no effective gradient
HOPELESS = 4


def effects(c: float) -> dict[str, Effect]:
    """Return all effects by their names, with one constant."""
    return {
        "nothing": lambda y, x: y,
        "scaled": lambda y, x: c * y,
        "shifted": lambda y, x: y + c,
        "rolled": lambda y, x: y.roll(1, dims=min(1, y.ndim - 1)),
        "reversed": lambda y, x: y.flip(-1),
        "masked": _masked,
        "mixed": _mixed,
        "in place": lambda y, x: y.clone().mul_(c).add_(c),
        "gated by a sigmoid": lambda y, x: y * torch.sigmoid(c * y),
        "gated by a softmax": lambda y, x: y * y.softmax(-1),
        "tanh": lambda y, x: torch.tanh(y),
        "normalised": lambda y, x: F.layer_norm(y, y.shape[-1:]),
        "clamped": lambda y, x: y.clamp(-2.0, 2.0),
        "straight through": lambda y, x: y + c * (y - y.detach()),
        "squared": lambda y, x: y * y,
        "half detached": lambda y, x: c * y + y.detach(),
        "softmax": lambda y, x: y.softmax(-1),
    }


def effect(rng: Random) -> Effect:
    """Return one of the effects; those without an effective gradient are rare, since only a refusal can follow."""
    drawn = effects(rng.choice([0.1, 0.5, -1.0, 1.7]))
    names = list(drawn)
    return drawn[rng.choice(names[:-HOPELESS] + (names if rng.random() < 0.7 else []))]


def applied(act: Effect, result: Any, x: Any) -> Any:
    """Apply an effect to a tensor, or to the first of several results; tables of whole numbers stay as they are."""
    if isinstance(result, tuple):
        return (act(result[0], x), *result[1:])
    return act(result, x) if result.is_floating_point() else result
