"""Helpers of the stages: the device, the model, its images, precisions, timing and errors.

In a rehearsal (DAVE_FAST_REHEARSE=1) everything runs on a CPU with the demo model and tiny shapes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu import rows
from benchmarks.gpu.rows import Row, failed, row
from dave_fast import DAVE
from dave_fast.bench.shapes import Shapes, build_model
from dave_fast.bench.timing import host_seconds, spread
from dave_fast.bench.whole import NOISE_ALPHA
from dave_fast.engine.graphs import CudaCapture
from dave_fast.ops.choices import Choices, folder
from dave_fast.ops.precision import has_bf16, why_no_fp8

REHEARSAL = os.environ.get("DAVE_FAST_REHEARSE") == "1"
DEVICE = "cpu" if REHEARSAL else "cuda"
MODEL = "vit_base_patch16_224"
# model -> width, heads, blocks
VITS = {"S/16": (384, 6, 12), "B/16": (768, 12, 12), "L/16": (1024, 16, 24)}


def vit_shapes(model: str, rows: int, *, size: int = 224, patch: int = 16, samples: int = 50) -> Shapes:
    """Return the shapes of a ViT with a class token.

    Args:
        model: of VITS.
        rows: of a micro-batch.
        size: side of the image in pixels.
        patch: side of a patch in pixels.
        samples: S.
    """
    width, heads, blocks = VITS[model]
    return Shapes(
        samples=samples,
        rows=rows,
        image=(3, size, size),
        patch=(patch, patch),
        prefix=1,
        width=width,
        heads=heads,
        head_dim=width // heads,
        hidden=4 * width,
        activation="gelu",
        blocks=blocks,
        read=1,
    )


def shapes_here(rows: int, *, size: int = 224, samples: int = 50) -> Shapes:
    """Return ViT-B/16's shapes; tiny ones in a rehearsal."""
    return (
        vit_shapes("S/16", 1, size=32, samples=3) if REHEARSAL else vit_shapes("B/16", rows, size=size, samples=samples)
    )


def model_here(size: int | None = None) -> nn.Module:
    """Return ViT-B/16 with random weights, the same in every process, on the device; the demo model in a rehearsal."""
    torch.manual_seed(0)
    return build_model("demo") if REHEARSAL else build_model(MODEL, size).to(DEVICE)


def images_here(number: int, size: int | None = None) -> Tensor:
    """Return random images (number, 3, size, size) on the device."""
    side = 128 if REHEARSAL else size or 224
    return torch.randn(number, 3, side, side, generator=torch.Generator().manual_seed(1)).to(DEVICE)


def explainer_here(model: nn.Module, precision: str, **settings: Any) -> DAVE:
    """Return dave-fast on the device; in a rehearsal fp8 is PyTorch's reference, bf16 fp32 if the CPU lacks it."""
    if REHEARSAL and precision == "fp8":
        settings = {"backend": "torch"}
    elif REHEARSAL:
        settings = {}
        precision = "fp32" if precision == "bf16" and not has_bf16(torch.device(DEVICE)) else precision
    return DAVE(model, precision=precision, noise_alpha=NOISE_ALPHA, device=DEVICE, **settings)


def why_no(precision: str) -> str | None:
    """Return why the device does not support a precision, or None; in a rehearsal all are supported."""
    if REHEARSAL:
        return None
    if precision == "fp8":
        return why_no_fp8(torch.device(DEVICE))
    if precision == "bf16" and not has_bf16(torch.device(DEVICE)):
        return "this device does not multiply bfloat16"
    return None


def by_precision(precisions: Sequence[str], make: Callable[[str], Iterator[Row]]) -> Iterator[Row]:
    """Yield the rows that `make` gives for each precision, or the reason why the device does not support it."""
    for precision in precisions:
        reason = why_no(precision)
        if reason is None:
            yield from make(precision)
        else:
            yield row(precision, "not measured", note=reason)


def tuned() -> bool:
    """Return whether a choice of tuning is on disk for this GPU and these versions, or any if no GPU is named.

    It does not use the GPU, because a stage may fork later.
    """
    if REHEARSAL or find_spec("triton") is None:
        return False
    gpu = os.environ.get(rows.DEVICE)
    return any(folder().glob("choices-*.json")) if gpu is None else Choices.of(gpu).path.exists()


def replays(explainer: DAVE) -> bool:
    """Return whether the explainer's micro-batches so far were replayed as CUDA graphs."""
    graphs = explainer._cache.graphs
    return graphs is not None and isinstance(graphs._wanted, CudaCapture)


def as_graphs(made: Row, explainer: DAVE) -> Row:
    """Add to a row whether graphs were replayed; on a GPU it is failed if they were not."""
    replayed = replays(explainer)
    if REHEARSAL or replayed:
        return made | {"graphs": replayed}
    why = "no CUDA graph could be captured: kernels were launched one by one"
    return made | {"graphs": False, "state": "failed", "note": f"{why}; {made['note']}"}


def guarded(name: str, make: Callable[[], Iterator[Row]]) -> Iterator[Row]:
    """Yield the rows of one part of a stage, and a row for an error in it, so that the next part runs."""
    try:
        yield from make()
    except Exception as error:
        yield failed(name, error)


def needs_gpu(name: str) -> Row:
    """Return the row of a part that a rehearsal leaves out."""
    return row(name, "needs a GPU")


def timed(call: Callable[[], Any], repeats: int, budget: float) -> dict[str, Any]:
    """Time a call until its result is there; return the spread of the seconds.

    Args:
        call: to time; it runs once beforehand.
        repeats: at most.
        budget: seconds after which no further repeat begins; there is at least one.
    """
    call()
    seconds: list[float] = []
    while not seconds or (len(seconds) < repeats and sum(seconds) < budget):
        seconds.append(host_seconds(call, DEVICE))
    return spread(seconds)
