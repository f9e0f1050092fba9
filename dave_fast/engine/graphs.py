"""Micro-batches of fixed shape over static buffers, so that a GPU replays them as CUDA graphs.

A bucket is (image size, rows). It owns the buffers that its work reads: images, draws and cotangent. One micro-batch:

    copy in    images and draws of the rows there are; the rest of the bucket repeats the last one (finite)
    replay     perturb and forward walk                     -> output
    outside    the target's cotangent of the output: any callable; as many cotangents of one forward as are wanted
    replay     frozen VJP and pull_back                     -> contributions
    copy out   the rows there are

What "replay" is, is a function: `CudaCapture` records the work once as a CUDA graph; `direct` runs it again, which is
the eager switch: same buffers, same shapes, same kernels, hence the same bits.

What capture relies on, as `torch.cuda.make_graphed_callables` does: forward and backward are two graphs over one memory
pool, the second captured from `torch.autograd.grad` while what the first one saved is alive. Everything runs first on
the capturing stream, so that kernels are compiled and tuned and cuBLAS has its handle and workspace before. Weights are
never reallocated: a plan is frozen, and a changed model gets new graphs. The graphs of a model share the pool because
they run one at a time: between a bucket's forward and its last VJP no other graph runs (`Graphs.turn`), and results
are copied out before the next one.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dave_fast.engine.eager import Eager
from dave_fast.engine.free_memory import is_out_of_memory
from dave_fast.errors import InputError
from dave_fast.sampling import Draws, identity

logger = logging.getLogger("dave_fast")

# runs before the capture: the first compiles and tunes, the second allocates as every later one will
WARM_UPS = 2
# buckets that a model keeps; the one used longest ago makes room
MOST_BUCKETS = 24

Run = Callable[[], Tensor]
Capture = Callable[[Run], Run]


def direct(run: Run) -> Run:
    """Replay by running: the eager switch."""
    return run


class CudaCapture:
    """Records work as CUDA graphs: one stream and one memory pool for all graphs of a model."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Run) -> Run:
        """Capture what `run` launches; the result replays it and returns the same tensor, filled anew.

        Raises what `run` raises, and RuntimeError where its work cannot be captured.
        """
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        # restores the caller's stream, which a capture that fails to end leaves behind
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UPS):
                run()
            graph, output = self._recorded(run)
        current.wait_stream(self._stream)

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay

    def _recorded(self, run: Run) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        graph = torch.cuda.CUDAGraph()
        cause: BaseException | None = None
        try:
            # other threads may allocate and copy meanwhile: only what this stream does is recorded
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                try:
                    output = run()
                except BaseException as error:
                    cause = error
                    raise
        except BaseException:
            # ending a capture in which nothing was launched is an error of its own, which would hide the cause
            if cause is None:
                raise
        try:
            if cause is not None:
                raise cause
        finally:
            # the error refers to this frame: a way back would keep the memory that ran out
            del cause
        return graph, output


