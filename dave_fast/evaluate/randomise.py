"""Parameter randomisation: whether a map depends on what the model has learnt.

The model is randomised stage by stage from the head down (`stages`), cumulatively. Source: Adebayo et al., Sanity
checks for saliency maps, NeurIPS 2018.
"""

from __future__ import annotations

import copy

import torch

from dave_fast.evaluate import metrics
from dave_fast.evaluate.methods import CONTROLS
from dave_fast.evaluate.scoring import Maps, Run, as_maps
from dave_fast.evaluate.settings import VARIANTS
from dave_fast.evaluate.stages import stages


def score_randomised(run: Run) -> None:
    """Score rank correlations of the first images' maps with those of a copy of the model, stage after stage."""
    count = run.settings.randomised
    images = torch.cat([batch.images for batch, _, _ in run.kept])[:count].to(run.device)
    classes = torch.cat([classes for _, classes, _ in run.kept])[:count].to(run.device)
    keys = [key for batch, _, _ in run.kept for key in batch.keys][:count]
    names = [name for name in run.methods if name not in CONTROLS]
    original = {
        name: {v: torch.cat([maps[name][v] for _, _, maps in run.kept])[:count].to(images) for v in VARIANTS}
        for name in names
    }
    found: dict[str, list[Maps]] = {name: [] for name in names}
    disturbed = copy.deepcopy(run.model)
    changes = stages(disturbed, run.settings.seed)
    for _, randomise in changes:
        randomise()
        for name in names:
            attribute = run.methods[name].make(disturbed, run.setup)
            maps = as_maps(run.explain(name, images, classes, keys, "randomised model", attribute=attribute))
            alike = {v: metrics.rank_correlation(each, maps[v]).cpu() for v, each in original[name].items()}
            found[name].append(alike)
    rows = {name: {v: torch.stack([one[v] for one in each], 1) for v in each[0]} for name, each in found.items()}
    run.results.randomised = (tuple(stage for stage, _ in changes), rows)
    for name, correlations in rows.items():
        run.results.add(name, "random model", {v: each.mean(1) for v, each in correlations.items()})
