"""Evidence at every block, sample by sample: a file for each image, for `scripts/depth.py` to make maps of any form.

A file holds what one image's walks told for K classes at L blocks of n patches, in float32:

    evidence   (L, K, S, n)    of the patches that enter each block, of each sample
    plain      (L, K + 2, n)   the same of the unperturbed image, for the K classes and then the two likeliest
    tokens     (L, K + 2)      of the unperturbed image, summed over all tokens
    logits     (K + 2,)        of the same classes
    pixels     (2, 2, K, H, W) the paper's signed maps of the first 16 and of all samples, and these shrunk
    mask (H, W) or cells (K,)  where the classes are
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dave_fast import DAVE
from dave_fast.engine.end_of_call import EndOfCall
from dave_fast.engine.levels import Levels, Pulled
from dave_fast.engine.micro_batches import MicroBatches
from dave_fast.evaluate.items import Item
from dave_fast.evaluate.mosaics import resized
from dave_fast.ops.robust_mean import robust_mean_variance
from dave_fast.ops.shrink import shrink
from dave_fast.sampling import Draws, draw, identity
from dave_fast.targets.cotangents import ElementCotangent

# samples of the pixels' smaller maps, and rows that are walked and stored at a time
FEW, ROWS = 16, 16


@dataclass(frozen=True)
class Run:
    """Images of one kind under one model and noise level.

    Attributes:
        name: of its folder: model, head and kind.
        model: for images of the items' size, or to be resized for them.
        items: photographs, scenes or mosaics.
        alphas: noise levels; 0 is transformations alone.
        samples: S of each item.
        precision: None for the device's own.
    """

    name: str
    model: nn.Module
    items: Sequence[Item]
    alphas: tuple[float, ...]
    samples: int
    precision: str | None = None


def folder_of(root: Path, name: str, alpha: float) -> Path:
    """Return the folder of a run's files at one noise level."""
    return root / name.replace(" ", "-") / f"alpha-{alpha:g}"


def collect(run: Run, root: Path) -> None:
    """Write the files of a run that are absent."""
    height, width = run.items[0].image.shape[2:]
    model = resized(run.model, (height, width))
    if model is None:
        raise SystemExit(f"{run.name}: the model's image size cannot be changed to {height}×{width}")
    for alpha in run.alphas:
        explainer, folder = DAVE(model, noise_alpha=alpha, precision=run.precision), folder_of(root, run.name, alpha)
        folder.mkdir(parents=True, exist_ok=True)
        for number, item in enumerate(run.items):
            # the key of its draws
            path = folder / f"{item.key:03d}.npz"
            if not path.exists():
                write(explainer, item, run.samples, path)
                print(f"{run.name}, alpha {alpha:g}: {number + 1} of {len(run.items)}", flush=True)


def write(explainer: DAVE, item: Item, samples: int, path: Path) -> None:
    """Explain one item and write its file atomically."""
    found = explain(explainer, item, samples)
    place = item.mask if item.cells is None else item.cells
    assert place is not None
    found["mask" if item.cells is None else "cells"] = place
    part = path.with_suffix(".part.npz")
    np.savez(part, **{name: values.numpy() for name, values in found.items()})
    os.replace(part, path)


def draws_of(samples: int, key: int, size: tuple[int, int], explainer: DAVE) -> Draws:
    """Return the draws of an item of this key."""
    return draw(samples, height=size[0], width=size[1], image_keys=(key,), sampling=explainer.sampling)


def explain(explainer: DAVE, item: Item, samples: int) -> dict[str, Tensor]:
    """Return what the file of an item holds, without its place."""
    draws = draws_of(samples, item.key, (item.image.shape[2], item.image.shape[3]), explainer)

    def work(images: Tensor, batches: MicroBatches, end: EndOfCall) -> dict[str, Tensor]:
        output = batches.outputs(images).float()
        classes = torch.cat([item.classes, output[0].topk(2).indices])
        targets = [ElementCotangent(one, one) for one in classes[:, None]]
        blocks = tuple(range(len(batches.route.blocks)))
        prefix = batches.route.blocks[0].prefix
        plain = batches.vjps(images, identity(1), targets, None, levels=Levels(False, blocks)).evidence
        parts = [
            batches.vjps(
                images, draws[at : at + ROWS], targets[: len(item.classes)], images.dtype, None, Levels(True, blocks)
            )
            for at in range(0, samples, ROWS)
        ]
        end.read()
        return {
            "evidence": torch.stack([torch.cat(of, 1) for of in zip(*(part.evidence for part in parts), strict=True)])[
                ..., prefix:
            ],
            "plain": torch.stack(plain)[:, :, 0, prefix:],
            "tokens": torch.stack(plain)[:, :, 0].sum(-1),
            "logits": output[0, classes],
            "pixels": pixel_maps(parts),
        }

    return explainer._cache.call(item.image, work)


def pixel_maps(parts: Sequence[Pulled]) -> Tensor:
    """Return the paper's signed maps and shrunk ones of the first samples and of all, (2, 2, K, H, W)."""
    every = torch.cat([part.pixels for part in parts if part.pixels is not None], 1)
    made = []
    for size in (FEW, every.shape[1]):
        raw, variance = robust_mean_variance(every[:, :size].contiguous())
        made.append(torch.stack([raw.sum(1), shrink(raw, variance)[:, 0]]))
    return torch.stack(made, 1)
