"""Contributions of all samples to raw attributions and maps: S samples are stored until their robust mean is taken.

`memory.choose_storage` bounds the storage whatever the batch and the number of targets: as many (image, target) pairs
are aggregated together as fit. All targets of an image share its forward walks where they fit; otherwise targets are
divided into groups, and the images are walked forward once for each group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter

import torch
from torch import Tensor

from dave_fast.engine import free_memory, memory
from dave_fast.engine.bound_ops import PixelOps
from dave_fast.engine.levels import Place, Pulled, TokenGrid, blocks_of, levels_of
from dave_fast.engine.micro_batches import MicroBatches, Pacer, Progress
from dave_fast.sampling import Draws
from dave_fast.targets.cotangents import Cotangent

# raw (b, C, H, W), signed maps and maps (b, H, W)
Made = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Attributions:
    """Maps of B images, K targets and L levels, in the dtype of the images.

    Attributes:
        raw: (B, K, L, C, H, W); at a block each channel has an equal share of the evidence.
        signed: (B, K, L, H, W).
        maps: (B, K, L, H, W).
    """

    raw: Tensor
    signed: Tensor
    maps: Tensor

    @classmethod
    def empty(cls, images: Tensor, targets: int, levels: int) -> Attributions:
        """Return memory for those of images (B, C, H, W)."""
        count, channels, *size = images.shape
        raw = images.new_empty(count, targets, levels, channels, *size)
        return cls(raw, *(images.new_empty(count, targets, levels, *size) for _ in range(2)))

    def store(self, some: slice, target: int, level: int, made: Made) -> None:
        """Copy raw (b, C or 1, H, W), signed maps and maps (b, H, W) of some images into their place."""
        raw, signed, maps = made
        channels = self.raw.shape[3]
        self.raw[some, target, level] = raw if raw.shape[1] == channels else raw / channels
        self.signed[some, target, level], self.maps[some, target, level] = signed, maps


def attributions(
    batches: MicroBatches,
    images: Tensor,
    draws: Draws,
    targets: Sequence[Cotangent],
    progress: Progress | None,
    *,
    shrink: bool,
    places: Sequence[Place] = (None,),
) -> Attributions:
    """Walk all rows of draws, micro-batch by micro-batch, and aggregate them.

    Args:
        batches: the loop over micro-batches.
        images: (B, C, H, W).
        draws: R = B·S rows on the host, image-major.
        targets: cotangents of the output.
        progress: is called with (rows done, rows in all).
        shrink: whether the maps are shrunk.
        places: those of the maps in their order, blocks and pixels.
    """
    samples, shape, ops = len(draws) // len(images), tuple(images.shape[1:]), batches.ops
    levels, free = levels_of(places), free_memory.free_bytes(images.device)
    grids = {block: batches.route.blocks[block] for block in levels.blocks}
    values = sum(grid.prefix + grid.patches for grid in grids.values())
    storage = memory.choose_storage(
        samples, shape, images.dtype, batches.route.dtype, free, pixels=levels.pixels, evidence=values
    )
    together, groups = memory.fitting_pairs(storage, len(targets), free)
    pacer = Pacer(progress, len(draws) * len(groups), images.device)
    found = Attributions.empty(images, len(targets), len(places))
    for start in range(0, len(images), together):
        some = slice(start, min(start + together, len(images)))
        part = draws[some.start * samples : some.stop * samples]
        sampled = Sampled(
            images, part.to(images.device), samples, grids, batches.route.patch_size if storage.tokens else None
        )
        dtype = None if storage.tokens else storage.dtype
        for group in groups:
            kept = batches.vjps(images, part, targets[group], dtype, pacer.queued, levels)
            for at, target in enumerate(range(len(targets))[group]):
                for level, made in enumerate(sampled.maps(ops, kept.map(itemgetter(at)), places, shrink=shrink)):
                    found.store(some, target, level, made)
            # free before those of the next group are made
            del kept, made
    pacer.finish()
    return found


@dataclass(frozen=True)
class Sampled:
    """The perturbed samples of some images, for ops that pull back and take the mean in one pass.

    Attributes:
        images: (B, C, H, W), all of the batch.
        draws: b·S rows of some of them on the device, image-major.
        samples: S.
        grids: of the blocks, by their numbers.
        patch_size: (p_h, p_w) of the pixels' tokens, where their cotangents are kept; None where contributions are.
    """

    images: Tensor
    draws: Draws
    samples: int
    grids: dict[int, TokenGrid]
    patch_size: tuple[int, int] | None = None

    def maps(self, ops: PixelOps, kept: Pulled, places: Sequence[Place], *, shrink: bool) -> list[Made]:
        """Return raw (b, C or 1, H, W), signed maps and maps (b, H, W) at each of the places.

        Args:
            ops: the bound ops.
            kept: of b·S rows.
            places: blocks and pixels.
            shrink: whether the maps are shrunk.
        """
        evidence = dict(zip(self.grids, kept.evidence, strict=True))

        def made(place: Place) -> Made:
            if place is None:
                return self._pulled_back(ops, kept.pixels, shrink=shrink)
            blocks = blocks_of(place)
            told = [evidence[block] for block in blocks]
            mean = told[0] if len(told) == 1 else torch.stack(told).mean(0)
            return self._spread(ops, mean, self.grids[blocks[0]], shrink=shrink)

        # several depths may name one place: "auto" and its blocks
        found = {place: made(place) for place in dict.fromkeys(places)}
        return [found[place] for place in places]

    def _pulled_back(self, ops: PixelOps, tokens: Tensor | None, *, shrink: bool) -> Made:
        assert tokens is not None
        if self.patch_size is None:
            return aggregate(ops, tokens.unflatten(0, (-1, self.samples)), shrink=shrink)
        given = tokens, self.images, self.draws, self.patch_size, self.samples
        if not shrink:
            return _with_maps(ops, ops.pull_back_mean(*given), None)
        return _with_maps(ops, *ops.pull_back_mean_variance(*given))

    def _spread(self, ops: PixelOps, evidence: Tensor, grid: TokenGrid, *, shrink: bool) -> Made:
        size = self.images.shape[2], self.images.shape[3]
        patch = size[0] // grid.height, size[1] // grid.width
        values = evidence[:, grid.prefix :].contiguous()
        mean, variance = ops.spread_mean_variance(values, self.draws, size, patch, self.samples)
        return _with_maps(ops, mean, variance if shrink else None)


def aggregate(ops: PixelOps, contributions: Tensor, *, shrink: bool) -> Made:
    """Return raw (B, C, H, W), signed maps and maps (B, H, W) of contributions (B, S, C, H, W)."""
    if not shrink:
        return _with_maps(ops, ops.robust_mean(contributions), None)
    return _with_maps(ops, *ops.robust_mean_variance(contributions))


def _with_maps(ops: PixelOps, raw: Tensor, variance: Tensor | None) -> Made:
    """Return raw; its sum over the channels, shrunk by its variance where that is given; the maps."""
    if variance is None:
        return raw, raw.sum(dim=1), ops.smooth(raw)
    shrunk = ops.shrink(raw, variance)
    return raw, shrunk[:, 0], ops.smooth(shrunk)
