"""Randomise the parameters of a model part by part, from the head down to the patch embedding.

A parameter gets normal values of its own mean and standard deviation, so that scales stay and no initialiser is
needed; constants stay. Source: Adebayo et al., Sanity checks for saliency maps, NeurIPS 2018.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn


def stages(model: nn.Module, seed: int = 0) -> list[tuple[str, Callable[[], None]]]:
    """(name, what randomises it in place) of each part of a model, from its output to its input.

    Parts are the model's children in reverse, lists of blocks block by block, at last the model's own parameters.
    Calling the same stages of an equal copy gives equal weights.
    """
    parts: list[tuple[str, nn.Module]] = []
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList | nn.Sequential):
            parts += [(f"{name}.{number}", block) for number, block in child.named_children()]
        else:
            parts.append((name, child))
    found = [(name, list(part.parameters())) for name, part in reversed(parts)]
    found.append(("tokens", list(model.parameters(recurse=False))))
    kept = [(name, parameters) for name, parameters in found if parameters]
    return [(name, partial(_randomise, parameters, seed + number)) for number, (name, parameters) in enumerate(kept)]


@torch.no_grad()
def _randomise(parameters: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        values = parameter.double()
        spread = values.std(correction=0)
        parameter.copy_(values.mean() + spread * drawn.to(parameter.device))
