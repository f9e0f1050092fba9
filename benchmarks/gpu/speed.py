"""Milliseconds of an explanation, from images to maps, by precision, micro-batch and number of images."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.gpu.rows import Row, row
from benchmarks.gpu.setting import REHEARSAL, explainer_here, guarded, images_here, model_here, timed, why_no
from dave_fast import DAVE
from dave_fast.bench.timing import peak_memory

# ms an image on an H200 at S = 50, 224 px: (precision, one image alone) -> goal
GOALS = {("bf16", False): 5.3, ("bf16", True): 7.0, ("fp8", False): 3.6}
GOAL_672 = 67.0


def rows(args: argparse.Namespace) -> Iterator[Row]:
    """Yield a row for each precision, micro-batch and number of images of the arguments."""
    model = model_here(args.size)
    for precision in args.precisions:
        reason = why_no(precision)
        if reason is not None:
            yield row(precision, "not measured", note=reason)
            continue
        yield from guarded(precision, partial(_precision, args, model, precision))


def _precision(args: argparse.Namespace, model: torch.nn.Module, precision: str) -> Iterator[Row]:
    # one explainer keeps the graphs of all its micro-batches: the pool grows, the times do not
    explainer = explainer_here(model, precision)
    for number in args.images:
        for rows_ in args.micro_batches:
            yield from guarded(
                f"{precision}, {number} images, {rows_ or 'own'} rows",
                partial(_one, args, explainer, precision, number, rows_),
            )


def _one(args: argparse.Namespace, explainer: DAVE, precision: str, number: int, rows_: int | None) -> Iterator[Row]:
    number, rows_ = (min(number, 2), rows_ and min(rows_, 2)) if REHEARSAL else (number, rows_)
    samples = 2 if REHEARSAL else args.samples
    images = images_here(number, args.size)
    call = partial(explainer.explain, images, 0, samples, internal_batch_size=rows_)
    seconds = timed(call, 1 if REHEARSAL else args.repeats, args.budget)
    each = 1e3 * seconds["median"] / number
    goal = GOAL_672 if args.size == 672 else GOALS.get((precision, number == 1)) if args.size is None else None
    note = f"{1e3 / each:.1f} images/s, {1e3 * seconds['min'] / number:.4g} to {1e3 * seconds['max'] / number:.4g}"
    note += f", {seconds['repeats']} runs" + (f", goal {goal}" if goal and samples == 50 else "")
    yield row(
        f"{precision}, {number} images, {rows_ or 'own'} rows, S = {samples}",
        *("measured", each, "ms/image", note),
        precision=precision,
        images=number,
        rows=rows_,
        samples=samples,
        seconds=seconds,
        size=args.size or 224,
        goal=goal,
        **{"peak bytes": peak_memory(call, explainer.device)},
    )
