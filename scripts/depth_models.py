"""The models and images on which forms and depths are chosen: scenes, and the half of the photographs for choices."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from benchmarks.depth_evidence import Run
from dave_fast.evaluate import items, probes
from dave_fast.evaluate.sources import DemoScenes
from scripts.quality_photographs import MOSAIC_VIEWS, OWN_HEAD, SEED, Subject
from scripts.validate_tune import model_of

# no other scenes of this seed are used anywhere; the second pool is that of the mosaics
SCENES, SCENE_SEED = 24, 2026_16
SCENE_MOSAICS, DRAWN_FROM, SCENE_MOSAIC_SEED = 12, 96, 2026_17
SCENE_MODELS = ("demo", "noised", "large")
PHOTOGRAPHS, MOSAICS = 8, 4
# blocks of the shortened copies of the trained model
SHORT = (4, 6, 8)
# noise levels: the default of these models, none, and more
LEVELS = (0.1, 0.0, 0.2)
# under each head of the trained model; the one under which maps have most to tell first
ALPHAS = {"class token": LEVELS, "patch average": LEVELS[:2], OWN_HEAD: LEVELS[:2]}
CLASS_TOKEN, MANY_SAMPLES = "class token", ("patch average", LEVELS[0])


def scenes() -> Iterator[Run]:
    """Yield the runs on scenes, in float32."""
    for kind in SCENE_MODELS:
        model, size = model_of(kind), 192 if kind == "large" else 128
        alphas, samples = (LEVELS, 64) if kind == "demo" else (LEVELS[:2], 16)
        yield Run(f"{kind}, scenes", model, scenes_of(size), alphas, samples, "fp32")
        if kind != "large":
            drawn = DemoScenes(DRAWN_FROM, SCENE_MOSAIC_SEED).read(0, DRAWN_FROM)
            mosaics = items.mosaics(drawn, 2, SCENE_MOSAICS, SCENE_MOSAIC_SEED)
            for alpha in LEVELS[:2]:
                samples = 64 if (kind, alpha) == ("demo", LEVELS[0]) else 16
                yield Run(f"{kind}, mosaics", model, mosaics, (alpha,), samples, "fp32")


def scenes_of(size: int) -> list[items.Item]:
    """Return scenes of one digit, of this many pixels along each side."""
    from dave_fast.models.demo import draw_scenes

    drawn = draw_scenes(SCENES, SCENE_SEED, split="test", size=size)
    images = torch.from_numpy(drawn.images).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()
    labels, masks = torch.from_numpy(drawn.labels), torch.from_numpy(drawn.masks)
    return [items.Item(f"scene {at}", at, images[at : at + 1], labels[at : at + 1], masks[at]) for at in range(SCENES)]


def photographs(args: argparse.Namespace) -> Iterator[Run]:
    """Yield the runs on photographs and their mosaics: the trained model under its heads, and shortened copies."""
    subject = Subject(args, chosen_on=True)
    single = items.photographs(subject.examples, PHOTOGRAPHS)
    mosaics = items.mosaics(subject.examples, 2, MOSAICS, SEED)
    for head, levels in ALPHAS.items():
        alphas, samples = (levels[:2], 16) if head == CLASS_TOKEN else ((0.0,), 8)
        yield Run(f"{head}, mosaics", subject.heads[head], mosaics, alphas, samples)
    for head, levels in ALPHAS.items():
        for alpha in levels:
            samples = 64 if (head, alpha) == MANY_SAMPLES else 16
            yield Run(f"{head}, photographs", subject.heads[head], single, (alpha,), samples)
    for name, model in shortened(subject):
        yield Run(f"{name}, photographs", model, single, (0.0,), 8)
        yield Run(f"{name}, mosaics", model, mosaics, (0.0,), 16 if CLASS_TOKEN in name else 8)


def shortened(subject: Subject) -> Iterator[tuple[str, nn.Module]]:
    """Yield the first blocks of the trained model, its final norm and probes fitted on their features."""
    examples, labels = subject.fitted_on, subject.labels
    views = probes.views_of(examples.images, examples.labels, labels.count, MOSAIC_VIEWS, SEED)
    targets = torch.cat([each.targets for each in views])
    for count in SHORT:
        short: Any = copy.deepcopy(subject.model)
        short.blocks = short.blocks[:count]
        read = [probes.features(subject.at_size(short, each.images), each.images) for each in views]
        for pool in probes.POOLS:
            fitted = probes.fit(torch.cat([each[pool] for each in read]), targets)
            yield f"{count} blocks, {pool}", probes.with_head(short, *fitted, pool, labels.names)
