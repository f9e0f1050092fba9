"""Timing of contestants in turns, with medians and their spread; on a GPU by its events.

A contestant is a list of calls, one for each set of operands, so that repeats do not find their data in a cache. On
CUDA the calls are captured into a graph if possible, which makes launches cheap, as in the engine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Call = Callable[[], Any]
# repeats from which the 99th percentile is reported
P99_NEEDS = 100
# calls are repeated to this length between two events, whose resolution is half a microsecond
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
    """Time contestants in turns; the first of a turn rotates.

    Args:
        contestants: name -> calls.
        repeats: turns.
        device: that the calls run on.
        warmup: runs of each beforehand that are not counted.
        budget: seconds after which no further turn begins; there is at least one.
        host: whether to use the host's clock also on a GPU, as someone who waits for the result would.
        captured: filled with name -> whether it was timed as a graph, which the host's clock never does.

    Returns:
        Name -> seconds of one call in each turn.
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
    """Return a function that runs the calls and returns the seconds of one of them, and whether it is a graph."""

    def once() -> None:
        for call in calls:
            call()

    for _ in range(warmup):
        once()
    if host or torch.device(device).type != "cuda":
        return lambda: host_seconds(once, device) / len(calls), False
    run, times, captured = _many(once)
    return lambda: _by_events(run) / (len(calls) * times), captured


def _by_events(run: Call) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) * 1e-3


def _many(once: Call) -> tuple[Call, int, bool]:
    """Return a call that repeats the given one for GRAPH_SECONDS, how often it does, and whether it is a graph."""
    torch.cuda.synchronize()
    times = max(1, round(GRAPH_SECONDS / max(1e-6, _by_events(once))))

    def eager() -> None:
        for _ in range(times):
            once()

    if _waits(once):
        return eager, times, False
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            eager()
        torch.cuda.synchronize()
    except RuntimeError:
        # calls that cannot be captured are timed without a graph
        torch.cuda.synchronize()
        return eager, times, False
    return graph.replay, times, True


def _waits(call: Call) -> bool:
    """Return whether the call waits for the device or copies from pageable memory, which no graph supports."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def host_seconds(call: Call, device: torch.device | str) -> float:
    """Return the seconds from the call to its finished result by the host's clock."""
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Return median, minimum, maximum and all values; the 99th percentile if there are P99_NEEDS."""
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
    """Return the peak of bytes that a call allocates on a GPU; None on a CPU, whose peak cannot be reset."""
    if torch.device(device).type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)
