"""Every op by every backend of this device, at the shapes of ViT-B/16 at 224 px and S = 50.

    pytest benchmarks/bench_ops.py [-k "attention and bf16"] --benchmark-group-by=group

A form is first compared with float64 on the operands that are timed, and skipped with the reason if it is wrong.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.gpu.setting import vit_shapes
from dave_fast.bench.agreement import check, loader
from dave_fast.bench.case import Case
from dave_fast.bench.cases import CASES, cases_of
from dave_fast.ops import _registry
from dave_fast.ops.precision import has_bf16
from dave_fast.sampling import draw, normal

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REHEARSAL = os.environ.get("DAVE_FAST_REHEARSE") == "1"
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHAPES = vit_shapes("S/16", 1, size=32, samples=3) if REHEARSAL else vit_shapes("B/16", 56 if DEVICE == "cuda" else 4)

CASES_BY_NAME = {f"{op} {case.name}": case for op in CASES for case in cases_of(op, SHAPES)}


def waiting(call: Callable[[], Any]) -> Callable[[], Any]:
    """Return the call with a wait for its result."""
    if DEVICE != "cuda":
        return call

    def run() -> Any:
        result = call()
        torch.cuda.synchronize()
        return result

    return run


@pytest.mark.parametrize("backend", [name for name, b in _registry.BACKENDS.items() if DEVICE in b.devices])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", CASES_BY_NAME)
def test_op(benchmark: Any, name: str, precision: str, backend: str) -> None:
    """Time one case by one backend."""
    case: Case = CASES_BY_NAME[name]
    reason = _registry.why_not(case.op, backend, DEVICE)
    if reason is None and precision == "bf16" and not has_bf16(torch.device(DEVICE)):
        reason = "this device does not multiply bfloat16"
    if reason is not None:
        pytest.skip(reason)
    dtype = PRECISIONS[precision]
    operands = case.operands(torch.Generator(DEVICE).manual_seed(int.from_bytes(os.urandom(4), "little")), dtype)
    agreement, _ = check(case, loader(backend, DEVICE), operands, dtype)
    if agreement.reason is not None:
        pytest.skip(f"not timed: {agreement.reason}")
    benchmark.group = f"{name}, {precision}"
    benchmark.extra_info.update(gigaflops=case.gigaflops, error=agreement.error, plain_error=agreement.plain)
    benchmark(waiting(case.bind(loader(backend, DEVICE), operands, dtype)))


@pytest.mark.parametrize("n_images", [1, 64])
def test_draw(benchmark: Any, n_images: int) -> None:
    """Time the draws of 50 samples."""
    benchmark.group = "draw, S=50"
    benchmark(lambda: draw(SHAPES.samples, height=224, width=224, image_keys=range(n_images)))


def test_normal_in_torch(benchmark: Any) -> None:
    """Time the normal numbers of 50 samples in PyTorch."""
    draws = draw(SHAPES.samples, height=SHAPES.image[1], width=SHAPES.image[2])
    channels, height, width = SHAPES.image
    benchmark.group = "normal"
    benchmark.pedantic(lambda: normal(draws.keys, draws.samples, channels * height * width), rounds=3)
