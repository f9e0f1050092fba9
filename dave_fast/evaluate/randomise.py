"""Parameter randomisation: whether a map depends on what the model has learnt.

The model is randomised stage by stage from the head down (`stages`), cumulatively. Source: Adebayo et al., Sanity
checks for saliency maps, NeurIPS 2018.
"""

from __future__ import annotations

import copy
from collections import defaultdict

import torch
from torch import Tensor

from dave_fast.evaluate import metrics
from dave_fast.evaluate.methods import CONTROLS
from dave_fast.evaluate.scoring import Run, as_maps
from dave_fast.evaluate.stages import stages


def score_randomised(run: Run) -> None:
    """Score rank correlations of the first images' maps with those of a copy of the model, stage after stage."""
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
