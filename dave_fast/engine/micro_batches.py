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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dave_fast.engine import free_memory
from dave_fast.engine.buckets import OWN_BUCKETS, next_bucket
from dave_fast.engine.eager import Eager, Walk
from dave_fast.engine.graphs import Bucket, Capture, Graphs
from dave_fast.engine.route import Route
from dave_fast.errors import OutOfMemoryError
from dave_fast.sampling import Draws, identity
from dave_fast.targets.cotangents import Cotangent
from dave_fast.transfers import moved

logger = logging.getLogger("dave_fast")

Progress = Callable[[int, int], None]
# micro-batches that are queued on a GPU behind the one whose end is reported
AHEAD = 2


class MicroBatches:
    """The loop over micro-batches for images of one size.

    Args:
        route: the walks.
        perturb: the bound op.
        pull_back: the bound op.
        rows: of a full micro-batch.
        graphs: the buckets of a GPU; None where micro-batches have any size.
        pixels: whether perturb and pull_back can be captured.
        samples: S; a size that a bucket may have besides those of the ladder.
    """

    def __init__(
        self,
        route: Route,
        perturb: Callable[..., Tensor],
        pull_back: Callable[..., Tensor],
        rows: int,
        *,
        graphs: Graphs | None = None,
        pixels: bool = True,
        samples: int | None = None,
    ) -> None:
        self._route, self._ops, self._rows = route, (perturb, pull_back), rows
        self._graphs, self._pixels = graphs, pixels
        self._samples = samples

    def outputs(self, images: Tensor) -> Tensor:
        """Return the model's output (B, ...) for unperturbed images (B, C, H, W)."""
        outputs = []

        def keep(walk: Walk, output: Tensor, at: slice, rows: Draws) -> None:
            outputs.append(output.clone())

        self.each(images, identity(len(images)), keep)
        return torch.cat(outputs)

    def vjps(
        self,
        images: Tensor,
        draws: Draws,
        targets: Sequence[Cotangent],
        into: Tensor,
        dtype: torch.dtype | None,
        done: Callable[[int], None] | None = None,
    ) -> None:
        """Pull the cotangents of all targets back, for every row; they share the forward walk of a micro-batch.

        Args:
            images: (B, C, H, W).
            draws: R rows on the host.
            targets: cotangents of the output.
            into: (targets, R, ...), filled with the results of `Walk.vjp`.
            dtype: as that of `Walk.vjp`.
            done: is called with the number of rows that are queued.
        """

        def keep(walk: Walk, output: Tensor, at: slice, rows: Draws) -> None:
            for which, target in enumerate(targets):
                into[which, at].copy_(walk.vjp(target(output, rows), dtype))

        self.each(images, draws, keep, done)

    def each(
        self,
        images: Tensor,
        draws: Draws,
        keep: Callable[[Walk, Tensor, slice, Draws], None],
        done: Callable[[int], None] | None = None,
    ) -> None:
        """Walk all rows forward and pass each micro-batch to `keep`.

        Args:
            images: (B, C, H, W).
            draws: R rows on the host.
            keep: is called with the walk, its output (r, ...), the slice of its rows among R, and their draws on the
                device; called again for the same rows where memory ran out.
            done: is called with the number of rows that are queued.

        Raises:
            OutOfMemoryError: memory ran out with one row a micro-batch.
        """
        on_device, index = draws.to(images.device), draws.image_index.tolist()
        start = 0
        while start < len(draws):
            size = self._size(len(draws) - start)
            at = slice(start, min(start + size, len(draws)))
            part = on_device[at]
            try:
                seen, local = _own_images(images, index[at], part.image_index, size)
                with self._walk(size, seen) as walk:
                    keep(walk, walk.forward(seen, replace(part, image_index=local)), at, part)
            except (RuntimeError, MemoryError) as error:
                if not free_memory.is_out_of_memory(error):
                    raise
                self._check_smaller(size, images, error)
            else:
                start = at.stop
                if done is not None:
                    done(start)
                continue
            # outside the handler, since the error keeps the tensors of the failed micro-batch
            self._shrink(size, images.device)

    def _size(self, remaining: int) -> int:
        """Return the rows of the next micro-batch."""
        rows = min(self._rows, self._route.most_rows)
        if self._graphs is None:
            return min(rows, remaining)
        own = self._own(rows)
        size = next_bucket(remaining, rows, self._route.row_cost, own)
        if size == own and own not in self._route.own_rows:
            self._route.own_rows.append(own)
        return size

    def _own(self, full: int) -> int | None:
        """Return S where the samples of an image may have a bucket of their own.

        Only the first few values of S get one, as long as memory has room for all buckets together, so that calls with
        ever new values do not capture ever new graphs.
        """
        samples, known = self._samples, self._route.own_rows
        if samples is None or samples > self._route.most_rows:
            return None
        # the buckets of the ladder together have less than twice the rows of the full one
        fits = 2 * full + sum(known) + samples <= self._route.fitting_rows
        return samples if samples in known or (fits and len(known) < OWN_BUCKETS) else None

    @contextmanager
    def _walk(self, size: int, images: Tensor) -> Iterator[Walk]:
        if self._graphs is None:
            yield Eager(self._route, *self._ops)
            return

        def make(capture: Capture) -> Bucket:
            return Bucket(Eager(self._route, *self._ops), size, images, capture, pixels=self._pixels)

        with self._graphs.turn((self._route, size), make) as bucket:
            yield bucket

    def _check_smaller(self, size: int, images: Tensor, error: BaseException) -> None:
        """Raise OutOfMemoryError where a micro-batch of this size cannot be halved."""
        if size > 1:
            return
        route = self._route
        row = (
            f"takes {free_memory.megabytes(route.row_bytes)} by the formula"
            if route.row_bytes
            else "takes what autograd saves, which is not known beforehand"
        )
        raise OutOfMemoryError(
            f"memory ran out with one row a micro-batch: a row {row}, the weights take "
            f"{free_memory.megabytes(route.weights)}, and "
            f"{free_memory.megabytes(free_memory.free_bytes(images.device))} are free on {images.device}. "
            "Give smaller images or a smaller model, take precision='bf16', or free memory"
        ) from error

    def _shrink(self, size: int, device: torch.device) -> None:
        """Halve the micro-batch for this call and all later ones, and free the buckets."""
        self._route.most_rows = size // 2
        self._route.own_rows.clear()
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


