"""Contributions of all samples to raw attributions and maps: S samples are stored until their robust mean is taken.

`memory.choose_storage` bounds the storage whatever the batch and the number of targets: as many (image, target) pairs
are aggregated together as fit. All targets of an image share its forward walks where they fit; otherwise targets are
divided into groups, and the images are walked forward once for each group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from dave_fast.engine import free_memory, memory
from dave_fast.engine.bound_ops import PixelOps
from dave_fast.engine.micro_batches import MicroBatches, Pacer, Progress
from dave_fast.sampling import Draws
from dave_fast.targets.cotangents import Cotangent


def attributions(
    batches: MicroBatches,
    images: Tensor,
    draws: Draws,
    targets: Sequence[Cotangent],
    progress: Progress | None,
    *,
    shrink: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Walk all rows of draws, micro-batch by micro-batch, and aggregate them.

    Args:
        batches: the loop over micro-batches.
        images: (B, C, H, W).
        draws: R = B·S rows on the host, image-major.
        targets: cotangents of the output.
        progress: is called with (rows done, rows in all).
        shrink: whether the maps are shrunk.

    Returns:
        raw (B, targets, C, H, W), signed maps and maps (B, targets, H, W), all in the dtype of the images.
    """
    samples, shape, ops = len(draws) // len(images), tuple(images.shape[1:]), batches.ops
    free = free_memory.free_bytes(images.device)
    storage = memory.choose_storage(samples, shape, images.dtype, batches.route.dtype, free)
    together, groups = memory.fitting_pairs(storage, len(targets), free)
    pacer = Pacer(progress, len(draws) * len(groups), images.device)
    raw = images.new_empty(len(images), len(targets), *shape)
    signed, maps = (images.new_empty(len(images), len(targets), *shape[1:]) for _ in range(2))
    for start in range(0, len(images), together):
        some = slice(start, min(start + together, len(images)))
        part = draws[some.start * samples : some.stop * samples]
        on_device = part.to(images.device) if storage.tokens else None
        for group in groups:
            kept = batches.vjps(images, part, targets[group], None if storage.tokens else storage.dtype, pacer.queued)
            for at, of_target in enumerate(kept, group.start):
                if on_device is None:
                    made = aggregate(ops, of_target.view(-1, samples, *shape), shrink=shrink)
                else:
                    given = (of_target, images, on_device, batches.route.patch_size, samples)
                    made = _with_maps(ops, ops.pull_back_mean, ops.pull_back_mean_variance, given, shrink=shrink)
                raw[some, at], signed[some, at], maps[some, at] = made
            # free before those of the next group are made
            del kept, of_target
    pacer.finish()
    return raw, signed, maps


def aggregate(ops: PixelOps, contributions: Tensor, *, shrink: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return raw (B, C, H, W), signed maps and maps (B, H, W) of contributions (B, S, C, H, W)."""
    return _with_maps(ops, ops.robust_mean, ops.robust_mean_variance, (contributions,), shrink=shrink)


def _with_maps(
    ops: PixelOps,
    mean: Callable[..., Tensor],
    mean_variance: Callable[..., tuple[Tensor, Tensor]],
    given: tuple[object, ...],
    *,
    shrink: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean that an op makes of what is given, raw; its sum over the channels, shrunk or not; the maps."""
    if not shrink:
        raw = mean(*given)
        return raw, raw.sum(dim=1), ops.smooth(raw)
    raw, variance = mean_variance(*given)
    shrunk = ops.shrink(raw, variance)
    return raw, shrunk[:, 0], ops.smooth(shrunk)
