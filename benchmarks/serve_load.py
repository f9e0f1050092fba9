"""Latency and throughput of the server against offered load, for batching by samples and by requests.

    python -m benchmarks.serve_load [--seconds 20] [--out benchmarks/results/<device>/serve_load.json]

Real HTTP on loopback, the demo model in float32, one engine; the load generator is another process than the server.
Arrivals are open-loop (Poisson: clients do not wait for each other); four in five requests are for 16 samples and one
in five for 128. Capacity is measured first, by clients that always have a request open. Both ways of batching run in
turns in the same server on the same engine; they differ in the scheduler only:

    samples    dave-fast's: every micro-batch takes rows of whichever requests wait
    requests   the usual: up to eight requests are collected for up to 10 ms and computed together until all are done,
               then the next eight. Each is answered as soon as its own samples are done, which favours this way.

--row-ms replaces the model by an engine that sleeps for that time for each row (and 2 ms for each micro-batch), to
measure scheduling and its cost independently of the speed and load of the machine.

A second table has deadlines at twice the capacity: how many are answered, how long after the deadline the answer is
there, and of how many of the samples. A third compares k classes of one image in one request with k requests.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np

from benchmarks import machine
from dave_fast.client import AsyncClient, Client, ServerError
from dave_fast.models.demo import demo_scene
from dave_fast.serve.formats import png
from dave_fast.serve.scheduler import MicroBatch, Part, Queued, Scheduler

WAYS = ("samples", "requests")
LOADS = (0.3, 0.6, 0.9, 1.2, 2.0)
SAMPLES, SHARES = (16, 128), (0.8, 0.2)
MEAN_SAMPLES = float(np.dot(SAMPLES, SHARES))
CLASSES = (1, 2, 5, 10)
DEADLINES_MS = (250, 1000, 4000)
GROUP, WINDOW = 8, 0.010
FIGURE = Path("docs/figures/serve_load.png")


class RequestScheduler(Scheduler):
    """A scheduler that batches whole requests: none joins until the last of the group is done."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._group: list[Queued] = []
        self._since: float | None = None

    def take(self, capacity: Any, now: float) -> MicroBatch | None:
        """Take rows of the group, request by request; predictions come first."""
        self._group = [request for request in self._group if not request.ended]
        waiting = [r for bucket in self._buckets.values() for r in bucket.requests.values() if r.deadline > now]
        first = [request for request in waiting if request.place == request.first]
        if first:
            return self._batch(first, capacity, GROUP)
        if not self._group:
            self._since = now if waiting and self._since is None else self._since if waiting else None
            if self._since is None or (len(waiting) < GROUP and now < self._since + WINDOW):
                return None
            self._group, self._since = sorted(waiting, key=lambda r: r.number)[:GROUP], None
        return self._batch([r for r in self._group if r.waiting and r in waiting], capacity, None)

    def _batch(self, requests: list[Queued], capacity: Any, most: int | None) -> MicroBatch | None:
        if not requests:
            return None
        self._turn += 1
        key = requests[0].place
        left = rows = capacity(key)
        parts: list[Part] = []
        for request in [request for request in requests if request.place == key][:most]:
            count = min(left, request.available)
            if count:
                parts.append(self._hand_out(request, count))
                left -= count
        return MicroBatch(key, tuple(parts), rows)


def sleep_in_place(explainer: Any, row_ms: float) -> None:
    """Replace the engine by one that takes a fixed time, with noise as samples."""
    import torch

    from dave_fast.engine.levels import Pulled

    noise = torch.randn(max(CLASSES), 64, 3, 128, 128, generator=torch.Generator().manual_seed(0))

    def samples(images: Any, draws: Any, targets: Any, levels: Any) -> Any:
        time.sleep(0.002 + 0.001 * row_ms * len(draws))
        return Pulled(noise[: targets.shape[1], : len(draws)], ())

    def predict(images: Any) -> Any:
        time.sleep(0.002 + 0.0005 * row_ms * len(images))
        return torch.arange(10.0).expand(len(images), -1)

    explainer.samples, explainer.predict = samples, predict


def serve(way: str, threads: int, row_ms: float | None) -> None:
    """Run the server, in a process of its own."""
    import threading

    import torch

    from dave_fast.serve import server as serving
    from dave_fast.serve.app import create_app
    from dave_fast.serve.limits import Limits
    from dave_fast.serve.models import load_models
    from dave_fast.serve.service import Service

    torch.set_num_threads(threads)
    limits = Limits(drain_seconds=5)
    models = load_models(["demo"], ["cpu"], precision="fp32")
    if row_ms is not None:
        sleep_in_place(models["demo"].explainers[0], row_ms)
    service = Service(models, limits)
    if way == "requests":
        service.shared.scheduler = RequestScheduler(service.scheduler.limits)

        def wake() -> None:
            # the scheduler wakes on arrivals only, and a window may end without one
            while True:
                time.sleep(WINDOW / 2)
                with service.shared.lock:
                    service.shared.lock.notify_all()

        threading.Thread(target=wake, daemon=True).start()
    server = serving.make_server(create_app(service, limits), limits)

    async def run() -> None:
        task = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        print(f"http://127.0.0.1:{server.port}", flush=True)
        await task

    asyncio.run(run())


