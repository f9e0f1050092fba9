"""The loop over micro-batches: rows of draws through perturb, the walks and pull_back, on any device.

A micro-batch is a forward walk and any number of VJPs of it. On a CPU it has as many rows as remain, up to the full
size; on a GPU it is a bucket of fixed shape (`engine.graphs`). Images and draws are on the device before the loop,
and the loop does not wait for the device; progress is reported as work is finished, while more is queued.

Where memory runs out, the micro-batch is halved and the same rows are walked again. Smaller micro-batches give the same
results, and the route remembers the size.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dave_fast.engine import free_memory
from dave_fast.engine.bound_ops import PixelOps
from dave_fast.engine.buckets import OWN_BUCKETS, next_bucket
from dave_fast.engine.eager import Eager
from dave_fast.engine.graphs import Bucket, Graphs
from dave_fast.engine.levels import PIXELS, Levels, Pulled
from dave_fast.engine.route import Route
from dave_fast.errors import InputError, OutOfMemoryError, is_out_of_memory
from dave_fast.sampling import Draws, identity
from dave_fast.transfers import moved

logger = logging.getLogger("dave_fast")

Walk = Eager | Bucket
Progress = Callable[[int, int], None]
# (output of a micro-batch, draws of its rows) -> cotangent of the output
CotangentOf = Callable[[Tensor, Draws], Tensor]
# micro-batches that are queued on a GPU behind the one whose end is reported
AHEAD = 2


class MicroBatches:
    """The loop over micro-batches for images of one size.

    Args:
        route: the walks.
        ops: the bound ops.
        rows: of a full micro-batch.
        graphs: the buckets of a GPU; None where micro-batches have any size.
        samples: S; a size that a bucket may have besides those of the ladder.
    """

    def __init__(self, route: Route, ops: PixelOps, rows: int, *, graphs: Graphs | None, samples: int | None) -> None:
        self.route, self.ops = route, ops
        self._rows, self._graphs, self._samples = rows, graphs, samples
        # the images whose output is known, and their output
        self._known: tuple[Tensor, Tensor] | None = None
        # images, the levels of the walk that made their output, and that walk, where it was one
        self._unperturbed: tuple[Tensor, Levels, Eager] | None = None

    def outputs(self, images: Tensor, levels: Levels = PIXELS) -> Tensor:
        """Return the model's output (B, ...) for unperturbed images (B, C, H, W), computed once for the same images.

        Args:
            images: (B, C, H, W).
            levels: at which `unperturbed_vjps` is to tell evidence; the operators are held for it until then.
        """
        if self._known is not None and self._known[0] is images:
            return self._known[1]
        outputs = []

        def keep(walk: Walk, output: Tensor, at: slice, rows: Draws) -> None:
            outputs.append(output.clone())
            # one that has all images, since each holds its operators; a bucket is lent for one micro-batch
            if levels.blocks and len(rows) == len(images) and isinstance(walk, Eager):
                self._unperturbed = images, levels, walk

        self._each(images, identity(len(images)), levels, keep)
        self._known = images, torch.cat(outputs)
        return self._known[1]

    def unperturbed_vjps(
        self, images: Tensor, targets: Sequence[CotangentOf], dtype: torch.dtype, levels: Levels
    ) -> Pulled:
        """Pull the cotangents of all targets back for unperturbed images: by the walk of `outputs` where it is held.

        Args:
            images: as for `outputs`.
            targets: as for `vjps`.
            dtype: of contributions.
            levels: as for `vjps`.
        """
        held, self._unperturbed = self._unperturbed, None
        rows = identity(len(images))
        if held is None or held[0] is not images or held[1] != levels:
            return self.vjps(images, rows, targets, dtype, levels=levels)
        walk, output, on_device = held[2], self.outputs(images), rows.to(images.device)
        into: list[Pulled] = []
        try:
            for which, target in enumerate(targets):
                found = walk.vjp(target(output, on_device), dtype)
                if not into:
                    into.append(found.like(len(targets), len(images)))
                into[0].store(found, which, slice(None))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        else:
            return into[0]
        # in smaller micro-batches, once the walk's operators are free
        del held, walk, into
        return self.vjps(images, rows, targets, dtype, levels=levels)

    def vjps(
        self,
        images: Tensor,
        draws: Draws,
        targets: Sequence[CotangentOf],
        dtype: torch.dtype | None,
        queued: Callable[[int], None] | None = None,
        levels: Levels = PIXELS,
    ) -> Pulled:
        """Pull the cotangents of all targets back, for every row; they share the forward walk of a micro-batch.

        Args:
            images: (B, C, H, W).
            draws: R rows on the host.
            targets: cotangents of the output.
            dtype: of contributions; None for cotangents of tokens.
            queued: is called with the number of rows of each micro-batch that is queued.
            levels: at which evidence is told.

        Returns:
            Contributions (targets, R, C, H, W), or the cotangents of the tokens (targets, R, n, C·p_h·p_w) in the
            route's dtype; and the evidence (targets, R, N) of each block.

        Raises:
            InputError: the model has no such block.
            ModelError: it has no sequence of blocks.
            OutOfMemoryError: memory ran out with one row a micro-batch.
        """
        if levels.blocks and levels.blocks[-1] >= len(self.route.blocks):
            raise InputError(
                f"evidence at block {levels.blocks[-1]} is wanted and the model has the blocks 0 to "
                f"{len(self.route.blocks) - 1}"
            )
        into: list[Pulled] = []

        def keep(walk: Walk, output: Tensor, at: slice, rows: Draws) -> None:
            for which, target in enumerate(targets):
                found = walk.vjp(target(output, rows), dtype)
                if not into:
                    # here, so that a shortage of memory for it is answered as one of the walk is
                    into.append(found.like(len(targets), len(draws)))
                into[0].store(found, which, at)

        self._each(images, draws, levels, keep, queued)
        return into[0]

    def _each(
        self,
        images: Tensor,
        draws: Draws,
        levels: Levels,
        keep: Callable[[Walk, Tensor, slice, Draws], None],
        queued: Callable[[int], None] | None = None,
    ) -> None:
        """Walk all rows forward and pass each micro-batch to `keep`.

        Args:
            images: (B, C, H, W).
            draws: R rows on the host.
            levels: at which evidence is told.
            keep: is called with the walk, its output (r, ...), the slice of its rows among R, and their draws on the
                device; called again for the same rows where memory ran out.
            queued: is called with the number of rows of each micro-batch that is queued.
        """
        on_device, index = draws.to(images.device), draws.image_index.tolist()
        start = 0
        while start < len(draws):
            size = self._size(len(draws) - start, levels)
            at = slice(start, min(start + size, len(draws)))
            part = on_device[at]
            try:
                seen, local = _own_images(images, index[at], part.image_index, size)
                with self._walk(size, seen, levels) as walk:
                    keep(walk, walk.forward(seen, replace(part, image_index=local)), at, part)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if size == 1:
                    raise self._shortage(images.device) from error
            else:
                start = at.stop
                if queued is not None:
                    queued(len(part))
                continue
            # outside the handler, since the error keeps the tensors of the failed micro-batch
            self._shrink(size, images.device)

    def _size(self, remaining: int, levels: Levels) -> int:
        """Return the rows of the next micro-batch."""
        rows = min(self._rows, self.route.most_rows)
        if levels.blocks and rows > self.route.rows_with(levels, self.route.fitting_rows):
            rows = self.route.rows_with(levels, rows)
        if self._graphs is None:
            return min(rows, remaining)
        own = self._own(rows)
        size = next_bucket(remaining, rows, self.route.row_cost, own)
        if size == own and own not in self.route.own_rows:
            self.route.own_rows.append(own)
        return size

    def _own(self, full: int) -> int | None:
        """Return S where the samples of an image may have a bucket of their own.

        Only the first few values of S get one, as long as memory has room for all buckets together, so that calls with
        ever new values do not capture ever new graphs.
        """
        samples, known = self._samples, self.route.own_rows
        if samples is None or samples > self.route.most_rows:
            return None
        # the buckets of the ladder together have less than twice the rows of the full one
        fits = 2 * full + sum(known) + samples <= self.route.fitting_rows
        return samples if samples in known or (fits and len(known) < OWN_BUCKETS) else None

    def _walk(self, size: int, images: Tensor, levels: Levels) -> AbstractContextManager[Walk]:
        eager = Eager(self.route, self.ops, levels)
        if self._graphs is None:
            return nullcontext(eager)
        return self._graphs.turn((self.route, size, levels), partial(Bucket, eager, size, images))

    def _shortage(self, device: torch.device) -> OutOfMemoryError:
        """Return the error for one row a micro-batch that does not fit."""
        route = self.route
        row = (
            f"takes {free_memory.megabytes(route.row_bytes)} by the formula"
            if route.row_bytes
            else "takes what autograd saves, which is not known beforehand"
        )
        return OutOfMemoryError(
            f"memory ran out with one row a micro-batch: a row {row}, the weights take "
            f"{free_memory.megabytes(route.weights)}, and "
            f"{free_memory.megabytes(free_memory.free_bytes(device))} are free on {device}. "
            "Give smaller images or a smaller model, take precision='bf16', or free memory"
        )

    def _shrink(self, size: int, device: torch.device) -> None:
        """Halve the micro-batch for this call and all later ones, and free the buckets."""
        self.route.most_rows = size // 2
        self.route.own_rows.clear()
        logger.warning("memory ran out with %d rows a micro-batch; going on with %d", size, size // 2)
        if self._graphs is not None:
            self._graphs.clear()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _own_images(images: Tensor, index: Sequence[int], on_device: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Return the images to which some rows belong, at most `most`, and the rows' indices among them.

    Consecutive images need no copy.

    Args:
        images: (B, C, H, W).
        index: image of each row.
        on_device: the same as a tensor (r,) on the device.
        most: number of images that a micro-batch takes.
    """
    first, last = min(index), max(index)
    if last - first < most:
        return images[first : last + 1], on_device - first
    used = sorted(set(index))
    place = {image: at for at, image in enumerate(used)}
    chosen, local = moved([torch.tensor(used), torch.tensor([place[image] for image in index])], images.device)
    return images[chosen], local


