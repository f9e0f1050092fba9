"""The grid pointing game on mosaics of images that the model classifies with confidence.

Native tiles keep their pixels: a g×g mosaic is g times as large, and the position embedding of a copy of the model is
resampled (timm's `set_input_size`). Rescaled tiles are shrunk, so that a mosaic has the model's own image size.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from dave_fast.errors import InputError
from dave_fast.evaluate import metrics
from dave_fast.evaluate.scoring import NO_PROBABILITIES, Run, as_maps
from dave_fast.evaluate.settings import GRIDS
from dave_fast.models.meaning import probabilities

# images drawn for each tile: not every one is classified correctly with confidence, and classes run out unevenly
POOL = 4


def score_grids(run: Run) -> None:
    """Score GridPG for every kind of mosaic; the results list the kinds that cannot be made, with the reason."""
    drawn: dict[int, tuple[Tensor, Tensor]] = {}
    for kind in run.settings.grids:
        grid, rescale = GRIDS[kind]
        title = f"GridPG {kind}"
        try:
            drawn[grid] = tiles, labels = drawn.get(grid) or _draw(run, grid)
        except InputError as error:
            run.results.absent[title] = str(error)
            continue
        mosaics = metrics.build_mosaics(tiles, rescale=rescale)
        model = resized(run.model, (mosaics.shape[-2], mosaics.shape[-1]))
        if model is None:
            run.results.absent[title] = f"the model's image size cannot be changed; try {grid}x{grid}-rescaled"
            continue
        run.results.facts.setdefault("mosaics", {})[kind] = len(mosaics)
        for name in run.methods:
            _score(run, name, model, mosaics, labels, title)


def resized(model: nn.Module, size: tuple[int, int]) -> nn.Module | None:
    """Return the model if it takes images of this (height, width), else a copy that does; None if timm makes none."""
    now = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if now is not None and tuple(now) == size:
        return model
    if now is None or not hasattr(model, "set_input_size"):
        return None
    other: Any = copy.deepcopy(model)
    other.set_input_size(img_size=size)
    other.pretrained_cfg = {**(getattr(other, "pretrained_cfg", None) or {}), "input_size": (3, *size)}
    return other


def _draw(run: Run, grid: int) -> tuple[Tensor, Tensor]:
    """Draw M mosaics, fewer than the settings say if images run out: tiles (M, grid², 3, H, W), classes (M, grid²)."""
    wanted = run.settings.mosaics_of(grid)
    pool = run.source.pool(max(100, POOL * wanted * grid**2))
    found = []
    for start in range(0, len(pool), run.settings.batch_size):
        batch = pool.read(start, min(start + run.settings.batch_size, len(pool)))
        if batch is None:
            continue
        output = run.logits(batch.images.to(run.device)).cpu()
        every_probability = probabilities(run.model, output)
        if every_probability.isnan().all():
            raise InputError(NO_PROBABILITIES)
        probability, predicted = every_probability.max(1)
        kept = (predicted == batch.labels) & (probability >= run.settings.confident)
        found.append((batch.images[kept], batch.labels[kept], probability[kept]))
    every, known, sure = (torch.cat(parts) for parts in zip(*found, strict=True))
    if len(known.unique()) < grid**2:
        raise InputError(
            f"{len(known.unique())} classes are named rightly with p ≥ {run.settings.confident:g}, a mosaic needs "
            f"{grid**2}: give more labelled images, or a model that knows them"
        )
    while True:
        try:
            chosen = metrics.choose_mosaics(known, sure, grid, wanted, seed=run.settings.seed)
            return every[chosen], known[chosen]
        except InputError:
            wanted -= 1


def _score(run: Run, name: str, model: nn.Module, mosaics: Tensor, labels: Tensor, title: str) -> None:
    """Score a method: one number for each mosaic, the mean of its cells, so that the bootstrap draws whole mosaics."""
    method = run.methods[name]
    attribute = (method.make_shared or method.make)(model, run.setup)
    cells = torch.arange(labels.shape[1], device=run.device)
    grid = round(labels.shape[1] ** 0.5)
    for number, (mosaic, wanted) in enumerate(zip(mosaics, labels, strict=True)):
        copies = 1 if method.make_shared else len(cells)
        images = mosaic.to(run.device).expand(copies, -1, -1, -1).contiguous()
        classes, keys = wanted.to(run.device), [number] * copies
        maps = as_maps(run.explain(name, images, classes, keys, title, attribute=attribute))
        scores = {v: metrics.grid_pointing_game(each, cells, grid).mean()[None] for v, each in maps.items()}
        run.results.add(name, title, scores)