@dataclass
class Outcome:
    """The outcome of the requests of one run.

    Attributes:
        offered: number of requests.
        seconds: samples -> seconds of each answered request.
        rows: samples of all answers.
        refused: status -> number of requests.
        duration: seconds of the run.
        deadline_ms: of each request, or None.
        asked: samples that the answered requests asked for.
    """

    offered: int = 0
    seconds: dict[int, list[float]] = field(default_factory=lambda: {samples: [] for samples in SAMPLES})
    rows: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    duration: float = 0.0
    deadline_ms: int | None = None
    asked: int = 0

    async def one(self, client: AsyncClient, picture: bytes, samples: int, seed: int) -> None:
        """Send a request and record its answer or refusal."""
        began = time.monotonic()
        self.offered += 1
        try:
            told = await client.explain(picture, n_samples=samples, seed=seed, deadline_ms=self.deadline_ms)
            self.seconds[samples].append(time.monotonic() - began)
            self.rows += told.samples
            self.asked += samples
        except ServerError as error:
            name = str(error.status)
            self.refused[name] = self.refused.get(name, 0) + 1

    def table(self) -> dict[str, Any]:
        """Return the numbers of the run."""
        answered = [second for some in self.seconds.values() for second in some]
        quantiles = {
            f"p{q}_ms_of_{samples}": float(np.quantile(some, q / 100)) * 1000
            for samples, some in self.seconds.items()
            if some
            for q in (50, 99)
        }
        return {
            "offered": self.offered,
            "answered": len(answered),
            "refused": self.refused,
            "lost": self.offered - len(answered) - sum(self.refused.values()),
            "rows_per_s": self.rows / self.duration,
            "answers_per_s": len(answered) / self.duration,
            **quantiles,
        }

    def late_table(self) -> dict[str, Any]:
        """Return the numbers of a run with deadlines."""
        assert self.deadline_ms is not None
        late = [1000 * second - self.deadline_ms for some in self.seconds.values() for second in some]
        return {
            "deadline_ms": self.deadline_ms,
            "offered": self.offered,
            "answered": len(late),
            "refused": self.refused,
            "late_ms_p50": float(np.median(late)),
            "late_ms_p99": float(np.quantile(late, 0.99)),
            "late_ms_most": max(late),
            "share_of_samples": self.rows / self.asked,
        }


async def saturate(address: str, picture: bytes, seconds: float, clients: int = 24) -> Outcome:
    """Measure the capacity by clients that always have a request open."""
    outcome, rng, began = Outcome(), random.Random(1), time.monotonic()
    async with AsyncClient(address, retries=0, timeout=120) as client:

        async def keep_asking(number: int) -> None:
            while time.monotonic() < began + seconds:
                (samples,) = rng.choices(SAMPLES, SHARES)
                await outcome.one(client, picture, samples, number)

        await asyncio.gather(*map(keep_asking, range(clients)))
    outcome.duration = time.monotonic() - began
    return outcome


async def offer(address: str, picture: bytes, rate: float, seconds: float, deadline_ms: int | None = None) -> Outcome:
    """Send requests as Poisson arrivals of `rate` a second, and wait for all answers."""
    outcome, rng, began = Outcome(deadline_ms=deadline_ms), random.Random(2), time.monotonic()
    async with AsyncClient(address, retries=0, timeout=120, connections=2000) as client:
        tasks, due = [], began
        while due < began + seconds:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            (samples,) = rng.choices(SAMPLES, SHARES)
            tasks.append(asyncio.create_task(outcome.one(client, picture, samples, len(tasks))))
            due += rng.expovariate(rate)
        await asyncio.gather(*tasks)
    outcome.duration = time.monotonic() - began
    return outcome


