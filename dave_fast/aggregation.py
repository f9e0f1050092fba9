"""From rows of draws to raw: the S samples of each image are kept until its robust mean, in a form that fits.

Images go together in groups, so that what is kept is bounded whatever the batch (`memory.choose_storage`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from dave_fast import memory
from dave_fast.micro_batch import MicroBatches, Pacer, Progress
from dave_fast.ops.patches import patch_grid, patch_hw
from dave_fast.route import Route
from dave_fast.sampling import Draws
from dave_fast.targets import ResolvedTarget

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
        target: ResolvedTarget,
        progress: Progress | None,
    ) -> Tensor:
        """All rows of draws (host, image-major, S an image), micro-batch by micro-batch -> raw (B, C, H, W)."""
        samples, shape = len(draws) // len(images), tuple(images.shape[1:])
        free = memory.free_bytes(images.device)
        storage = memory.choose_storage(samples, shape, images.dtype, route.dtype, free)
        if not storage.tokens and storage.dtype != images.dtype:
            logger.warning(
                "contributions are kept in bfloat16: in %s they would take %s of the %s that are free",
                *(images.dtype, memory.megabytes(memory.contribution_bytes(samples, shape, images.dtype))),
                memory.megabytes(free),
            )
        together = max(1, int(memory.SHARE * memory.SHARE * free / storage.bytes))
        pacer = Pacer(progress, len(draws), images.device)
        raw = torch.empty_like(images)
        for start in range(0, len(images), together):
            some = slice(start, min(start + together, len(images)))
            part, done = draws[some.start * samples : some.stop * samples], pacer.after(some.start * samples)
            if storage.tokens:
                kept = images.new_empty(len(part), *_token_shape(images, route.patch_size), dtype=storage.dtype)
                batches.vjps(images, part, target, kept, None, done)
                raw[some] = self._pull_back_mean(kept, images, part.to(images.device), route.patch_size, samples)
            else:
                kept = images.new_empty(len(part), *shape, dtype=storage.dtype)
                batches.vjps(images, part, target, kept, storage.dtype, done)
                raw[some] = self._robust_mean(kept.view(-1, samples, *shape))
        pacer.finish()
        return raw


def _token_shape(images: Tensor, patch_size: tuple[int, int]) -> tuple[int, int]:
    """(n, C·p_h·p_w) of one row."""
    _, channels, height, width = images.shape
    (n_y, n_x), (p_h, p_w) = patch_grid(height, width, patch_size), patch_hw(patch_size)
    return n_y * n_x, channels * p_h * p_w
