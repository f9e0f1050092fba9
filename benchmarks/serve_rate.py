"""What a server on a CPU answers: rows a second by classes in a request, or full answers within a deadline.

    python -m benchmarks.serve_rate [MODEL] [--seconds 4] [--repeats 3]
    python -m benchmarks.serve_rate [MODEL] --deadline-ms 250 [--precision int8] [--tree CHECKOUT]

Of the first, the ρ and c(k) of docs/cluster-serving.md: six clients always have a request of 32 samples open at
`dave-fast serve MODEL` on loopback. Between two readings of /metrics: rows a second of the engine, and rows a second of
processor time of the whole server with maps and HTTP, which other load on the machine disturbs less. Medians over
repeats and their range.

Of the second, the table of docs/serving.md: one, two and four clients always have a request with this deadline open.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from dave_fast.client import Client, ServerError

CLASSES = (1, 2, 5, 10)
CLIENTS, SAMPLES, WARM = 6, 32, 1.5
DEADLINE_CLIENTS, DEADLINE_SAMPLES = (1, 2, 4), (16, 32)


@dataclass(frozen=True)
class Look:
    """The counters of a server since its start.

    Attributes:
        rows: computed by its engines.
        engine: seconds of its engines.
        processor: seconds of processor time.
    """

    rows: float
    engine: float
    processor: float


def look(address: str, process: int) -> Look:
    """Read the counters of a server; Linux only, since processor time is that of /proc."""
    text = httpx.get(f"{address}/metrics").text

    def total(name: str) -> float:
        return sum(float(value) for value in re.findall(rf"^dave_fast_{name}{{[^}}]*}} (\S+)$", text, re.M))

    with open(f"/proc/{process}/stat") as file:
        user, system = file.read().rsplit(")", 1)[1].split()[11:13]
    return Look(total("rows_total"), total("device_seconds_sum"), (int(user) + int(system)) / os.sysconf("SC_CLK_TCK"))


def measure(address: str, process: int, picture: bytes, classes: int, seconds: float) -> tuple[float, float]:
    """Measure rows a second of the engine, and of processor time."""
    over = threading.Event()

    def ask() -> None:
        with Client(address) as client:
            while not over.is_set():
                client.explain(picture, top_k=classes, n_samples=SAMPLES)

    threads = [threading.Thread(target=ask) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    time.sleep(WARM)
    before = look(address, process)
    time.sleep(seconds)
    after = look(address, process)
    over.set()
    for thread in threads:
        thread.join()
    rows = after.rows - before.rows
    return rows / (after.engine - before.engine), rows / (after.processor - before.processor)


@contextmanager
def serving(model: str, precision: str, tree: Path) -> Iterator[tuple[str, int, bytes]]:
    """Run a server of the package in `tree`, and yield its address, its process and a picture."""
    command = [sys.executable, "-m", "dave_fast", "serve", model, "--precision", precision, "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    pipes: dict[str, Any] = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True}
    server = subprocess.Popen([*command, "--device", "cpu"], cwd=tree, env=environment, **pipes)
    try:
        assert server.stderr is not None
        address = next(
            found[1] for line in server.stderr if (found := re.search(r'"listening", "address": "([^"]+)"', line))
        )
        threading.Thread(target=server.stderr.read, daemon=True).start()
        yield address, server.pid, httpx.get(f"{address}/example.png").content
    finally:
        server.terminate()
        server.wait()


def rates(given: argparse.Namespace) -> None:
    """Print the table of rows a second."""
    made: dict[int, list[tuple[float, float]]] = {classes: [] for classes in CLASSES}
    with serving(given.model, given.precision, given.tree) as (address, process, picture):
        for _ in range(given.repeats):
            for classes in CLASSES:
                made[classes].append(measure(address, process, picture, classes, given.seconds))
    base = statistics.median(processor for _, processor in made[1])
    print(f"load average {os.getloadavg()[0]:.1f}, {os.cpu_count()} processors")
    print("| k | rows/s of the engine | rows/s of processor time | c(k) |\n|---|---|---|---|")
    for classes, pairs in made.items():
        cells = [with_range(values) for values in zip(*pairs, strict=True)]
        cost = base / statistics.median(processor for _, processor in pairs)
        print(f"| {classes} | {cells[0]} | {cells[1]} | {cost:.2f} |")


@dataclass(frozen=True)
class Answers:
    """What clients got in some time.

    Attributes:
        full: answers with all samples within the deadline, a second.
        milliseconds: median time to an answer; NaN where there was none.
        failed: share of the requests that got an error.
    """

    full: float
    milliseconds: float
    failed: float


def within(address: str, picture: bytes, clients: int, samples: int, deadline_ms: int, seconds: float) -> Answers:
    """Let some clients ask, each as soon as its last request is answered."""
    over, times, full, failed = threading.Event(), list[float](), list[bool](), list[ServerError]()

    def ask() -> None:
        with Client(address) as client:
            while not over.is_set():
                began = time.perf_counter()
                try:
                    answer = client.explain(picture, n_samples=samples, deadline_ms=deadline_ms)
                except ServerError as error:
                    failed.append(error)
                    continue
                times.append(1e3 * (time.perf_counter() - began))
                full.append(answer.samples == samples and times[-1] <= deadline_ms)

    threads = [threading.Thread(target=ask) for _ in range(clients)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    time.sleep(seconds)
    over.set()
    for thread in threads:
        thread.join()
    rate = sum(full) / (time.perf_counter() - began)
    return Answers(rate, statistics.median(times or [math.nan]), len(failed) / (len(failed) + len(times)))


def answers(given: argparse.Namespace) -> None:
    """Print the table of full answers within a deadline."""
    cases = [(samples, clients) for samples in DEADLINE_SAMPLES for clients in DEADLINE_CLIENTS]
    made: dict[tuple[int, int], list[Answers]] = {case: [] for case in cases}
    with serving(given.model, given.precision, given.tree) as (address, _, picture):
        within(address, picture, 1, *DEADLINE_SAMPLES[:1], 10_000, WARM)
        for _ in range(given.repeats):
            for samples, clients in cases:
                made[samples, clients].append(
                    within(address, picture, clients, samples, given.deadline_ms, given.seconds)
                )
    print(f"{given.precision}, {given.deadline_ms} ms")
    print("| S | clients | full answers/s | median ms | failed |\n|---|---|---|---|---|")
    for (samples, clients), got in made.items():
        full = with_range([each.full for each in got], "{:.1f}")
        milliseconds = with_range([each.milliseconds for each in got])
        print(f"| {samples} | {clients} | {full} | {milliseconds} | {max(each.failed for each in got):.1%} |")


def with_range(values: Sequence[float], form: str = "{:.0f}") -> str:
    """Return the median and the range of some values."""
    return f"{form} ({form} to {form})".format(statistics.median(values), min(values), max(values))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--deadline-ms", type=int)
    parser.add_argument("--tree", type=Path, default=Path(), help="another checkout, whose server is measured")
    given = parser.parse_args()
    given.tree = given.tree.resolve()
    (rates if given.deadline_ms is None else answers)(given)


if __name__ == "__main__":
    main()
