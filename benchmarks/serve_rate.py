"""Rows a second of a saturated server, by classes in a request: the ρ and c(k) of docs/cluster-serving.md.

    python -m benchmarks.serve_rate [MODEL] [--seconds 4] [--repeats 3]

Six clients always have a request of 32 samples open at `dave-fast serve MODEL` on loopback, in float32 on this
machine's CPU. Between two readings of /metrics: rows a second of the engine, and rows a second of processor time of the
whole server with maps and HTTP, which other load on the machine disturbs less. Medians over repeats and their range.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass

import httpx

from dave_fast.client import Client

CLASSES = (1, 2, 5, 10)
CLIENTS, SAMPLES, WARM = 6, 32, 1.5


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


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    command = [sys.executable, "-m", "dave_fast", "serve", options.model, "--precision", "fp32", "--port", "0"]
    server = subprocess.Popen(
        [*command, "--device", "cpu"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    try:
        assert server.stderr is not None
        address = next(
            found[1] for line in server.stderr if (found := re.search(r'"listening", "address": "([^"]+)"', line))
        )
        threading.Thread(target=server.stderr.read, daemon=True).start()
        picture = httpx.get(f"{address}/example.png").content
        rates: dict[int, list[tuple[float, float]]] = {classes: [] for classes in CLASSES}
        for _ in range(options.repeats):
            for classes in CLASSES:
                rates[classes].append(measure(address, server.pid, picture, classes, options.seconds))
    finally:
        server.terminate()
        server.wait()
    base = statistics.median(processor for _, processor in rates[1])
    print(f"load average {os.getloadavg()[0]:.1f}, {os.cpu_count()} processors")
    print("| k | rows/s of the engine | rows/s of processor time | c(k) |\n|---|---|---|---|")
    for classes, made in rates.items():
        cells = [
            f"{statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f})"
            for values in zip(*made, strict=True)
        ]
        cost = base / statistics.median(processor for _, processor in made)
        print(f"| {classes} | {cells[0]} | {cells[1]} | {cost:.2f} |")


if __name__ == "__main__":
    main()
