"""The time of every kernel of one micro-batch of 28 rows by torch.profiler, their sum, and the wall time."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.rows import Row, row
from benchmarks.gpu.setting import (
    DEVICE,
    REHEARSAL,
    as_graphs,
    by_precision,
    explainer_here,
    guarded,
    images_here,
    model_here,
    replays,
    timed,
)
from dave_fast import DAVE
from dave_fast.models.fingerprint import HOST, State
from dave_fast.ops.precision import own_arithmetic
from dave_fast.sampling import draw
from dave_fast.targets.cotangents import ElementCotangent
from dave_fast.transfers import moved

ROWS = 2 if REHEARSAL else 28
REPEATS, BUDGET = (1, 1.0) if REHEARSAL else (20, 2.0)
MOST = 40


def rows(args: argparse.Namespace) -> Iterator[Row]:
    """Yield a row for each kernel and the sum, for each precision of the arguments; then the checks of a call."""
    model = model_here()
    yield from by_precision(args.precisions, lambda each: guarded(each, partial(_micro_batch, model, each)))
    yield from guarded("checks of the weights", partial(_checks, model, "their own device"))
    # the case of DAVE(model, device="cuda") with a model on the host
    yield from guarded("checks on the host", partial(_checks, deepcopy(model).cpu(), "the host"))


def _micro_batch(model: torch.nn.Module, precision: str) -> Iterator[Row]:
    """Measure one micro-batch from images to contributions: perturb, both walks and pull_back."""
    eager = _work(explainer_here(model, precision, internal_batch_size=ROWS, graphs=False))
    wall = timed(eager, REPEATS, BUDGET)["median"]
    found = profiled(eager)
    busy = sum(seconds for _, _, seconds in found)
    for name, calls, seconds in found[:MOST]:
        note = f"{seconds / busy:.1%}, {calls} calls"
        yield row(f"{precision} {name}", "measured", 1e6 * seconds, "µs", note, calls=calls, share=seconds / busy)
    replayed, explainer = None, explainer_here(model, precision, internal_batch_size=ROWS)
    if not REHEARSAL:
        replayed = timed(_work(explainer), REPEATS, BUDGET)["median"]
    note = f"{len(found)} kernels; wall {1e3 * wall:.2f} ms one by one"
    note += "" if replayed is None else f", {1e3 * replayed:.2f} ms {'as graphs' if replays(explainer) else 'the same'}"
    launches = sum(calls for _, calls, _ in found)
    more = {"wall seconds": wall, "graphs seconds": replayed, "launches": launches}
    made = row(f"{precision} GPU in all, {ROWS} rows", "measured", 1e3 * busy, "ms", note, **more)
    if not found:
        made |= {"state": "failed", "value": None, "note": f"the profiler saw no kernel: is CUPTI permitted? {note}"}
    yield as_graphs(made, explainer)


def _work(explainer: DAVE) -> Callable[[], Any]:
    """Return a call of one micro-batch, without the explainer's check for changes of the model."""
    images = images_here(1)
    draws = draw(ROWS, height=images.shape[2], width=images.shape[3], sampling=explainer.sampling)
    target = ElementCotangent(torch.zeros(1, dtype=torch.int64, device=DEVICE))

    def work() -> None:
        with own_arithmetic(explainer.device):
            batches.vjps(images, draws, [target], images.dtype)

    with own_arithmetic(explainer.device):
        batches = explainer._cache.batches(explainer._cache.route(images), ROWS)
    return work


def _checks(model: torch.nn.Module, where: str) -> Iterator[Row]:
    """Measure the cost of the check for changes in every call: checksums of the weights, and the modules' structure."""
    state = State(model, values=True)
    structure = timed(partial(state.holds, values=False), REPEATS, BUDGET)["median"]
    seconds = timed(lambda: moved(state.checksums(), HOST), REPEATS, BUDGET)["median"]
    note = f"of each call; the modules' structure, on the host: {1e3 * structure:.3g} ms"
    yield row(f"checksums of the weights on {where}", "measured", 1e3 * seconds, "ms", note, structure=structure)


def profiled(call: Callable[[], Any]) -> list[tuple[str, int, float]]:
    """Return (kernel, calls, seconds) of one call, the longest first; PyTorch's operators on a CPU."""
    gpu = DEVICE == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    # the first profile of a process includes the start of the profiler
    for _ in range(2):
        with profile(activities=activities) as profiler:
            call()
            if gpu:
                torch.cuda.synchronize()
    wanted = DeviceType.CUDA if gpu else DeviceType.CPU
    events = [
        event for event in profiler.key_averages() if event.device_type == wanted and not event.is_user_annotation
    ]
    times = [(e.key, e.count, 1e-6 * (e.self_device_time_total if gpu else e.self_cpu_time_total)) for e in events]
    return sorted((each for each in times if each[2] > 0), key=lambda each: -each[2])
