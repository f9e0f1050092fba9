"""An explainer's part for callers that fill micro-batches themselves, such as a server: samples, and maps of them."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import Any, TypeGuard

import torch
from torch import Tensor

from dave_fast.engine.aggregation import Attributions, Sampled, aggregate
from dave_fast.engine.checks import check_classes, check_targets
from dave_fast.engine.end_of_call import EndOfCall
from dave_fast.engine.levels import PIXELS, Levels, Place, Pulled, TokenGrid, levels_of
from dave_fast.engine.micro_batches import MicroBatches
from dave_fast.errors import InputError
from dave_fast.explain.route_cache import RouteCache
from dave_fast.given.wrappers import Watched
from dave_fast.ops.precision import DTYPES, own_arithmetic, statistics_dtype
from dave_fast.sampling import Draws
from dave_fast.targets.cotangents import Cotangent, ElementCotangent, ImageCotangents
from dave_fast.transfers import to_device


class SampleCalls:
    """An explainer's calls on samples; `dave_fast.DAVE` is one.

    Attributes:
        device: where it computes.
        precision: a name of `ops.precision.DTYPES`.
        shrink: whether maps are shrunk.
    """

    device: torch.device
    precision: str
    shrink: bool
    _cache: RouteCache
    _wrapping: Watched | None

    @property
    def _checked(self) -> RouteCache:
        """The routes; raises ModelError where a wrapper of the given model has been changed."""
        if self._wrapping is not None:
            self._wrapping.check()
        return self._cache

    def contributions(self, images: Tensor, draws: Draws, targets: Tensor) -> Tensor:
        """Return the contributions of one micro-batch of perturbed samples.

        The K frozen VJPs share one forward walk. A row's contributions do not depend on the other rows, up to rounding.
        `dave_fast.sampling.join` puts rows of several draws together.

        Args:
            images: (B, C, H, W), normalised as the model expects, finite.
            draws: R rows; `draws.image_index` says which image each belongs to.
            targets: (B, K) integers, the classes of each image that are explained.

        Returns:
            (K, R, C, H, W) in `statistics_dtype`. They may hold NaN or infinity.

        Raises:
            InputError: images or targets are not of that form, or there are no rows.
            ModelError: as `explain`.
            NonFiniteError: NaN or infinity in the images.
        """
        made = self.samples(images, draws, targets).pixels
        assert made is not None
        return made

    def samples(
        self,
        images: Tensor,
        draws: Draws,
        targets: Tensor | Sequence[Sequence[Cotangent]],
        levels: Levels = PIXELS,
    ) -> Pulled:
        """Return what one micro-batch of perturbed samples tells at several levels of the model.

        Args:
            images: as for `contributions`, as are draws and targets.
            draws: R rows.
            targets: (B, K) classes; or of each of the B images K cotangents (`DAVE.resolve`), with which the host waits
                for the device.
            levels: pixels, blocks (`levels`).

        Returns:
            Contributions (K, R, C, H, W) as `tokens`, and the evidence (K, R, N) of each block.

        Raises:
            DaveFastError: as `contributions`.
        """
        if not len(draws):
            raise InputError("draws hold no rows; expected one or more perturbed samples")

        def work(images: Tensor, batches: MicroBatches, end: EndOfCall) -> Pulled:
            if _are_cotangents(targets, len(images)):
                of_each = [ImageCotangents(each) for each in zip(*targets, strict=True)]
                made = batches.vjps(images, draws, of_each, images.dtype, levels=levels)
                end.read()
                return made
            classes: Any = targets
            first, last = check_targets(classes, len(images))
            of_class = [ElementCotangent(each) for each in to_device(classes.T.contiguous(), images.device)]

            def checked(output: Tensor, rows: Draws) -> Tensor:
                check_classes(first, last, output)
                return of_class[0](output, rows)

            made = batches.vjps(images, draws, [checked, *of_class[1:]], images.dtype, levels=levels)
            end.read()
            return made

        # captured graphs have row numbers of their own
        return self._checked.call(images, work, len(draws) if self._cache.graphs is None else None)

    def aggregate(self, contributions: Tensor, *, shrink: bool | None = None) -> tuple[Tensor, Tensor]:
        """Return raw (B, C, H, W) and maps (B, H, W) of contributions (B, S, C, H, W), as `explain` does.

        They are NaN where a contribution is NaN.

        Args:
            contributions: of B images or classes and S samples.
            shrink: whether the maps are shrunk; None takes the explainer's setting.
        """
        with own_arithmetic(self.device):
            raw, _, maps = aggregate(self._cache.ops, contributions, shrink=self.shrink if shrink is None else shrink)
        return raw, maps

    def aggregate_levels(
        self,
        image: Tensor,
        kept: Pulled,
        draws: Draws,
        places: Sequence[Place],
        blocks: Sequence[TokenGrid],
        *,
        shrink: bool | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return raw (K, L, C, H, W), maps and signed maps (K, L, H, W) of the samples of one image at several levels.

        Args:
            image: (1, C, H, W).
            kept: what `samples` returned for its rows, (K, S, ...).
            draws: the S rows.
            places: those of the maps in their order, blocks and pixels; `kept` has them.
            blocks: of the model (`blocks`).
            shrink: whether the maps are shrunk; None takes the explainer's setting.
        """
        shrink, device = self.shrink if shrink is None else shrink, kept.tensors()[0].device
        grids = {block: blocks[block] for block in levels_of(places).blocks}
        sampled = Sampled(image.to(device), draws.to(device), len(draws), grids)
        targets = len(kept.tensors()[0])
        with own_arithmetic(self.device):
            made = Attributions.empty(sampled.images.to(self.statistics_dtype), targets, len(places))
            for target in range(targets):
                of_target = kept.map(itemgetter(target))
                for level, one in enumerate(sampled.maps(self._cache.ops, of_target, places, shrink=shrink)):
                    made.store(slice(None), target, level, one)
        return made.raw[0], made.maps[0], made.signed[0]

    def blocks(self, images: Tensor) -> tuple[TokenGrid, ...]:
        """Return the tokens that enter each block of the model for images (B, C, H, W).

        Raises:
            ModelError: the model has no sequence of blocks whose tokens lie on a grid.
        """

        def work(images: Tensor, batches: MicroBatches, end: EndOfCall) -> tuple[TokenGrid, ...]:
            end.read()
            return batches.route.blocks

        return self._checked.call(images, work)

    @property
    def statistics_dtype(self) -> torch.dtype:
        """The dtype of contributions."""
        return statistics_dtype(DTYPES[self.precision])

    def fitting_rows(self, images: Tensor) -> int:
        """Return how many rows `contributions` should be given at once for images (B, C, H, W)."""
        return self._checked.fitting_rows(images)


def _are_cotangents(targets: Any, images: int) -> TypeGuard[Sequence[Sequence[Cotangent]]]:
    """Return whether targets are cotangents, of each image as many as of the others."""
    rows = list(targets) if isinstance(targets, Sequence) else []
    each = [cotangent for row in rows if isinstance(row, Sequence) for cotangent in row]
    alike = len(rows) == images and len(each) and len(each) == len(rows) * len(rows[0])
    return bool(alike) and all(isinstance(cotangent, Cotangent) for cotangent in each)
