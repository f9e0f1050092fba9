"""Pictures of photographs: the README's figure, and the figures of the first part of docs/gallery.md.

    python scripts/photographs.py PHOTOS --model hf:./folder

PHOTOS is a folder with astronaut.png, chelsea.png and coffee.png, which scikit-image has in skimage/data, and
raccoon.png, which is scipy.datasets.face(). The model is a classifier of timm, a Vision Transformer such as DINOv2
with a linear head: beside its class, its features and tokens are asked about.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dave_fast.explain.subject import Subject  # noqa: E402
from dave_fast.files import atomically  # noqa: E402
from dave_fast.images import drawing  # noqa: E402
from dave_fast.targets import SimilarTo  # noqa: E402
from scripts.photographs_depth import account, mosaic, two_animals  # noqa: E402
from scripts.photographs_parts import Cell, Photographs, contrast, contrast_row, drawn, sheet, signed, stacked  # noqa: E402

FIGURES = ROOT / "docs/figures"
SAMPLES = (8, 32, 128)
ALPHAS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.9)
QUALITY = 84


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
            ("What tells spoon from coffee?", drawing.overlay(coffee, signed(photographs.of_patches), signed=True)),
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
        make, width = MADE[name]
        path = given.out / f"{name}.jpg"
        with atomically(path) as file:
            sheet(make(photographs), width).save(file, format="JPEG", quality=QUALITY, optimize=True)
        print(f"{path}: {path.stat().st_size / 1024:.0f} KiB")


# the file of each figure without its suffix: what draws it, and the width of its pictures in pixels
MADE = {
    "photographs": (hero, 300),
    "photographs_contrast": (contrasts, 280),
    "photographs_samples": (samples, 300),
    "photographs_alpha": (alphas, 260),
    "photographs_animals": (two_animals, 170),
    "photographs_mosaic": (mosaic, 190),
    "photographs_account": (account, 660),
}


if __name__ == "__main__":
    main()
