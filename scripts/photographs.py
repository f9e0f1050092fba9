"""Pictures of photographs: the README's figure, and the figures of the first part of docs/gallery.md.

    python scripts/photographs.py PHOTOS --model hf:./folder

PHOTOS is a folder with astronaut.png, chelsea.png and coffee.png, which scikit-image has in skimage/data, and
raccoon.png, which is scipy.datasets.face(). The model is a classifier of timm, a Vision Transformer such as DINOv2
with a linear head: beside its class, its features and tokens are asked about.
"""

from __future__ import annotations

import argparse
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
from dave_fast.files import atomically
from dave_fast.images import drawing, read_image
from dave_fast.ops.smooth import BLUR_SIGMA, BLUR_TAPS, blur, gaussian_weights
from dave_fast.targets import Contrast, Patch, Question, SimilarTo, Target, tokens_of

FIGURES = Path(__file__).resolve().parents[1] / "docs/figures"
# two places in coffee.png as a model sees it, (y, x) as shares of the sides
COFFEE, SPOON = (0.34, 0.47), (0.72, 0.72)
SAMPLES = (8, 32, 128)
ALPHAS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.9)
# pixels
HEADING, GAP, POINTS = 30, 8, 17
QUALITY = 84
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
        picture = drawn(crop)
        height, width = picture.height / self.grid[0], picture.width / self.grid[1]
        for patch, colour in ((self.patch(SPOON), ORANGE), (self.patch(COFFEE), BLUE)):
            left, top = patch.column * width, patch.row * height
            frame = (left, top, left + width, top + height)
            ImageDraw.Draw(picture).rectangle(frame, outline=colour, width=4)
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


def hero(photographs: Photographs) -> list[list[Cell]]:
    """Draw a class, an embedding and two patches: the photograph above, its map below."""
    raccoon, astronaut, coffee = (photographs.crop(f"{name}.png") for name in ("raccoon", "astronaut", "coffee"))
    of_class = photographs.subject.explainer.explain(photographs.inputs(raccoon), n_samples=photographs.n_samples)
    name = photographs.subject.labels.name(int(of_class.target[0]))
    print(f"{name}: probability {float(of_class.probability[0]):.3f}")
    seen = photographs.inputs(astronaut)
    of_image = photographs.features.explain(seen, SimilarTo(seen), n_samples=photographs.n_samples)
    return [
        [("", drawn(raccoon)), ("", drawn(astronaut)), ("", photographs.framed(coffee))],
        [
            (f"Why “{name}”?", drawing.plain_map(of_class.maps[0].numpy())),
            ("What is its embedding made of?", drawing.plain_map(of_image.maps[0].numpy())),
            ("What tells spoon from coffee?", drawing.signed_overlay(coffee, signed(photographs.of_patches))),
        ],
    ]


def contrasts(photographs: Photographs) -> list[list[Cell]]:
    """Draw two contrasts, of two patches of a photograph and of two photographs within one picture."""
    crop = photographs.crop("coffee.png")
    both = stacked(photographs, "chelsea.png", "coffee.png")
    like = [SimilarTo(photographs.inputs(photographs.crop(f"{name}.png"))) for name in ("chelsea", "coffee")]
    of_both = contrast(photographs.features, photographs.inputs(both), *like, photographs.n_samples)
    return [
        contrast_row(photographs.framed(crop), crop, photographs.of_patches, ("spoon", "coffee")),
        contrast_row(drawn(both), both, of_both, ("like the cat", "like the cup")),
    ]


def samples(photographs: Photographs) -> list[list[Cell]]:
    """Draw maps of more and more samples, those of the paper above, shrunk ones below."""
    crop = photographs.crop("astronaut.png")
    seen, model = photographs.inputs(crop), photographs.features.model
    rows = []
    for name, shrink in (("the paper's map", False), ("shrunk", True)):
        explainer = photographs.changed(model, shrink=shrink)
        found = [explainer.explain(seen, SimilarTo(seen), n_samples=count).maps[0].numpy() for count in SAMPLES]
        maps = [(f"S = {count}, {name}", drawing.plain_map(heat)) for count, heat in zip(SAMPLES, found, strict=True)]
        rows.append(maps)
    return rows


