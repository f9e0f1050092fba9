"""The first rows of a run: versions, and the forms of the ops that this installation can run."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from benchmarks.gpu.ops import own_form
from benchmarks.gpu.rows import Row, row
from benchmarks.gpu.setting import DEVICE
from dave_fast.bench.cases import CASES
from dave_fast.bench.machine import device_name, environment
from dave_fast.ops.choices import Choices


def rows(args: argparse.Namespace) -> Iterator[Row]:
    """Yield the versions, and for each op the form that the device should have."""
    # device and commit are in every row
    found = {k: v for k, v in environment("kornia", "captum").items() if k not in ("device", "commit")}
    yield row("versions", "measured", note=", ".join(f"{k} {v}" for k, v in found["versions"].items()), **found)
    reasons: dict[str, list[str]] = {}
    for op in CASES:
        backend, reason = own_form(op)
        reasons.setdefault(reason or "", []).append(f"{op} ({backend})")
    for reason, ops in sorted(reasons.items()):
        note = f"{reason}: {', '.join(ops)}" if reason else ", ".join(ops)
        yield row("forms of the ops", "failed" if reason else "passed", len(ops), "ops", note)


def choices(args: argparse.Namespace) -> Iterator[Row]:
    """Yield the choices of tuning, and the time of every candidate."""
    kept = Choices.of(device_name(DEVICE)).all()
    if not kept:
        yield row("choices", "not measured", note="no kernel of this device was tuned")
    for problem, by_rows in kept.items():
        for rows_, choice in by_rows.items():
            timed = {name: value for name, value in choice.milliseconds.items() if value is not None}
            first, best = next(iter(choice.milliseconds.values())), timed[choice.name]
            note = f"{choice.name}, the first {'cannot run' if first is None else f'{1e3 * first:.4g}'}"
            yield row(f"{problem}, {rows_} rows", "measured", 1e3 * best, "µs", note, milliseconds=choice.milliseconds)
