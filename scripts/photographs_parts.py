"""What the figures of photographs are made of: photographs and their model, questions, sheets of pictures."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dave_fast import DAVE, Explanation
from dave_fast.explain.subject import Subject
from dave_fast.images import drawing, read_image
from dave_fast.ops.smooth import BLUR_SIGMA, BLUR_TAPS, blur, gaussian_weights
from dave_fast.targets import Contrast, Patch, Question, Target, tokens_of

# two places in coffee.png as a model sees it, (y, x) as shares of the sides
COFFEE, SPOON = (0.34, 0.47), (0.72, 0.72)
# pixels
HEADING, GAP, POINTS, FRAME = 30, 8, 17, 4
# frames of the patches that speak for and against in a picture of two colours
ORANGE, BLUE = "#ff8c1a", "#35b0ff"

Cell = tuple[str, Image.Image]


@dataclass(frozen=True)
class Photographs:
    """The photographs, and the model that explains them.

    Attributes:
        folder: of the photographs.
        subject: a classifier with its preprocessing.
        n_samples: of every map.
    """

    folder: Path
    subject: Subject
    n_samples: int

    @cached_property
    def features(self) -> DAVE:
        """The model without its head."""
        model = copy.deepcopy(self.subject.explainer.model)
        model.reset_classifier(0)
        return self.changed(model)

    @cached_property
    def tokens(self) -> DAVE:
        """The model without its head and pooling."""
        return self.changed(tokens_of(self.subject.explainer.model))

    @cached_property
    def of_patches(self) -> Explanation:
        """The spoon and the coffee of coffee.png, and their difference."""
        spoon, coffee = self.patch(SPOON), self.patch(COFFEE)
        return contrast(self.tokens, self.inputs(self.crop("coffee.png")), spoon, coffee, self.n_samples)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the model's patches."""
        rows, columns = self.subject.explainer.model.patch_embed.grid_size
        return rows, columns

    def patch(self, place: tuple[float, float]) -> Patch:
        """Return the patch at a place, (y, x) as shares of the sides."""
        row, column = (int(share * count) for share, count in zip(place, self.grid, strict=True))
        return Patch(row, column)

    def framed(self, crop: np.ndarray) -> Image.Image:
        """Draw frames around the two patches of coffee.png, in the colours of their contrast."""
        picture, (rows, columns) = drawn(crop), self.grid
        for patch, colour in ((self.patch(SPOON), ORANGE), (self.patch(COFFEE), BLUE)):
            top, left = patch.row / rows, patch.column / columns
            frame(picture, (top, left, top + 1 / rows, left + 1 / columns), colour)
        return picture

    def changed(self, model: torch.nn.Module, noise_alpha: float | None = None, *, shrink: bool = True) -> DAVE:
        """Return an explainer of another model, or with other settings."""
        own = self.subject.explainer
        alpha = own.sampling.noise_alpha if noise_alpha is None else noise_alpha
        return DAVE(model, precision=own.precision, noise_alpha=alpha, shrink=shrink)

    def crop(self, name: str) -> np.ndarray:
        """Return what the model sees of a photograph, uint8 (H, W, 3)."""
        return self.subject.prepare.crop(read_image(self.folder / name))

    def inputs(self, crop: np.ndarray) -> Tensor:
        """Return the model's input (3, H, W)."""
        return self.subject.prepare.normalised(crop)


def contrast(explainer: DAVE, seen: Tensor, this: Question, that: Question, n_samples: int) -> Explanation:
    """Explain two questions and their difference."""
    this, that = explainer.bind(this), explainer.bind(that)
    questions: list[Target] = [this, that, Contrast(this, that)]
    return explainer.explain(seen, targets=questions, n_samples=n_samples)


def signed(found: Explanation) -> np.ndarray:
    """Return the signed map (H, W) of the last question, blended with its blur as maps are."""
    return blended(found.signed[:, -1])[0].numpy()


def blended(values: Tensor) -> Tensor:
    """Return signed maps (B, H, W), blended with their blur as maps are."""
    return 0.5 * (values + blur(values, gaussian_weights(BLUR_TAPS, BLUR_SIGMA)))


def contrast_row(photograph: Image.Image, crop: np.ndarray, found: Explanation, names: tuple[str, str]) -> list[Cell]:
    """Return a row: the photograph, the maps of two questions, their difference over the photograph."""
    maps = [(name, drawing.plain_map(heat.numpy())) for name, heat in zip(names, found.maps[0], strict=False)]
    return [("", photograph), *maps, (" − ".join(names), drawing.overlay(crop, signed(found), signed=True))]


def stacked(photographs: Photographs, *names: str) -> np.ndarray:
    """Return one picture of the model's size with a horizontal strip of each photograph."""
    height, width = photographs.subject.prepare.size
    strips = []
    for name in names:
        image = read_image(photographs.folder / name)
        image = image.resize((width, round(image.height * width / image.width)), Image.Resampling.BICUBIC)
        top = (image.height - height // len(names)) // 2
        strips.append(np.asarray(image)[top : top + height // len(names)])
    return np.concatenate(strips)


def drawn(crop: np.ndarray) -> Image.Image:
    """Return the crop in the size of the maps."""
    return Image.fromarray(drawing.photograph_of(crop))


def frame(picture: Image.Image, box: tuple[float, float, float, float], colour: str) -> None:
    """Draw a frame around a box (top, left, bottom, right), in shares of the sides, into a picture."""
    top, left, bottom, right = box
    sides = (left * picture.width, top * picture.height, right * picture.width, bottom * picture.height)
    ImageDraw.Draw(picture).rectangle(sides, outline=colour, width=FRAME)


def sheet(rows: list[list[Cell]], side: int) -> Image.Image:
    """Return pictures `side` pixels wide in rows, each under its name; a row without names has no headings.

    Pictures of a row have the shape of its first.
    """
    headings = [HEADING if any(name for name, _ in row) else 0 for row in rows]
    heights = [round(side * row[0][1].height / row[0][1].width) for row in rows]
    width, height = len(rows[0]) * (side + GAP) - GAP, sum(headings) + sum(heights) + GAP * (len(rows) - 1)
    made, top = Image.new("RGB", (width, height), "white"), 0
    draw, font = ImageDraw.Draw(made), ImageFont.truetype(findfont("DejaVu Sans"), POINTS)
    for row, heading, tall in zip(rows, headings, heights, strict=True):
        for column, (name, picture) in enumerate(row):
            left = column * (side + GAP)
            made.paste(picture.resize((side, tall), Image.Resampling.LANCZOS), (left, top + heading))
            draw.text((left + side // 2, top + heading // 2), name, fill="black", font=font, anchor="mm")
        top += heading + tall + GAP
    return made
