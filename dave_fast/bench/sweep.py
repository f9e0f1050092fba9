"""Latency against the number of samples, and memory against resolution."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from dave_fast.bench.timing import host_seconds, peak_memory, spread
from dave_fast.bench.whole import NOISE_ALPHA
from dave_fast.engine.memory import engine_row_bytes, plan_bytes
from dave_fast.explain.explainer import DAVE
from dave_fast.ops.precision import DTYPES
from dave_fast.plan import families
from dave_fast.plan.reading import NoPlanError
from dave_fast.plan.vit_plan import make_plan

SAMPLES = (8, 16, 32, 50, 100, 200)
SIZES = (224, 336, 448, 560, 672)
REPEATS = 3


def latency_against_samples(explainer: DAVE, image: tuple[int, int, int], budget: float) -> list[dict[str, Any]]:
    """Measure the seconds of one image at growing S.

    Args:
        explainer: of the model.
        image: (C, H, W).
        budget: seconds; the list ends before the measurement that would exceed it.
    """
    images = torch.randn(1, *image).to(explainer.device)
    rows: list[dict[str, Any]] = []
    began = time.perf_counter()
    explainer.explain(images, 0, SAMPLES[0])
    for number in SAMPLES:
        call = partial(explainer.explain, images, 0, number)
        expected = rows[-1]["seconds"]["median"] * number / rows[-1]["samples"] if rows else 0.0
        if rows and time.perf_counter() - began + REPEATS * expected > budget:
            break
        seconds = spread([host_seconds(call, explainer.device) for _ in range(REPEATS)])
        rows.append({"samples": number, "seconds": seconds})
    return rows


def memory_against_size(
    build: Callable[[int], nn.Module],
    *,
    precision: str,
    device: str,
    samples: int,
    rows: int,
) -> list[dict[str, Any]]:
    """Return the bytes of one micro-batch by the formula of `dave_fast.engine.memory`; on a GPU also the measured peak.

    Args:
        build: side of the image -> model.
        precision: of the engine.
        device: to run on.
        samples: S.
        rows: of the micro-batch.

    Returns:
        A row for each of SIZES, up to the first without a plan or too large for the device.
    """
    found: list[dict[str, Any]] = []
    for size in SIZES:
        model = build(size)
        try:
            reading = families.read(model, (size, size))
        except NoPlanError:
            break
        plan = make_plan(reading, dtype=DTYPES[precision], pack=lambda matrix: matrix)
        row: dict[str, Any] = {
            "size": size,
            "tokens": plan.tokens,
            "row bytes": engine_row_bytes(plan),
            "weight bytes": plan_bytes(plan),
            "rows": rows,
        }
        if device == "cuda":
            explainer = DAVE(model, device=device, precision=precision, noise_alpha=NOISE_ALPHA)
            images = torch.randn(1, 3, size, size, device=device)
            call = partial(explainer.explain, images, 0, samples, internal_batch_size=rows)
            try:
                call()
                row["peak bytes"] = peak_memory(call, device)
            except torch.OutOfMemoryError:
                break
        found.append(row)
    return found
