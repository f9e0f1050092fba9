"""Contributions of all samples to raw attributions and maps: S samples are stored until their robust mean is taken.

`memory.choose_storage` bounds the storage whatever the batch and the number of targets: as many (image, target) pairs
are aggregated together as fit. All targets of an image share its forward walks where they fit; otherwise targets are
divided into groups, and the images are walked forward once for each group.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dave_fast.engine import free_memory, memory
from dave_fast.engine.bound_ops import PixelOps
from dave_fast.engine.micro_batches import MicroBatches, Pacer, Progress
from dave_fast.sampling import Draws
from dave_fast.targets.cotangents import Cotangent


def raw_attributions(
    batches: MicroBatches,
    images: Tensor,
    draws: Draws,
    targets: Sequence[Cotangent],
    progress: Progress | None,
    *,
    with_variance: bool,
) -> tuple[Tensor, Tensor | None]:
    """Walk all rows of draws, micro-batch by micro-batch, and aggregate them.

    Args:
        batches: the loop over micro-batches.
        images: (B, C, H, W).
        draws: R = B·S rows on the host, image-major.
        targets: cotangents of the output.
        progress: is called with (rows done, rows in all).
        with_variance: whether the variance is estimated too.

    Returns:
        raw (B, targets, C, H, W) in the dtype of the images, and the variance of its sum over channels
        (B, targets, H, W) float64, or None.
    """
    samples, shape, ops = len(draws) // len(images), tuple(images.shape[1:]), batches.ops
    free = free_memory.free_bytes(images.device)
    storage = memory.choose_storage(samples, shape, images.dtype, batches.route.dtype, free)
    together, groups = memory.fitting_pairs(storage, len(targets), free)
    pacer = Pacer(progress, len(draws) * len(groups), images.device)
    raw = images.new_empty(len(images), len(targets), *shape)
    variance = raw.new_empty(*raw.shape[:2], *shape[1:], dtype=torch.float64) if with_variance else None
    for start in range(0, len(images), together):
        some = slice(start, min(start + together, len(images)))
        part = draws[some.start * samples : some.stop * samples]
        on_device = part.to(images.device) if storage.tokens else None
        for group in groups:
            kept = batches.vjps(images, part, targets[group], None if storage.tokens else storage.dtype, pacer.queued)
            for at, of_target in enumerate(kept, group.start):
                if on_device is None:
                    mean, spread = robust_mean(ops, of_target.view(-1, samples, *shape), with_variance=with_variance)
                else:
                    given = (of_target, images, on_device, batches.route.patch_size, samples)
                    mean, spread = (
                        ops.pull_back_mean_variance(*given) if with_variance else (ops.pull_back_mean(*given), None)
                    )
                raw[some, at] = mean
                if variance is not None and spread is not None:
                    variance[some, at] = spread
            # free before those of the next group are made
            del kept, of_target
    pacer.finish()
    return raw, variance


def robust_mean(ops: PixelOps, contributions: Tensor, *, with_variance: bool) -> tuple[Tensor, Tensor | None]:
    """Return raw (B, C, H, W) of contributions (B, S, C, H, W), and the variance (B, H, W) or None."""
    return ops.robust_mean_variance(contributions) if with_variance else (ops.robust_mean(contributions), None)


def maps_of(ops: PixelOps, raw: Tensor, variance: Tensor | None) -> Tensor:
    """Return maps (B, H, W) of raw (B, C, H, W), which is shrunk where its variance (B, H, W) is given."""
    return ops.smooth(raw if variance is None else ops.shrink(raw, variance))
