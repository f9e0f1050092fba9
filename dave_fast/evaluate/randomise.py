"""Parameter randomisation: does a map change when the model forgets what it learnt?

Stages go from the head down to the patch embedding, each on top of those before (cascading). A parameter gets normal
values of its own mean and standard deviation, so that scales stay and no initialiser is needed; constants stay.
Source: Adebayo et al., Sanity checks for saliency maps, NeurIPS 2018.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dave_fast import metrics
from dave_fast.evaluate.maps import as_maps
from dave_fast.evaluate.methods import CONTROLS

if TYPE_CHECKING:
    from dave_fast.evaluate.scoring import Run


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


def score_randomised(run: Run) -> None:
    """Rank correlations of the first images' maps with those of a copy of the model, stage after stage."""
    images, classes, keys = run.first(run.settings.randomised)
    original = {name: as_maps(run.first_raw(name, len(images)).to(images)) for name in run.methods}
    found: dict[str, dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    disturbed = copy.deepcopy(run.model)
    names = []
    for stage, randomise in stages(disturbed, run.settings.seed):
        randomise()
        names.append(stage)
        for name, method in run.methods.items():
            if name in CONTROLS:
                continue
            attribute = method.make(disturbed, run.setup)
            raw = run.explain(name, attribute, images, classes, keys, run.settings.seed, "randomised model")
            for variant, maps in as_maps(raw).items():
                found[name][variant].append(metrics.rank_correlation(original[name][variant], maps).cpu())
    rows = {name: {v: torch.stack(each, 1) for v, each in variants.items()} for name, variants in found.items()}
    run.results.randomised = (tuple(names), rows)
    for name, variants in rows.items():
        for variant, correlations in variants.items():
            run.results.add(name, variant, "random model", correlations.mean(1))
