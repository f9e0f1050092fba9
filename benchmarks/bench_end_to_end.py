"""Throughput and latency of whole explanations, ViT-S, -B and -L at 224 to 672 px.

    pytest benchmarks/bench_end_to_end.py [-k "base and 224"] --benchmark-group-by=group

A case is skipped, with the reason, if it does not fit the device by the formula of `dave_fast.engine.memory`, or if a
call would take longer than BENCH_SECONDS (60) at the device's measured rate of matrix products.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import pytest
import torch

from dave_fast.bench import rates
from dave_fast.bench.shapes import build_model, shapes_of
from dave_fast.bench.timing import host_seconds
from dave_fast.bench.whole import PLAIN, dave
from dave_fast.engine.free_memory import free_bytes
from dave_fast.engine.memory import engine_row_bytes
from dave_fast.ops.precision import DTYPES, why_not
from dave_fast.plan import families
from dave_fast.plan.vit_plan import make_plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODELS = ("vit_small_patch16_224", "vit_base_patch16_224", "vit_large_patch16_224")
SIZES = (224, 384, 448, 560, 672)
SAMPLES = 50 if DEVICE == "cuda" else 8
SECONDS = float(os.environ.get("BENCH_SECONDS", "60"))
IMAGES = {"one image": 1, "throughput": 8 if DEVICE == "cuda" else 2}


@cache
def gigaflops_a_second(precision: str) -> float:
    """Measure the device's rate at ViT-B's products."""
    made = [rates.ceiling(kind, 788, 768, 3072, device=DEVICE) for kind in rates.kinds_of(precision, DEVICE)]
    for each in made:
        each.run()
    return max(each.gigaflops / host_seconds(each.run, DEVICE) for each in made)


@pytest.mark.parametrize("what", IMAGES)
@pytest.mark.parametrize("precision", PLAIN)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", MODELS)
def test_explain(benchmark: Any, name: str, size: int, precision: str, what: str) -> None:
    """Time an explanation of one image, or of several."""
    reason = why_not(precision, torch.device(DEVICE))
    if reason is not None:
        pytest.skip(reason)
    model: Any = build_model(name, size)
    shapes = shapes_of(model, SAMPLES)
    expected = shapes.gigaflops() * SAMPLES * IMAGES[what] / gigaflops_a_second(precision)
    if expected > SECONDS:
        pytest.skip(f"a call would take {expected:.0f} s at this device's rate; BENCH_SECONDS allows {SECONDS:.0f}")
    row = engine_row_bytes(make_plan(families.read(model), dtype=DTYPES[precision], pack=lambda matrix: matrix))
    if row > free_bytes(torch.device(DEVICE)):
        pytest.skip(f"one row takes {row / 2**30:.1f} GiB, more than is free")
    contestant = dave(model.to(DEVICE), precision, SAMPLES, shapes, device=DEVICE)
    images = torch.randn(IMAGES[what], *shapes.image, device=DEVICE)
    benchmark.group = f"{name}, {size} px, S={SAMPLES}, {what}"
    benchmark.extra_info.update(images=IMAGES[what], gigaflops=shapes.gigaflops() * SAMPLES * IMAGES[what])

    def run() -> None:
        contestant.explain(images, None)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=20 if DEVICE == "cuda" else 3, warmup_rounds=1)
