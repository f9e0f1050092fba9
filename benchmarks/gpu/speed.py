"""Milliseconds of an explanation, from images to maps, by precision, micro-batch and number of images.

The attributions of every micro-batch are compared with those of the first.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.rows import Row, row
from benchmarks.gpu.setting import (
    DEVICE,
    REHEARSAL,
    as_graphs,
    by_precision,
    explainer_here,
    guarded,
    images_here,
    model_here,
    timed,
)
from dave_fast import DAVE
from dave_fast.bench.machine import device_name
from dave_fast.bench.timing import peak_memory

# ms an image at S = 50, 224 px: (precision, one image alone) -> goal
GOALS = {("bf16", False): 5.3, ("bf16", True): 7.0, ("fp8", False): 3.6}
GOAL_672, GOAL_SAMPLES, GOAL_GPU = 67.0, 50, "H200"
# Largest relative distance (Euclidean) of an image's raw attributions between two micro-batches. Equal rounding gives
# equal bits; a library that sums in another order rounds bfloat16 and e4m3 differently, which changes ViT-B's raw
# attribution (random weights, S = 50, on a CPU) by √2 times its distance from float32's: 0.12 in bf16, 0.34 in fp8.
# One wrong row of 50 changes it by 0.19 to 0.27, which bf16's limit distinguishes from rounding; fp8's does not.
APART = {"fp32": 5e-3, "bf16": 0.17, "fp8": 0.5}


def rows(args: argparse.Namespace) -> Iterator[Row]:
    """Yield a row for each precision, micro-batch and number of images of the arguments."""
    model = model_here(args.size)

    def of(precision: str) -> Iterator[Row]:
        for number in small(args.images):
            yield from guarded(f"{precision}, {number} images", partial(_images, args, model, precision, number))

    yield from by_precision(args.precisions, of)


def small(numbers: list[Any]) -> list[Any]:
    """Return the numbers; in a rehearsal at most two, each once."""
    return list(dict.fromkeys(each and min(each, 2) for each in numbers)) if REHEARSAL else numbers


def _images(args: argparse.Namespace, model: torch.nn.Module, precision: str, number: int) -> Iterator[Row]:
    """Measure every micro-batch of `number` images by one explainer, which caches the graphs of all."""
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    explainer = explainer_here(model, precision)
    first: list[Tensor] = []
    for rows_ in small(args.micro_batches):
        yield from guarded(
            f"{precision}, {number} images, {rows_ or 'own'} rows",
            partial(_one, args, explainer, precision, number, rows_, first),
        )


def _one(
    args: argparse.Namespace, explainer: DAVE, precision: str, number: int, rows_: int | None, first: list[Tensor]
) -> Iterator[Row]:
    """Measure one micro-batch; `first` is filled with the first one's attributions, which others are compared with."""
    samples = 2 if REHEARSAL else args.samples
    images = images_here(number, args.size)
    call = partial(explainer.explain, images, 0, samples, internal_batch_size=rows_)
    more = {} if first else _memory(explainer, images, call)
    raw = call().raw
    apart = distance(raw, first[0]) if first else None
    first[:] = first or [raw]
    seconds = timed(call, 1 if REHEARSAL else args.repeats, args.budget)
    each = 1e3 * seconds["median"] / number
    goal = goal_of(args.size, samples, precision, number)
    note = f"{1e3 / each:.1f} images/s, {1e3 * seconds['min'] / number:.4g} to {1e3 * seconds['max'] / number:.4g}"
    note += f", {seconds['repeats']} runs"
    if goal is not None:
        note += f", goal {goal}" + ("" if GOAL_GPU in device_name(DEVICE) else f" (an {GOAL_GPU}'s)")
    state = "measured"
    if apart is not None:
        note += f", {apart:.2g} apart from the first micro-batch"
        if not apart <= APART[precision]:
            state, note = "failed", f"{apart:.2g} apart from the first micro-batch, at most {APART[precision]}; {note}"
    made = row(
        f"{precision}, {number} images, {rows_ or 'own'} rows, S = {samples}",
        *(state, each, "ms/image", note),
        precision=precision,
        images=number,
        rows=rows_,
        samples=samples,
        seconds=seconds,
        size=args.size or 224,
        goal=goal,
        apart=apart,
        **more,
    )
    yield as_graphs(made, explainer)


def goal_of(size: int | None, samples: int, precision: str, number: int) -> float | None:
    """Return the goal in ms an image, or None."""
    if samples != GOAL_SAMPLES:
        return None
    if size == 672:
        return GOAL_672
    return GOALS.get((precision, number == 1)) if size is None else None


def distance(found: Tensor, other: Tensor) -> float:
    """Return the largest relative distance (Euclidean) of an image's attributions."""
    found, other = found.double().flatten(1), other.double().flatten(1)
    return float(((found - other).norm(dim=1) / other.norm(dim=1)).max())


def _memory(explainer: DAVE, images: Tensor, call: partial[Any]) -> dict[str, int | None]:
    """Return the bytes of a new explainer's first call, captures included, without the weights; None on a CPU."""
    # makes the walks with their weights, so that the peak does not include them
    explainer.fitting_rows(images)
    weights = torch.cuda.memory_allocated() if DEVICE == "cuda" else None
    peak = peak_memory(call, DEVICE)
    reserved = torch.cuda.memory_reserved() if DEVICE == "cuda" else None
    return {"peak bytes": peak, "weight bytes": weights, "reserved bytes": reserved}
