"""Every op's own form against float64 on random operands, each case in a process of its own.

So a persistent CUDA error affects only its process. The processes are forked from one that has imported everything and
not yet used the GPU, so that imports are made once.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from benchmarks.gpu.conductor import end_with_parent
from benchmarks.gpu.rows import Row, failed, row, write
from benchmarks.gpu.setting import DEVICE, REHEARSAL, shapes_here, tuned
from dave_fast.bench.agreement import check, loader
from dave_fast.bench.cases import CASES, cases_of
from dave_fast.bench.rates import DTYPES
from dave_fast.ops import _registry

AT_ONCE = 2 if REHEARSAL else 8
# seconds for one case, kernels compiled
LIMIT = 60.0
# rows of a micro-batch that fills the GPU, so that later stages find its kernels compiled
ROWS, SAMPLES = 28, 50
# number of cases of an op in a rehearsal
FEW = 2


@dataclass(frozen=True)
class Job:
    """One case of an op, by its number, in one precision."""

    op: str
    number: int
    name: str
    precision: str


def jobs() -> Iterator[Job]:
    """Yield every case of every op, first in bfloat16, the engine's default."""
    shapes = shapes_here(ROWS, samples=SAMPLES)
    for precision in ("bf16", "fp32"):
        for op in CASES:
            if op == "linear_fp8" and precision != "bf16":
                continue
            for number, case in enumerate(cases_of(op, shapes)[: FEW if REHEARSAL else None]):
                yield Job(op, number, f"{case.label}, {precision}", precision)


def own_form(op: str) -> tuple[str, str | None]:
    """Return the backend that a device should have for an op, and why it cannot run here, or None."""
    if DEVICE == "cpu":
        return _registry.choose(op, "auto", DEVICE), None
    name = next(name for name in _registry.PREFERENCE[DEVICE] if name in _registry.IMPLEMENTATIONS[op])
    return name, _registry.why_not(op, name, DEVICE)


def verdict(job: Job) -> Row:
    """Return the row of one case."""
    torch.set_num_threads(1)
    backend, reason = own_form(job.op)
    if reason is not None:
        return row(job.name, "failed", note=reason, backend=backend)
    case = cases_of(job.op, shapes_here(ROWS, samples=SAMPLES))[job.number]
    seed = int(os.environ.get("DAVE_FAST_SEED") or int.from_bytes(os.urandom(4), "little"))
    dtype, began = DTYPES[job.precision], time.perf_counter()
    operands = case.operands(torch.Generator(DEVICE).manual_seed(seed), dtype)
    agreement, _ = check(case, loader(backend, DEVICE), operands, dtype)
    seconds = time.perf_counter() - began
    return row(
        *(job.name, "failed" if agreement.reason else "passed", agreement.error),
        note=agreement.reason or f"plain {agreement.plain:.2g}, {backend}, {seconds:.1f} s",
        **{"plain error": agreement.plain, "backend": backend, "seed": seed, "seconds": seconds},
    )


def _run(job: Job) -> None:
    end_with_parent()
    try:
        made = verdict(job)
    except Exception as error:
        made = failed(job.name, error)
    write({"tuned": tuned()} | made)
    raise SystemExit(made["state"] == "failed")


def rows(args: argparse.Namespace) -> Iterator[Row]:
    """Run the cases, several at once; they write their own rows, and rows of those that ended early are yielded."""
    if find_spec("triton") is not None:
        import triton  # noqa: F401
    fork = multiprocessing.get_context("fork")
    waiting, running, bad = list(jobs()), {}, 0
    while waiting or running:
        while waiting and len(running) < AT_ONCE:
            job = waiting.pop(0)
            process = fork.Process(target=_run, args=(job,), daemon=True)
            process.start()
            running[process] = (job, time.monotonic())
        time.sleep(0.02)
        for process, (job, began) in list(running.items()):
            late = time.monotonic() - began > LIMIT
            if process.is_alive() and not late:
                continue
            if process.is_alive():
                process.kill()
            process.join()
            del running[process]
            bad += process.exitcode != 0
            if late or process.exitcode not in (0, 1):
                why = f"no result after {LIMIT:.0f} s" if late else f"the process ended with {process.exitcode}"
                yield row(job.name, "failed", note=why)
    if bad:
        yield row("all ops", "failed", bad, "failed")