@dataclass(frozen=True)
class _Mark:
    """A number of queued rows.

    Attributes:
        rows: since the start.
        wait: waits until they are done.
    """

    rows: int
    wait: Callable[[], None]


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
        self._progress, self._total = progress, total
        self._mark, self._ahead = (_cuda_mark, AHEAD) if device.type == "cuda" else (_no_mark, 0)
        self._queued: deque[_Mark] = deque()

    def after(self, before: int) -> Callable[[int], None]:
        """Return `queued` for rows that follow `before` others."""
        return lambda rows: self.queued(before + rows)

    def queued(self, rows: int) -> None:
        """Note how many rows have been queued since the start, and report those that must be done by now."""
        if self._progress is None:
            return
        self._queued.append(_Mark(rows, self._mark()))
        while len(self._queued) > self._ahead:
            self._report()

    def finish(self) -> None:
        """Wait for all queued rows and report them."""
        while self._queued:
            self._report()

    def _report(self) -> None:
        mark = self._queued.popleft()
        mark.wait()
        assert self._progress is not None
        self._progress(mark.rows, self._total)


def _no_mark() -> Callable[[], None]:
    return lambda: None


def _cuda_mark() -> Callable[[], None]:
    event = torch.cuda.current_stream().record_event()
    return event.synchronize