class Pacer:
    """The progress of a call, reported as work is finished.

    On a GPU it waits for the micro-batch before the last `AHEAD` queued ones, so that the device always has work and
    the host is never far ahead. Without a progress function it does not wait.

    Args:
        progress: is called with (rows done, rows in all).
        total: rows in all.
        device: on which the rows are walked.
    """

    def __init__(self, progress: Progress | None, total: int, device: torch.device) -> None:
        self._progress, self._total, self._rows = progress, total, 0
        self._ahead = AHEAD if device.type == "cuda" else 0
        # rows since the start, and on a GPU the event at which they are done
        self._queued: deque[tuple[int, Any]] = deque()

    def queued(self, rows: int) -> None:
        """Note that `rows` more have been queued, and report those that must be done by now."""
        if self._progress is None:
            return
        self._rows += rows
        self._queued.append((self._rows, torch.cuda.current_stream().record_event() if self._ahead else None))
        while len(self._queued) > self._ahead:
            self._report(self._progress)

    def finish(self) -> None:
        """Wait for all queued rows and report them."""
        while self._queued and self._progress is not None:
            self._report(self._progress)

    def _report(self, progress: Progress) -> None:
        rows, event = self._queued.popleft()
        if event is not None:
            event.synchronize()
        progress(rows, self._total)
