"""Modules that users put around a model, or around a module of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.variants import CLASSES

Change = Callable[[nn.Module], nn.Module]


class Own(nn.Module):
    """A module of the user's around one function."""

    def __init__(self, function: Callable[[Tensor], Tensor], *modules: nn.Module) -> None:
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(modules)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        for part in self.parts:
            x = part(x, *args, **kwargs)
        return self.function(x)


class Keeps(nn.Module):
    """A wrapper that keeps what it saw: outputs, counts, and the input's statistics."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.calls, self.kept, self.last = model, 0, [], None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = self.model(x)
        self.kept.append(self.last)
        return self.last


class Ensemble(nn.Module):
    """Two views of one image by one model, as test-time augmentation makes them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return (self.model(x) + self.model(x.flip(-1))) / 2


class Standardised(nn.Module):
    """A normaliser in front of a model, its constants plain tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.mean, self.std = model, torch.full((1, 3, 1, 1), 0.4), [torch.full((1, 3, 1, 1), 0.3)]

    def forward(self, x: Tensor) -> Tensor:
        return self.model((x - self.mean) / self.std[0])


WRAPPERS: dict[str, Change] = {
    "sequential": nn.Sequential,
    "sequential with a layer": lambda model: nn.Sequential(model, nn.Hardtanh(-1e3, 1e3)),
    "data parallel": nn.DataParallel,
    "keeps": Keeps,
    "ensemble": Ensemble,
    "standardised": Standardised,
    "half of the classes": lambda model: Own(lambda x: x[:, : CLASSES - 1], model),
    "calibrated": lambda model: Own(lambda x: x / 1.5, model),
    "probabilities": lambda model: nn.Sequential(model, nn.Softmax(-1)),
    "one of two results": lambda model: Own(lambda x: (x, 2 * x), model),
    "a cut": lambda model: Own(lambda x: x.detach() + 0 * x, model),
}
