"""Micro-batches of fixed shape over static buffers, so that a GPU replays them as CUDA graphs.

A bucket is (image size, rows). It owns the buffers that its work reads: images, draws and cotangent. One micro-batch:

    copy in    images and draws of the real rows; the bucket's other rows repeat the last one, so that all are finite
    replay     perturb and forward walk                     -> output
    outside    the target's cotangent of the output, any callable; one forward walk may serve several cotangents
    replay     frozen VJP and pull_back                     -> contributions
    copy out   the real rows

A `Capture` turns work into its replay: `CudaCapture` records the work once as a CUDA graph; `direct` runs it again.
Both use the same buffers, shapes and kernels, and so give the same bits.

Capture relies on the same conditions as `torch.cuda.make_graphed_callables`. Forward and backward are two graphs over
one memory pool, the second captured from `torch.autograd.grad` while the tensors that the first one saved are alive.
All work first runs on the capturing stream, so that kernels are compiled and tuned and cuBLAS has its handle and
workspace. Weights are never reallocated: a plan is frozen, and a changed model gets new graphs. The graphs of a model
share the pool because they run one at a time: between a bucket's forward and its last VJP no other graph runs
(`Graphs.turn`), and results are copied out before the next one.
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
from dave_fast.engine.levels import Pulled
from dave_fast.errors import InputError, is_out_of_memory
from dave_fast.sampling import Draws, identity

logger = logging.getLogger("dave_fast")

# runs before the capture: the first compiles and tunes, the second allocates as every later one will
WARM_UPS = 2
# most buckets of a model; the least recently used one is dropped
MOST_BUCKETS = 24

# its result is a tensor, or several in a `Pulled`
Run = Callable[[], Any]
Capture = Callable[[Run], Run]


def direct(run: Run) -> Run:
    """Return the work itself, so that each replay runs it."""
    return run


class CudaCapture:
    """A capture of work as CUDA graphs, with one stream and one memory pool for all graphs of a model.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Run) -> Run:
        """Capture the kernels that `run` launches.

        Returns:
            A function that replays them and returns the same tensors with new values.

        Raises:
            RuntimeError: the work cannot be captured; errors of `run` itself are raised as they are.
        """
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        # the context restores the caller's stream, which a failed capture does not
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UPS):
                run()
            graph, output = self._recorded(run)
        current.wait_stream(self._stream)

        def replay() -> Any:
            graph.replay()
            return output

        return replay

    def _recorded(self, run: Run) -> tuple[torch.cuda.CUDAGraph, Any]:
        graph = torch.cuda.CUDAGraph()
        cause: BaseException | None = None
        try:
            # thread_local: other threads may allocate and copy meanwhile, since only this stream is recorded
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                try:
                    output = run()
                except BaseException as error:
                    cause = error
                    raise
        except BaseException:
            # ending a capture in which nothing was launched raises too, which would hide the cause
            if cause is None:
                raise
        try:
            if cause is not None:
                raise cause
        finally:
            # the error refers to this frame: a reference back to the error would keep the memory that ran out
            del cause
        return graph, output


class Bucket:
    """The static buffers of one (image size, rows), and the work that was captured over them.

    Args:
        work: a micro-batch, which reads only the buffers.
        rows: of the bucket.
        images: (B, C, H, W) of the size, dtype and device of the buffers.
        capture: makes replays. Where the ops cannot be captured, the walks read a buffer of tokens.
    """

    def __init__(self, work: Eager, rows: int, images: Tensor, capture: Capture) -> None:
        self._work, self._rows, self._capture, self._pixels = work, rows, capture, work.ops.capturable
        self._images = images.new_zeros(rows, *images.shape[1:])
        self._draws = identity(rows).to(images.device)
        self._tokens: Tensor | None = None
        self._cotangent: Tensor | None = None
        # of the forward walk by this word, of VJPs by the dtype of their result
        self._runs: dict[Any, Run] = {}
        self._real = 0

    def forward(self, images: Tensor, draws: Draws) -> Tensor:
        """Return the output as `Eager.forward` does, for at most `rows` rows of at most `rows` images."""
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
        output: Tensor = self._replayed("forward", run)[: self._real]
        return output

    def vjp(self, cotangent: Tensor, dtype: torch.dtype | None) -> Pulled:
        """Pull back as `Eager.vjp` does; the result is valid until the bucket's next VJP or forward."""
        if self._cotangent is None:
            self._cotangent = cotangent.new_zeros(self._rows, *cotangent.shape[1:])
        fill(self._cotangent, cotangent)
        inside = dtype if self._pixels else None
        result: Pulled = self._replayed(inside, partial(self._work.vjp, self._cotangent, inside))
        if dtype is not None and not self._pixels and result.pixels is not None:
            pulled = self._work.pulled_back(result.pixels, self._images, self._draws, dtype)
            result = result._replace(pixels=pulled)
        return result.rows(self._real)

    def _replayed(self, key: Any, run: Run) -> Any:
        """Return the result of `run`, which is captured the first time."""
        if key not in self._runs:
            self._runs[key] = self._capture(run)
        return self._runs[key]()


def fill(buffer: Tensor, values: Tensor) -> None:
    """Copy rows into a buffer of at least as many and repeat the last one in the rest."""
    buffer[: len(values)].copy_(values)
    if len(values) < len(buffer):
        buffer[len(values) :] = values[-1]


class Graphs:
    """The buckets of one model on one device.

    Args:
        device: of the buckets.
        capture: makes replays.
        strict: whether to raise where work cannot be captured; otherwise a warning is logged and it is run directly.
        most: number of buckets to keep.
    """

    def __init__(self, device: torch.device, capture: Capture, *, strict: bool, most: int = MOST_BUCKETS) -> None:
        self._device, self._strict, self._most = device, strict, most
        self._wanted = capture
        self._buckets: OrderedDict[Any, Bucket] = OrderedDict()
        self._turn = threading.Lock()
        self._last: Any = None

    @contextmanager
    def turn(self, key: Any, make: Callable[[Capture], Bucket]) -> Iterator[Bucket]:
        """Lend the bucket of `key` for one micro-batch, to one caller at a time, on the host and on the device.

        make: makes the bucket where there is none, given the capture.
        """
        with self._turn:
            bucket = self._buckets.pop(key, None) or make(self._captured)
            self._buckets[key] = bucket
            while len(self._buckets) > self._most:
                self._buckets.popitem(last=False)
            if self._last is not None:
                # its last user may have run on another stream; the device waits, the host does not
                torch.cuda.current_stream(self._device).wait_event(self._last)
            try:
                yield bucket
            finally:
                if self._device.type == "cuda":
                    self._last = torch.cuda.current_stream(self._device).record_event()

    def clear(self) -> None:
        """Drop all buckets and with them their memory."""
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


def make_graphs(device: torch.device, wanted: bool | None) -> Graphs | None:
    """Return the buckets for a device; None on a CPU.

    Args:
        device: of the buckets.
        wanted: True for CUDA graphs or an error, None for CUDA graphs where work can be captured, False for buckets
            whose work is run directly.

    Raises:
        InputError: graphs are wanted on a device that has none.
    """
    if device.type != "cuda":
        if wanted:
            raise InputError(f"graphs=True needs a CUDA device; this is {device}. Use graphs=None or False.")
        return None
    if wanted is False:
        return Graphs(device, direct, strict=True)
    return Graphs(device, CudaCapture(device), strict=bool(wanted))
