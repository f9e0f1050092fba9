"""One evaluation: every image explained and every group of metrics scored."""

from __future__ import annotations

import torch
from torch import nn

from dave_fast.errors import InputError
from dave_fast.evaluate.methods import MethodSettings, choose
from dave_fast.evaluate.mosaics import score_grids
from dave_fast.evaluate.randomise import score_randomised
from dave_fast.evaluate.scoring import Progress, Run
from dave_fast.evaluate.settings import EvaluationSettings, Results
from dave_fast.evaluate.sources import ExampleSource


def evaluate(
    model: nn.Module,
    source: ExampleSource,
    settings: EvaluationSettings,
    setup: MethodSettings,
    progress: Progress | None = None,
) -> Results:
    """Run every method on the source and score it.

    The label of an image is explained, or the predicted class if no label is known.

    Args:
        model: in evaluation mode, on its device; it is not changed.
        source: the images.
        settings: what to measure, and on how many images.
        setup: how the methods are run.
        progress: called with (passes done, passes in all, description).

    Raises:
        InputError: no image of the source can be read.
    """
    chosen, absent = choose(settings.methods, setup.depth)
    return score_all(Run(model, source, settings, setup, chosen, Results(absent=absent), progress))


def score_all(run: Run) -> Results:
    """Explain every image of the run's source, and score every group of metrics of its settings."""
    settings, source = run.settings, run.source
    for start in range(0, run.images, settings.batch_size):
        batch = source.read(start, min(start + settings.batch_size, run.images))
        if batch is not None:
            run.score_batch(batch.to(run.device))
    if not run.right:
        raise InputError(f"no image of {source.title} could be read: {next(iter(source.skipped.values()))}")
    run.close_seeds()
    if run.wants("classes"):
        run.score_pairs()
    if run.wants("randomisation"):
        score_randomised(run)
    if run.wants("grids"):
        score_grids(run)
    known = torch.cat(run.areas)
    run.results.facts |= {
        "images": len(run.right),
        "labelled": run.labelled,
        "accuracy": sum(run.right) / len(run.right),
        "object area": known[known > 0].mean().item() if (known > 0).any() else None,
    }
    return run.results
