"""Contributions of all samples to raw attributions: an image's S samples are stored until their robust mean is taken.

`memory.choose_storage` bounds the storage whatever the batch and the number of targets: as many (image, target) pairs
are aggregated together as fit. All targets of an image share its forward walks where they fit; otherwise targets are
divided into groups, and the images are walked forward once for each group.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dave_fast.engine import free_memory, memory
from dave_fast.engine.memory import Storage
from dave_fast.engine.micro_batches import MicroBatches, Pacer, Progress
from dave_fast.engine.route import Route
from dave_fast.ops.patches import patch_grid, patch_hw
from dave_fast.sampling import Draws
from dave_fast.targets.cotangents import Cotangent

logger = logging.getLogger("dave_fast")


class Aggregation:
    """The aggregation of contributions to raw attributions.

    Args:
        robust_mean: the bound op, (B, S, C, H, W) -> (B, C, H, W).
        pull_back_mean: the bound op, which pulls token cotangents back and aggregates them tile by tile.
    """

    def __init__(self, robust_mean: Callable[[Tensor], Tensor], pull_back_mean: Callable[..., Tensor]) -> None:
        self._robust_mean, self._pull_back_mean = robust_mean, pull_back_mean

    def raw(
        self,
        batches: MicroBatches,
        route: Route,
        images: Tensor,
        draws: Draws,
        targets: Sequence[Cotangent],
        progress: Progress | None,
    ) -> Tensor:
        """Walk all rows of draws, micro-batch by micro-batch, and aggregate them.

        Args:
            batches: the loop over micro-batches.
            route: the walks.
            images: (B, C, H, W).
            draws: R = B·S rows on the host, image-major.
            targets: cotangents of the output.
            progress: is called with (rows done, rows in all).

        Returns:
            raw (B, targets, C, H, W) in the dtype of the images.
        """
        samples, shape = len(draws) // len(images), tuple(images.shape[1:])
        free = free_memory.free_bytes(images.device)
        storage = _choose_storage(samples, shape, images.dtype, route.dtype, free)
        together, groups = memory.fitting_pairs(storage, len(targets), free)
        row, dtype = (_token_shape(images, route.patch_size), None) if storage.tokens else (shape, storage.dtype)
        pacer = Pacer(progress, len(draws) * len(groups), images.device)
        raw = images.new_empty(len(images), len(targets), *shape)
        walked = 0
        for start in range(0, len(images), together):
            some = slice(start, min(start + together, len(images)))
            part = draws[some.start * samples : some.stop * samples]
            for group in groups:
                kept = images.new_empty(group.stop - group.start, len(part), *row, dtype=storage.dtype)
                batches.vjps(images, part, targets[group], kept, dtype, pacer.after(walked))
                for at, of_target in enumerate(kept, group.start):
                    raw[some, at] = self._mean(of_target, images, part, route.patch_size, samples, storage)
                walked += len(part)
                # free before those of the next group are made
                del kept, of_target
        pacer.finish()
        return raw

    def _mean(
        self, kept: Tensor, images: Tensor, draws: Draws, patch_size: tuple[int, int], samples: int, storage: Storage
    ) -> Tensor:
        """Return the robust mean (b, C, H, W) of one target's rows, which are stored as `storage` says."""
        if storage.tokens:
            return self._pull_back_mean(kept, images, draws.to(images.device), patch_size, samples)
        return self._robust_mean(kept.view(-1, samples, *kept.shape[1:]))


def _choose_storage(
    samples: int, shape: tuple[int, ...], statistics: torch.dtype, engine: torch.dtype, free: int
) -> Storage:
    """Return the storage of one (image, target) pair and log a warning where contributions are rounded.

    It must not depend on the number of targets, and so neither do the bits of the result.
    """
    storage = memory.choose_storage(samples, shape, statistics, engine, free)
    if not storage.tokens and storage.dtype != statistics:
        logger.warning(
            "contributions are kept in bfloat16: in %s they would take %s of the %s that are free",
            *(statistics, free_memory.megabytes(memory.contribution_bytes(samples, shape, statistics))),
            free_memory.megabytes(free),
        )
    return storage


def _token_shape(images: Tensor, patch_size: tuple[int, int]) -> tuple[int, int]:
    """Return (n, C·p_h·p_w), the shape of one row of tokens."""
    _, channels, height, width = images.shape
    (n_y, n_x), (p_h, p_w) = patch_grid(height, width, patch_size), patch_hw(patch_size)
    return n_y * n_x, channels * p_h * p_w
