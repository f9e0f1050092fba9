"""Where one micro-batch of 28 rows spends its time: every kernel by torch.profiler; the GPU's sum beside the wall."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.rows import Row, row
from benchmarks.gpu.setting import DEVICE, REHEARSAL, explainer_here, guarded, images_here, model_here, timed, why_no
from dave_fast.sampling import draw

ROWS = 2 if REHEARSAL else 28
REPEATS, BUDGET = (1, 1.0) if REHEARSAL else (20, 2.0)
MOST = 40


def rows(args: argparse.Namespace) -> Iterator[Row]:
    """Yield a row a kernel and a sum, for each precision of the arguments."""
    model = model_here()
    for precision in args.precisions:
        reason = why_no(precision)
        if reason is not None:
            yield row(precision, "not measured", note=reason)
            continue
        yield from guarded(precision, partial(_micro_batch, model, precision))


def _micro_batch(model: torch.nn.Module, precision: str) -> Iterator[Row]:
    """Perturb, both walks and pull_back of one micro-batch, from images to contributions."""
    images = images_here(1)
    targets = torch.zeros(1, 1, dtype=torch.int64)

    def work(**settings: Any) -> Callable[[], Any]:
        explainer = explainer_here(model, precision, internal_batch_size=ROWS, **settings)
        draws = draw(ROWS, height=images.shape[2], width=images.shape[3], sampling=explainer.sampling)
        return partial(explainer.contributions, images, draws, targets)

    eager = work(graphs=False)
    wall = timed(eager, REPEATS, BUDGET)["median"]
    found = profiled(eager)
    busy = sum(seconds for _, _, seconds in found)
    for name, calls, seconds in found[:MOST]:
        note = f"{seconds / busy:.1%}, {calls} calls"
        yield row(f"{precision} {name}", "measured", 1e6 * seconds, "µs", note, calls=calls, share=seconds / busy)
    replayed = None if REHEARSAL else timed(work(), REPEATS, BUDGET)["median"]
    note = f"{len(found)} kernels; wall {1e3 * wall:.2f} ms one by one"
    note += "" if replayed is None else f", {1e3 * replayed:.2f} ms as graphs"
    launches = sum(calls for _, calls, _ in found)
    more = {"wall seconds": wall, "graphs seconds": replayed, "launches": launches}
    yield row(f"{precision} GPU in all, {ROWS} rows", "measured", 1e3 * busy, "ms", note, **more)


def profiled(call: Callable[[], Any]) -> list[tuple[str, int, float]]:
    """Return (kernel, calls, seconds) of one call, the longest first; PyTorch's operators on a CPU."""
    gpu = DEVICE == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    # the first profile of a process pays for starting the profiler
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
