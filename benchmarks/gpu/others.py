"""Comparison of dave-fast with compiled PyTorch, the plain way and the authors' code, in turns."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import contestants
from benchmarks.gpu import build
from benchmarks.gpu.rows import Row, row
from benchmarks.gpu.setting import DEVICE, REHEARSAL, as_graphs, explainer_here, guarded, images_here, model_here
from benchmarks.peers import LADDER
from dave_fast.bench import whole
from dave_fast.bench.agreement import distance
from dave_fast.bench.shapes import shapes_of
from dave_fast.bench.timing import in_turns, spread
from dave_fast.ops.precision import has_bf16

STEPS = ("P3 and folded, trimmed", "P3 frozen SDPA, V apart")
MODES = {"default": STEPS, "max-autotune-no-cudagraphs": STEPS[:1]}
# equal to S, so that a peer needs no padding for any number of images; each number of rows is compiled separately
ROWS = 2 if REHEARSAL else 50
REPEATS, BUDGET = (1, 1.0) if REHEARSAL else (10, 4.0)


def peers(args: argparse.Namespace) -> Iterator[Row]:
    """Yield P3 of `benchmarks.peers` beside dave-fast, for one image and for eight."""
    _own_cache()
    model = model_here()
    image = images_here(1)[0]
    best = "bf16" if has_bf16(torch.device(DEVICE)) else "fp32"
    truth = whole.find_truth(model, images_here(whole.CHECKED), [best], DEVICE)
    samples = 2 if REHEARSAL else args.samples
    shapes = shapes_of(model, samples)
    for mode in args.modes:
        for step in MODES[mode][: 1 if REHEARSAL else None]:
            tricks = replace(LADDER[step], compiled=not REHEARSAL)
            make = partial(contestants.peer, model, tricks, best, samples, shapes, image, mode)
            yield from guarded(f"{step}, {mode}", partial(_peer, f"{step}, {mode}", make, model, truth, samples, best))


def _own_cache() -> None:
    """Use a separate Triton cache for Inductor's kernels, which starts as a copy of dave-fast's."""
    given = os.environ.get("TRITON_CACHE_DIR")
    if given and Path(given).is_dir():
        build.adopt(Path(given), Path(given).parent / build.PEERS)
        os.environ["TRITON_CACHE_DIR"] = str(Path(given).parent / build.PEERS)


def _peer(
    name: str,
    make: Callable[[], whole.Contestant],
    model: torch.nn.Module,
    truth: whole.Truth,
    samples: int,
    precision: str,
) -> Iterator[Row]:
    made = make()
    error = _error(made, truth)
    ours = explainer_here(model, "bf16")
    for number in (1, 2 if REHEARSAL else 8):
        images = images_here(number)
        calls = {
            "dave-fast": [partial(ours.explain, images, 0, samples)],
            name: [partial(made.explain, images, ROWS)],
        }
        seconds = in_turns(calls, REPEATS, DEVICE, budget=BUDGET, host=True)
        yield as_graphs(_ratio(name, seconds, number, samples, error=error), ours)
    reason = whole.refusal(precision, error, truth)
    yield row(f"{name} against float64", "failed" if reason else "passed", error, note=reason or "")


def _error(made: whole.Contestant, truth: whole.Truth) -> float:
    """Return the contributions' error, by a micro-batch of full size, since another would be compiled separately."""
    assert made.contributions is not None
    at = torch.arange(ROWS).clamp(max=len(truth.draws) - 1)
    images, draws = truth.images[at.to(DEVICE)], truth.draws[at]
    draws = replace(draws, image_index=torch.arange(ROWS))
    checked = min(ROWS, len(truth.draws))
    return distance((made.contributions(images, draws)[:checked],), (truth.contributions[:checked],))


def _ratio(name: str, seconds: dict[str, list[float]], number: int, samples: int, **more: Any) -> Row:
    own, theirs = seconds["dave-fast"], seconds[name]
    times = spread([b / a for a, b in zip(own, theirs, strict=True)])
    each = {label: 1e3 * spread(values)["median"] / number for label, values in seconds.items()}
    note = f"dave-fast {each['dave-fast']:.4g}, {times['median']:.2f} times ({times['min']:.2f} to {times['max']:.2f})"
    label = f"{name}, {number} images, S = {samples}"
    return row(label, "measured", each[name], "ms/image", note, ratio=times, images=number, samples=samples, **more)


def plain(args: argparse.Namespace) -> Iterator[Row]:
    """Yield dave-fast at S = 200 for one image beside the plain way at S = 8."""
    model, images = model_here(), images_here(1)
    many, few = (4, 1) if REHEARSAL else (200, 8)
    ours = explainer_here(model, "bf16")
    theirs = contestants.plain_way(model, images[0], few, shapes_of(model, few))
    calls = {
        "dave-fast": [partial(ours.explain, images, 0, many)],
        "plain": [partial(theirs.explain, images, None)],
    }
    seconds = in_turns(calls, 1 if REHEARSAL else 5, DEVICE, budget=2 * BUDGET, host=True)
    made = _ratio("plain", seconds, 1, few)
    yield as_graphs(made | {"name": f"dave-fast at S = {many} beside the plain way at S = {few}"}, ours)


def authors(args: argparse.Namespace) -> Iterator[Row]:
    """Yield the authors' code for one image, fp32 and TF32, beside dave-fast at equal S."""
    if args.authors is None:
        yield row(
            "the authors' code", "not measured", note="give --authors PATH, a checkout of github.com/a-vrobell/DAVE"
        )
        return
    model, images = model_here(), images_here(1)
    samples = 2 if REHEARSAL else args.samples
    ours = explainer_here(model, "bf16")
    for each in contestants.authors_code(args.authors, model, images[0], samples, None):
        if each.not_measured is not None:
            yield row(each.name, "not measured", note=each.not_measured)
            continue
        calls = {
            "dave-fast": [partial(ours.explain, images, 0, samples)],
            each.name: [partial(each.explain, images, None)],
        }
        repeats = 1 if REHEARSAL else 5
        seconds = in_turns(calls, repeats, DEVICE, budget=4 * BUDGET, host=True)
        yield as_graphs(_ratio(each.name, seconds, 1, samples), ours)
