"""Figures of photographs at depth: two animals at several depths, four photographs at a block, what depths account for.

Photographs, questions and depths were fixed before the maps were looked at.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dave_fast import DAVE
from dave_fast.errors import InputError
from dave_fast.evaluate.metrics import energy_pointing_game
from dave_fast.evaluate.mosaics import resized
from dave_fast.explain.depth import AUTO, PIXELS, Depth, name_of
from dave_fast.images import drawing
from dave_fast.targets import Contrast, Question, SimilarTo
from dave_fast.targets.questions import Similarity
from scripts.photographs_parts import BLUE, ORANGE, Cell, Photographs, blended, drawn, frame, stacked

DEPTHS: tuple[Depth, ...] = (PIXELS, 0, 3, 6, 8, 10)
# cells of the mosaic, row by row, and what they show
MOSAIC = {"raccoon": "raccoon", "chelsea": "cat", "astronaut": "astronaut", "coffee": "cup"}
GRID = 2
# (top, left, bottom, right) in shares of the sides
Box = tuple[float, float, float, float]
UPPER, LOWER = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
# draws that change nothing
UNCHANGED = {"rotation": 0.0, "scale": (1.0, 1.0), "translation": 0.0, "flip": 0.0}


def two_animals(photographs: Photographs) -> list[list[Cell]]:
    """Draw one picture of two animals at several depths: the class of one, likeness to the other, their contrast.

    Numbers are the share of a map on the animal that is asked for; of a contrast, the share of its absolute values with
    the sign of their animal.
    """
    crop, seen = stacked(photographs, "raccoon.png", "chelsea.png"), photographs.inputs
    raccoon, cat = (seen(photographs.crop(f"{name}.png")) for name in ("raccoon", "chelsea"))
    own, features, count = photographs.subject.explainer, photographs.features, photographs.n_samples
    label = int(own.predict(raccoon[None]).argmax())
    for name, animal in (("upper", UPPER), ("lower", LOWER)):
        print(f"the class by the {name} half alone: {float(alone(photographs, crop, animal)[label]):.3f}")
    of_class = own.explain(seen(crop), label, count, depth=DEPTHS).maps[0]
    like, unlike = (features.bind(SimilarTo(each)) for each in (cat, raccoon))
    found = features.explain(seen(crop), targets=[like, Contrast(like, unlike)], n_samples=count, depth=DEPTHS)
    differences = blended(found.signed[0, 1])
    names = [name_of(depth) for depth in DEPTHS]
    halves = [mask(box, differences) for box in (UPPER, LOWER)]
    right = torch.where(halves[1], differences, -differences).clamp(min=0)
    return [
        [
            (f"class “{photographs.subject.labels.name(label)}”", framed(crop, {UPPER: ORANGE})),
            *row(of_class, halves[0], names),
        ],
        [("like the cat", framed(crop, {LOWER: ORANGE})), *row(found.maps[0, 0], halves[1], names)],
        [
            ("cat − raccoon", framed(crop, {UPPER: BLUE, LOWER: ORANGE})),
            *(
                (f"{name}: {percent(part.sum() / of.abs().sum())}", drawing.plain_map(of.numpy(), signed=True))
                for name, of, part in zip(names, differences, right, strict=True)
            ),
        ],
    ]


def mosaic(photographs: Photographs) -> list[list[Cell]]:
    """Draw four photographs in one picture, a row for each that is asked for: at the pixels and, thrice, at a block."""
    crops = [photographs.crop(f"{name}.png") for name in MOSAIC]
    crop = np.concatenate([np.concatenate(crops[start : start + GRID], 1) for start in (0, GRID)])
    model = resized(photographs.features.model, crop.shape[:2])
    if model is None:
        raise InputError("the model's image size cannot be changed; give a Vision Transformer of timm")
    seen, questions = photographs.inputs(crop), apart(photographs, crops)
    explainer, calm = photographs.changed(model), photographs.changed(model, 0.0)
    frozen = DAVE(model, precision=explainer.precision, noise_alpha=0.0, shrink=False, **UNCHANGED)
    found = explainer.explain(seen, targets=questions, n_samples=photographs.n_samples, depth=(PIXELS, AUTO))
    quiet = calm.explain(seen, targets=questions, n_samples=photographs.n_samples, depth=AUTO)
    once = frozen.explain(seen, targets=questions, n_samples=1, depth=AUTO)
    maps = torch.stack([*found.maps[0].unbind(1), quiet.maps[0], once.maps[0]], 1)
    names = (PIXELS, name_of(found.levels[1]), "no noise", "one pass")
    boxes = [(y / GRID, x / GRID, (y + 1) / GRID, (x + 1) / GRID) for y in range(GRID) for x in range(GRID)]
    return [
        [(f"like the {name}", framed(crop, {box: ORANGE})), *row(of_cell, mask(box, maps), names)]
        for name, box, of_cell in zip(MOSAIC.values(), boxes, maps, strict=True)
    ]


def account(photographs: Photographs) -> list[list[Cell]]:
    """Draw what of the class of raccoon.png each depth accounts for."""
    depths = photographs.subject.explainer.depths(photographs.inputs(photographs.crop("raccoon.png"))[None])
    print(depths)
    return [[("", depths.show())]]


def apart(photographs: Photographs, crops: list[np.ndarray]) -> list[Question]:
    """Return for each photograph the question what is like it, less the mean likeness to the others."""
    features = photographs.features
    inputs = torch.stack([photographs.inputs(crop) for crop in crops])
    directions = F.normalize(features.predict(inputs), dim=1)
    others = (directions.sum(0) - directions) / (len(crops) - 1)
    return [Similarity(difference) for difference in directions - others]


def alone(photographs: Photographs, crop: np.ndarray, box: Box) -> Tensor:
    """Return the probabilities (K,) of a picture in which all but the box has the mean colour of the preprocessing."""
    seen = photographs.inputs(crop)
    return photographs.subject.explainer.predict((seen * mask(box, seen))[None]).softmax(1)[0]


def row(maps: Tensor, inside: Tensor, names: Sequence[str]) -> list[Cell]:
    """Return maps (L, H, W), each under its name and the share of it that lies inside the mask (H, W)."""
    shares = energy_pointing_game(maps, inside.expand(len(maps), -1, -1))
    return [
        (f"{name}: {percent(share)}", drawing.plain_map(heat.numpy()))
        for name, share, heat in zip(names, shares, maps, strict=True)
    ]


def percent(share: Tensor) -> str:
    """Return a share () for readers."""
    return f"{100 * float(share):.0f} %"


def framed(crop: np.ndarray, frames: dict[Box, str]) -> Image.Image:
    """Draw the crop with frames of some colours around boxes."""
    picture = drawn(crop)
    for box, colour in frames.items():
        frame(picture, box, colour)
    return picture


def mask(box: Box, like: Tensor) -> Tensor:
    """Return where the box is in maps (..., H, W): (H, W) bool."""
    height, width = like.shape[-2:]
    made = torch.zeros(height, width, dtype=torch.bool)
    top, left, bottom, right = (round(share * side) for share, side in zip(box, (height, width) * 2, strict=True))
    made[top:bottom, left:right] = True
    return made
