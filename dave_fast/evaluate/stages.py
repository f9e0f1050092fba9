"""The stages in which the parameters of a model are randomised, from the head down to the patch embedding.

A parameter gets normal values of its own mean and standard deviation, so that its scale is kept and no initialiser is
needed; a constant one is unchanged. Source: Adebayo et al., Sanity checks for saliency maps, NeurIPS 2018.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn


def stages(model: nn.Module, seed: int = 0) -> list[tuple[str, Callable[[], None]]]:
    """Return the stages of a model from its output to its input: (name, function that randomises it in place).

    Stages are the model's children in reverse order, each block of a list of blocks, and last the model's own
    parameters. The same stages of an equal copy give equal weights.
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
