"""Verdicts on ViT-B/16: contributions against float64's frozen route, graphs against eager, maps against float32's."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.gpu.rows import Row, row
from benchmarks.gpu.setting import (
    DEVICE,
    REHEARSAL,
    by_precision,
    explainer_here,
    guarded,
    images_here,
    model_here,
    needs_gpu,
)
from dave_fast.bench import whole
from dave_fast.bench.agreement import distance
from dave_fast.evaluate import DemoScenes
from dave_fast.models.demo import load_demo_model

SAMPLES = 2 if REHEARSAL else 50


def rows(args: argparse.Namespace) -> Iterator[Row]:
    """Yield the verdicts, precision by precision."""
    model = model_here()

    def of(precision: str) -> Iterator[Row]:
        yield from guarded(f"{precision} against float64", partial(_contributions, model, precision))
        yield from guarded(f"{precision} graphs against eager", partial(_graphs, model, precision))
        yield from guarded(f"{precision} maps against fp32", partial(_maps, precision))

    yield from by_precision(args.precisions, of)


def _contributions(model: torch.nn.Module, precision: str) -> Iterator[Row]:
    """Compare the engine's contributions at equal draws with float64: at most twice plain PyTorch's error."""
    truth = whole.find_truth(model, images_here(whole.CHECKED), [precision], DEVICE)
    explainer = explainer_here(model, precision)
    targets = torch.zeros(len(truth.images), 1, dtype=torch.int64)
    found = explainer.contributions(truth.images, truth.draws, targets)[0]
    error = distance((found,), (truth.contributions,))
    reason = whole.refusal(precision, error, truth)
    plain = truth.plain[precision]
    note = reason or f"plain {plain:.2g}"
    yield row(f"{precision} against float64", "failed" if reason else "passed", error, note=note, plain=plain)


def _graphs(model: torch.nn.Module, precision: str) -> Iterator[Row]:
    """Compare graphs with eager launches of the same buckets, which must give the same bits."""
    name = f"{precision} graphs against eager"
    if REHEARSAL:
        yield needs_gpu(name)
        return
    images = images_here(2)
    raw = {}
    for graphs in (True, False):
        explainer = explainer_here(model, precision, graphs=graphs)
        # the second call replays the graphs of the first with other draws
        raw[graphs] = [explainer.explain(images, 0, SAMPLES, seed).raw for seed in (0, 1)]
    apart = max(distance((replayed,), (eager,)) for replayed, eager in zip(raw[True], raw[False], strict=True))
    yield row(name, "passed" if apart == 0 else "failed", apart, note="equal bits" if apart == 0 else "other bits")


def _maps(precision: str) -> Iterator[Row]:
    """Compare final maps of the trained demo model with float32's by their correlation."""
    model = load_demo_model().to(DEVICE)
    count = 1 if REHEARSAL else 4
    images = DemoScenes(count, seed=7).read(0, count).images.to(DEVICE)
    low, exact = (explainer_here(model, each) for each in (precision, "fp32"))
    found, least = whole.map_agreement(low, exact, images, 16 if REHEARSAL else 50), whole.MAPS_MUST_AGREE[precision]
    state = "passed" if found >= least else "failed"
    yield row(f"{precision} maps against fp32", state, found, note=f"Pearson, at least {least}; demo model")
