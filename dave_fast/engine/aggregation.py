"""From rows of draws to raw: the S samples of each image are kept until its robust mean, in a form that fits.

What is kept is bounded whatever the batch and the number of targets (`memory.choose_storage`): the samples of so many
(image, target) pairs as fit wait together. All targets of an image share its forward walks where they fit; else they
go in groups, and the images are walked forward once a group.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

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
    """The end of an explanation, bound to the ops `robust_mean` and `pull_back_mean`."""

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
        """All rows of draws (host, image-major, S an image), micro-batch by micro-batch -> raw (B, K, C, H, W)."""
        samples, shape = len(draws) // len(images), tuple(images.shape[1:])
        free = free_memory.free_bytes(images.device)
        # for one target: the form, and with it the bits, must not depend on how many are asked
        storage = memory.choose_storage(samples, shape, images.dtype, route.dtype, free)
        if not storage.tokens and storage.dtype != images.dtype:
            logger.warning(
                "contributions are kept in bfloat16: in %s they would take %s of the %s that are free",
                *(images.dtype, free_memory.megabytes(memory.contribution_bytes(samples, shape, images.dtype))),
                free_memory.megabytes(free),
            )
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
                # before the next group's are made
                del kept, of_target
        pacer.finish()
        return raw

    def _mean(
        self, kept: Tensor, images: Tensor, draws: Draws, patch_size: tuple[int, int], samples: int, storage: Storage
    ) -> Tensor:
        """The robust mean of one target's rows, in the form in which they are kept: (b, C, H, W)."""
        if storage.tokens:
            return self._pull_back_mean(kept, images, draws.to(images.device), patch_size, samples)
        return self._robust_mean(kept.view(-1, samples, *kept.shape[1:]))


def _token_shape(images: Tensor, patch_size: tuple[int, int]) -> tuple[int, int]:
    """(n, C·p_h·p_w) of one row."""
    _, channels, height, width = images.shape
    (n_y, n_x), (p_h, p_w) = patch_grid(height, width, patch_size), patch_hw(patch_size)
    return n_y * n_x, channels * p_h * p_w