class Bucket:
    """The static buffers of one (image size, rows), and what was captured over them.

    work: a micro-batch that sees the buffers alone. pixels: whether perturb and pull_back belong to
    what is captured; where they do not, the first buffer holds tokens.
    """

    def __init__(self, work: Eager, rows: int, images: Tensor, capture: Capture, *, pixels: bool) -> None:
        self._work, self._rows, self._capture, self._pixels = work, rows, capture, pixels
        self._images = images.new_zeros(rows, *images.shape[1:])
        self._draws = identity(rows).to(images.device)
        self._tokens: Tensor | None = None
        self._cotangent: Tensor | None = None
        self._forward: Run | None = None
        self._vjps: dict[torch.dtype | None, Run] = {}
        self._real = 0

    def forward(self, images: Tensor, draws: Draws) -> Tensor:
        """As `Walk.forward`, for at most `rows` rows of at most as many images."""
        self._real = len(draws)
        self._images[: len(images)].copy_(images)
        for buffer, values in zip(self._draws.tensors(), draws.tensors(), strict=True):
            fill(buffer, values)
        if self._pixels:
            run = partial(self._work.forward, self._images, self._draws)
        else:
            tokens = self._work.perturbed(self._images, self._draws)
            self._tokens = tokens if self._tokens is None else self._tokens.copy_(tokens)
            run = partial(self._work.walk, self._tokens)
        if self._forward is None:
            self._forward = self._capture(run)
        return self._forward()[: self._real]

    def vjp(self, cotangent: Tensor, dtype: torch.dtype | None) -> Tensor:
        """As `Walk.vjp`, for the last forward; valid until the bucket's next VJP or forward."""
        if self._cotangent is None:
            self._cotangent = cotangent.new_zeros(self._rows, *cotangent.shape[1:])
        fill(self._cotangent, cotangent)
        inside = dtype if self._pixels else None
        if inside not in self._vjps:
            self._vjps[inside] = self._capture(partial(self._work.vjp, self._cotangent, inside))
        result = self._vjps[inside]()
        if dtype is not None and not self._pixels:
            result = self._work.pulled_back(result, self._images, self._draws, dtype)
        return result[: self._real]


def fill(buffer: Tensor, values: Tensor) -> None:
    """Copy rows into a buffer of at least as many; the last one again where the buffer has more."""
    buffer[: len(values)].copy_(values)
    if len(values) < len(buffer):
        buffer[len(values) :] = values[-1]


class Graphs:
    """The buckets of one model on one device.

    capture: how work is replayed. strict: raise where it cannot be captured; else say so and run it directly.
    """

    def __init__(self, device: torch.device, capture: Capture, *, strict: bool, most: int = MOST_BUCKETS) -> None:
        self._device, self._strict, self._most = device, strict, most
        self._wanted = capture
        self._buckets: OrderedDict[Any, Bucket] = OrderedDict()
        self._turn = threading.Lock()
        self._last: Any = None

    @contextmanager
    def turn(self, key: Any, make: Callable[[Capture], Bucket]) -> Iterator[Bucket]:
        """The bucket of `key`, made where there is none, for one micro-batch.

        One caller at a time, on the host and on the device.
        """
        with self._turn:
            bucket = self._buckets.pop(key, None) or make(self._captured)
            self._buckets[key] = bucket
            while len(self._buckets) > self._most:
                self._buckets.popitem(last=False)
            self._wait_for_last()
            try:
                yield bucket
            finally:
                self._remember_last()

    def clear(self) -> None:
        """Forget all buckets; their memory is free for others."""
        with self._turn:
            self._buckets.clear()

    def __len__(self) -> int:
        return len(self._buckets)

    def _captured(self, run: Run) -> Run:
        try:
            return self._wanted(run)
        except RuntimeError as error:
            if self._strict or is_out_of_memory(error):
                raise
            logger.warning("no CUDA graph could be captured, so kernels are launched one by one: %s", error)
            self._wanted = direct
            return run

    def _wait_for_last(self) -> None:
        """Callers on other streams share the buffers: wait, on the device, for whoever used them last."""
        if self._last is not None:
            torch.cuda.current_stream(self._device).wait_event(self._last)

    def _remember_last(self) -> None:
        if self._device.type == "cuda":
            self._last = torch.cuda.current_stream(self._device).record_event()


def make_graphs(device: torch.device, wanted: bool | None) -> Graphs | None:
    """The buckets for a device: with CUDA graphs, or run directly where wanted is False; none on a CPU.

    Raises InputError where graphs are wanted on a device that has none.
    """
    if device.type != "cuda":
        if wanted:
            raise InputError(f"graphs=True needs a CUDA device; this is {device}. Use graphs=None or False.")
        return None
    if wanted is False:
        return Graphs(device, direct, strict=True)
    return Graphs(device, CudaCapture(device), strict=bool(wanted))