def alphas(photographs: Photographs) -> list[list[Cell]]:
    """Draw maps of one class at several noise levels."""
    crop = photographs.crop("raccoon.png")
    cells = [("photograph", drawn(crop))]
    for alpha in ALPHAS:
        explainer = photographs.changed(photographs.subject.explainer.model, alpha)
        heat = explainer.explain(photographs.inputs(crop), n_samples=photographs.n_samples).maps[0].numpy()
        cells.append((f"α = {alpha}", drawing.plain_map(heat)))
    half = len(cells) // 2
    return [cells[:half], cells[half:]]


def contrast(explainer: DAVE, seen: Tensor, this: Question, that: Question, n_samples: int) -> Explanation:
    """Explain two questions and their difference."""
    this, that = explainer.bind(this), explainer.bind(that)
    questions: list[Target] = [this, that, Contrast(this, that)]
    return explainer.explain(seen, targets=questions, n_samples=n_samples)


def signed(found: Explanation) -> np.ndarray:
    """Return the signed map (H, W) of the last question, blended with its blur as maps are."""
    values = found.signed[:, -1]
    return (0.5 * (values + blur(values, gaussian_weights(BLUR_TAPS, BLUR_SIGMA))))[0].numpy()


def contrast_row(photograph: Image.Image, crop: np.ndarray, found: Explanation, names: tuple[str, str]) -> list[Cell]:
    """Return a row: the photograph, the maps of two questions, their difference over the photograph."""
    maps = [(name, drawing.plain_map(heat.numpy())) for name, heat in zip(names, found.maps[0], strict=False)]
    return [("", photograph), *maps, (" − ".join(names), drawing.signed_overlay(crop, signed(found)))]


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


def sheet(rows: list[list[Cell]], side: int) -> Image.Image:
    """Return square pictures of `side` pixels in rows, each under its name; a row without names has no headings."""
    headings = [HEADING if any(name for name, _ in row) else 0 for row in rows]
    width, height = len(rows[0]) * (side + GAP) - GAP, sum(headings) + len(rows) * (side + GAP) - GAP
    made, top = Image.new("RGB", (width, height), "white"), 0
    draw, font = ImageDraw.Draw(made), ImageFont.truetype(findfont("DejaVu Sans"), POINTS)
    for row, heading in zip(rows, headings, strict=True):
        for column, (name, picture) in enumerate(row):
            left = column * (side + GAP)
            made.paste(picture.resize((side, side), Image.Resampling.LANCZOS), (left, top + heading))
            draw.text((left + side // 2, top + heading // 2), name, fill="black", font=font, anchor="mm")
        top += heading + side + GAP
    return made


def main() -> None:
    """Explain the photographs and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--n-samples", type=int, default=64)
    parser.add_argument("--noise-alpha", type=float, help="the model's own by default")
    parser.add_argument("--out", type=Path, default=FIGURES)
    parser.add_argument("--only", choices=list(MADE), action="append")
    given = parser.parse_args()
    subject = Subject.load(given.model, noise_alpha=given.noise_alpha)
    photographs = Photographs(given.photos, subject, given.n_samples)
    for name in given.only or MADE:
        make, side = MADE[name]
        path = given.out / f"{name}.jpg"
        with atomically(path) as file:
            sheet(make(photographs), side).save(file, format="JPEG", quality=QUALITY, optimize=True)
        print(f"{path}: {path.stat().st_size / 1024:.0f} KiB")


# the file of each figure without its suffix: what draws it, and the side of its pictures in pixels
MADE = {
    "photographs": (hero, 300),
    "photographs_contrast": (contrasts, 280),
    "photographs_samples": (samples, 300),
    "photographs_alpha": (alphas, 260),
}


if __name__ == "__main__":
    main()