class Process:
    """A server's process and its address."""

    def __init__(self, way: str, threads: int, row_ms: float | None) -> None:
        command = [sys.executable, "-m", "benchmarks.serve_load", "--serve", way, "--threads", str(threads)]
        command += [] if row_ms is None else ["--row-ms", str(row_ms)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        self.process.wait()


def cpu_seconds(pid: int) -> float:
    """Return user and system time of a process so far (Linux), which is independent of other load."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def classes(server: Process, picture: bytes, repeats: int = 3) -> list[dict[str, float]]:
    """Compare k classes in one request with k requests at once: medians of alternating repeats, wall and CPU time."""
    rows = []
    with Client(server.address, timeout=600) as client:

        async def apart(k: int) -> None:
            async with AsyncClient(server.address, timeout=600) as many:
                await asyncio.gather(*(many.explain(picture, target, n_samples=32) for target in range(k)))

        def timed(ask: Callable[[], Any]) -> tuple[float, float]:
            wall, cpu = time.monotonic(), cpu_seconds(server.process.pid)
            ask()
            return time.monotonic() - wall, cpu_seconds(server.process.pid) - cpu

        for k in CLASSES:
            pairs = []
            for _ in range(repeats):
                together = timed(partial(client.explain, picture, list(range(k)), n_samples=32))
                pairs.append((*together, *timed(lambda k=k: asyncio.run(apart(k)))))
            one, one_cpu, many, many_cpu = np.median(np.array(pairs), axis=0)
            rows.append(
                {
                    "k": k,
                    "one_request_s": one,
                    "k_requests_s": many,
                    "ratio": one / many,
                    "one_request_cpu_s": one_cpu,
                    "k_requests_cpu_s": many_cpu,
                    "cpu_ratio": one_cpu / many_cpu,
                }
            )
            print(rows[-1], flush=True)
    return rows


def measure(seconds: float, threads: int, row_ms: float | None) -> dict[str, Any]:
    """Measure everything, both ways in turns."""
    picture = png(demo_scene().image)
    runs: list[dict[str, Any]] = []
    with Process("samples", threads, row_ms) as ours, Process("requests", threads, row_ms) as usual:
        addresses = {"samples": ours.address, "requests": usual.address}
        for address in addresses.values():
            asyncio.run(saturate(address, picture, 2.0))
        capacity = {way: [asyncio.run(saturate(addresses[way], picture, seconds)).table()] for way in WAYS}
        rate = capacity["samples"][0]["rows_per_s"] / MEAN_SAMPLES
        for load in LOADS:
            for way in WAYS:
                told = asyncio.run(offer(addresses[way], picture, load * rate, seconds)).table()
                runs.append({"batching": way, "load": load, **told})
                print(runs[-1], flush=True)
        deadlines = []
        for deadline_ms in DEADLINES_MS:
            told = asyncio.run(offer(ours.address, picture, max(LOADS) * rate, seconds, deadline_ms)).late_table()
            deadlines.append(told)
            print(told, flush=True)
        for way in WAYS:
            capacity[way].append(asyncio.run(saturate(addresses[way], picture, seconds)).table())
        # an engine that sleeps has no forward pass that classes could share
        several = classes(ours, picture) if row_ms is None else []
    goodput = next(run for run in runs if run["batching"] == "samples" and run["load"] == 2.0)["rows_per_s"]
    rows = [told["rows_per_s"] for told in capacity["samples"]]
    return {
        "environment": machine.environment("fastapi", "uvicorn"),
        "seconds": seconds,
        "server_threads": threads,
        "engine": "the demo model, float32" if row_ms is None else f"sleeps 2 ms and {row_ms:g} ms a row",
        "capacity": capacity,
        "offered_at_load_1_per_s": rate,
        "goodput_at_2x_over_capacity": goodput / float(np.mean(rows)),
        "runs": runs,
        "deadlines_at_2x": deadlines,
        "classes": several,
    }


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw p50 and p99 of the small requests, and rows a second, against the load."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    latency, throughput = figure.subplots(1, 2)
    for way, colour in zip(WAYS, ("#b3401f", "0.45"), strict=True):
        runs = [run for run in results["runs"] if run["batching"] == way]
        loads = [run["load"] for run in runs]
        for quantile, style in (("p50", "-"), ("p99", "--")):
            values = [run.get(f"{quantile}_ms_of_16", np.nan) for run in runs]
            latency.plot(loads, values, style, marker="o", ms=4, color=colour, label=f"batching {way}, {quantile}")
        throughput.plot(
            loads, [run["rows_per_s"] for run in runs], marker="o", ms=4, color=colour, label=f"batching {way}"
        )
    most = np.mean([told["rows_per_s"] for told in results["capacity"]["samples"]])
    throughput.plot([0, 1, max(LOADS)], [0, most, most], ":", color="0.6", label="capacity")
    latency.set(xlabel="offered load, of capacity", ylabel="ms, requests of 16 samples", yscale="log")
    throughput.set(xlabel="offered load, of capacity", ylabel="samples a second in answers", ylim=(0, None))
    for axes in (latency, throughput):
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="of every run")
    parser.add_argument("--threads", type=int, default=1, help="of the server's engine; the generator needs a core too")
    parser.add_argument("--row-ms", type=float, help="an engine that sleeps so long a row, in place of the model")
    parser.add_argument("--out", type=Path, default=machine.results_path("serve_load"))
    parser.add_argument("--figure", type=Path, default=FIGURE)
    parser.add_argument("--serve", choices=WAYS, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.serve:
        serve(chosen.serve, chosen.threads, chosen.row_ms)
        return
    results = measure(chosen.seconds, chosen.threads, chosen.row_ms)
    machine.write_json(chosen.out, results)
    draw(results, chosen.figure)
    print(f"goodput at twice the capacity: {results['goodput_at_2x_over_capacity']:.3f} of it; {chosen.out}")


if __name__ == "__main__":
    main()
