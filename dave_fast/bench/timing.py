"""Times: contestants in turns, medians with their spread, and on a GPU what its own clock says.

A contestant is a list of calls, one for each set of operands, so that repeats do not find their data in a cache. On
CUDA the calls are captured into a graph where that is possible: launches then cost next to nothing, as in the engine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Call = Callable[[], Any]
# a quantile this far out is only said of so many repeats
P99_NEEDS = 100
# calls that a GPU's clock is read around: the resolution of events is half a microsecond
GRAPH_SECONDS = 2e-3


def in_turns(
    contestants: Mapping[str, Sequence[Call]],
    repeats: int,
    device: torch.device | str = "cpu",
    *,
    warmup: int = 1,
    budget: float | None = None,
    host: bool = False,
    captured: dict[str, bool] | None = None,
) -> dict[str, list[float]]:
    """Seconds a call of every contestant in every repeat; nobody always runs behind the same neighbour.

    warmup: uncounted runs of each beforehand. budget: seconds after which no further repeat begins (one always does).
    host: the host's clock also on a GPU, as whoever waits for the result reads it. captured: is told whether each was
    timed as a graph (never by the host's clock); those that cannot be captured are timed as they run.
    """
    clocks = {}
    for name, calls in contestants.items():
        clocks[name], graph = clock(calls, device, warmup, host=host)
        if captured is not None:
            captured[name] = graph
    seconds: dict[str, list[float]] = {name: [] for name in clocks}
    names = list(clocks)
    began = time.perf_counter()
    for repeat in range(repeats):
        turn = repeat % len(names) if names else 0
        for name in names[turn:] + names[:turn]:
            seconds[name].append(clocks[name]())
        if budget is not None and time.perf_counter() - began > budget:
            break
    return seconds


def clock(
    calls: Sequence[Call], device: torch.device | str, warmup: int = 1, *, host: bool = False
) -> tuple[Callable[[], float], bool]:
    """A function that runs the calls once and tells the seconds of one of them, warmed up; whether it is a graph."""

    def once() -> None:
        for call in calls:
            call()

    for _ in range(warmup):
        once()
    if host or torch.device(device).type != "cuda":
        return lambda: host_seconds(once, device) / len(calls), False
    run, times, captured = _many(calls)
    return lambda: _by_events(run) / (len(calls) * times), captured


def _by_events(run: Call) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) * 1e-3


def _many(calls: Sequence[Call]) -> tuple[Call, int, bool]:
    """The calls often enough for the GPU's clock, how often, and whether as a graph: where they can be captured."""

    def once() -> None:
        for call in calls:
            call()

    torch.cuda.synchronize()
    times = max(1, round(GRAPH_SECONDS / max(1e-6, _by_events(once))))
    waiting = _waits(once)

    def eager() -> None:
        for _ in range(times):
            once()

    if waiting:
        return eager, times, False
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            eager()
        torch.cuda.synchronize()
    except RuntimeError:
        # what cannot be captured is timed as it runs
        torch.cuda.synchronize()
        return eager, times, False
    return graph.replay, times, True


def _waits(call: Call) -> bool:
    """Whether the call waits for the device or copies from pageable memory, which no graph can hold."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def host_seconds(call: Call, device: torch.device | str) -> float:
    """Seconds from the call to its finished result, as someone who waits for it sees them."""
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, lowest, highest and all values; the 99th percentile where there are enough of them."""
    found = {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "repeats": len(values),
        "all": [float(f"{value:.6g}") for value in values],
    }
    if len(values) >= P99_NEEDS:
        found["p99"] = statistics.quantiles(values, n=100, method="inclusive")[98]
    return found


def peak_memory(call: Call, device: torch.device | str) -> int | None:
    """Bytes that a call takes on a GPU beyond what was taken before; None on a CPU, whose peak no counter resets."""
    if torch.device(device).type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)
