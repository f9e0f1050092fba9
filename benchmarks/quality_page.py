"""docs/quality.md and its figure, from the numbers of benchmarks/quality.py.

python -m benchmarks.quality_page      writes the page again from benchmarks/results/quality.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.methods import CONTROLS, methods
from dave_fast.demo import CLASS_NAMES, draw_scenes, load_demo_model
from dave_fast.figures import COLORMAP, shown
from dave_fast.ops.smooth import smooth

WHERE = ("EnergyPG", "pointing game", "GridPG 2×2", "GridPG 3×3", "two digits", "wrong digit")
HOW = ("deletion AUC", "stability", "border excess")
# whether a larger number is better; the others are controls or want to be 0
HIGHER = {"EnergyPG", "pointing game", "GridPG 2×2", "GridPG 3×3", "two digits", "deletion AUC", "stability"}

FIGURE = Path("figures") / "quality_examples.png"
# (digits, index): the first scenes of different digits, chosen before any map of them was seen
EXAMPLES = ((1, 3), (1, 4), (1, 9), (2, 5))
FIGURE_SEED = 11


PAGE = """# Quality

How good the maps are, against the usual alternatives, on the one model whose evidence is known to the pixel: the
embedded demo model (accuracy {accuracy} on these scenes) and its held-out scenes. A small model on drawn scenes says
which method is sound, not how it does on ImageNet; the paper's own numbers for that are in its Table 1.

![Maps of all methods for the same scenes]({figure})

Maps of all methods behind the same post-processing, each on its own scale. Outlined: the pixels of the explained
digit. The last two rows explain the two digits of one scene.

## Where the attribution lies

{where}

## How it behaves

{how}

Mean over images and its 95 % bootstrap interval. **Bold**: the best mean of a column among the methods; two whose
intervals overlap are not told apart. The untrained model, |x| and uniform are controls.

## What was measured

- **Scenes**: {scenes} of one digit, explained for its label, and {scenes} of two, drawn from glyphs that the model
  was not trained on, nothing left out. The digit covers {area} of a scene: what a map without any knowledge scores.
- **Methods**: DAVE with S = {samples} and noise_alpha = {alpha}, `schedule="sequence"`, fp32. The frozen gradient is a
  single unperturbed sample of it. Integrated gradients ({samples} steps from 0) and SmoothGrad ({samples} samples,
  σ = {smoothgrad}) are captum's. All are ⊙ input. Settings were fixed before the first run; none was tuned on these
  scenes.
- **As it is / smoothed**: the signed sum over channels, or the same behind `dave_fast.ops.smooth`, DAVE's own
  post-processing, which every method gets alike. Only positive values count in both; deletion ranks signed values.
- **EnergyPG**: share of the positive attribution that lies on the digit's pixels.
- **Pointing game**: whether the maximum lies there.
- **GridPG**: mosaics ({mosaics}) of scenes of different classes that the model names rightly with p ≥ {sure},
  explained for every cell's class; share of the positive attribution in the right cell. {tiles}.
  Intervals draw mosaics.
- **Two digits / wrong digit**: the share on one digit's pixels when that digit is explained, and on the same pixels
  when the other is: a map that follows its class is high in the first and low in the second.
- **Deletion AUC**: mean probability while the least important pixels are replaced by a blurred copy (31×31, σ = 7), up
  to 90 % of them in {steps} steps; scenes with p ≥ {sure} only. Higher is better.
- **Stability**: correlation of the map of x with that of x + {shaking}·N(0, I), at the same seed.
- **Border excess**: how much stronger |attribution| is beside the borders between patches than elsewhere; 0: no grid.
- **Controls**: the same with an untrained model, the input's magnitude, and a constant.

Exact definitions, ties and undefined cases: `dave_fast/metrics.py`.

## Again

    pip install dave-fast captum
    python -m benchmarks.quality

Commit {commit}, Python {python}, {versions}. Numbers with their intervals: `benchmarks/results/quality.json`.
"""


def write(results: dict[str, Any], docs: Path) -> None:
    """The page and the figure."""
    (docs / FIGURE).parent.mkdir(parents=True, exist_ok=True)
    draw_figure(docs / FIGURE)
    (docs / "quality.md").write_text(page(results))


def page(results: dict[str, Any]) -> str:
    """The Markdown page."""
    s, environment = results["settings"], results["environment"]
    native = f"Tiles of {s['image size']} px side by side, the position embedding resampled by timm"
    shrunk = f"Tiles shrunk, so that a mosaic has {s['image size']} px"
    return PAGE.format(
        accuracy=f"{s['accuracy']:.1%}",
        figure=FIGURE.as_posix(),
        where=table(results["rows"], WHERE),
        how=table(results["rows"], HOW),
        scenes=s["scenes"],
        area=f"{s['mask area']:.1%}",
        samples=s["samples"],
        alpha=s["noise_alpha"],
        smoothgrad=s["SmoothGrad sigma"],
        mosaics=" and ".join(f"{count} of {grid}" for grid, count in s["mosaics"].items()),
        sure=s["confident"],
        tiles=native if s["tiles"] == "native" else shrunk,
        steps=s["deletion steps"],
        shaking=s["stability sigma"],
        commit=environment["commit"],
        python=environment["python"],
        versions=", ".join(f"{name} {version}" for name, version in environment["versions"].items()),
    )


def table(rows: dict[str, Any], columns: tuple[str, ...]) -> str:
    """A Markdown table: a line for each method and variant that has one of the columns."""
    best = {column: _best(rows, column) for column in columns}
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for name, variants in rows.items():
        for variant, scores in variants.items():
            if not any(column in scores for column in columns):
                continue
            cells = [_cell(scores.get(column), best[column]) for column in columns]
            # a bar would end the cell
            title = name.replace("|", "\\|")
            lines.append(f"| {title}, {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _best(rows: dict[str, Any], column: str) -> float | None:
    if column not in HIGHER:
        return None
    scores = [v[column]["mean"] for name, r in rows.items() if name not in CONTROLS for v in r.values() if column in v]
    return max((score for score in scores if score is not None), default=None)


def _cell(score: dict[str, Any] | None, best: float | None) -> str:
    if score is None or score["mean"] is None:
        return "–"
    mean = f"{score['mean']:.3f}"
    return f"{f'**{mean}**' if score['mean'] == best else mean} ({score['low']:.3f}–{score['high']:.3f})"


# The figure


def draw_figure(path: Path) -> None:
    """The same scenes explained by every method, smoothed alike: rows are scenes, columns methods."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    model = load_demo_model().requires_grad_(False)
    images, classes, masks = _examples()
    chosen = {name: method for name, method in methods(model).items() if name not in CONTROLS}
    keys = list(range(len(images)))
    maps = {name: smooth(method(images, classes, keys)).numpy() for name, method in chosen.items()}
    rows, columns = len(images), len(maps) + 1
    side, gap, left, top = 1.12, 0.045, 0.62, 0.26
    width, height = left + columns * (side + gap), top + rows * (side + gap)
    with mpl.rc_context({"font.family": "sans-serif", "font.size": 8}):
        figure = Figure(figsize=(width, height), dpi=300)
        for row in range(rows):
            pictures: list[Any] = [images[row].permute(1, 2, 0).add(1).div(2).numpy()]
            pictures += [shown(values[row]) for values in maps.values()]
            for column, picture in enumerate(pictures):
                x, y = left + column * (side + gap), height - top - (row + 1) * side - row * gap
                axes = figure.add_axes((x / width, y / height, side / width, side / height))
                axes.imshow(picture, cmap=COLORMAP, vmin=0, vmax=1, interpolation="nearest")
                axes.contour(masks[row].numpy(), [0.5], colors="white", linewidths=0.35, alpha=0.8)
                axes.set_axis_off()
                if row == 0:
                    axes.set_title(["input", *maps][column], fontsize=7, pad=3)
            figure.text(
                (left - 0.08) / width,
                (y + side / 2) / height,
                CLASS_NAMES[classes[row]],
                ha="right",
                va="center",
            )
        figure.savefig(path, facecolor="white")


def _examples() -> tuple[Tensor, Tensor, Tensor]:
    """Images (n, 3, H, W), explained classes (n,), masks (n, H, W); scenes of two digits come twice, once for each."""
    images: list[np.ndarray] = []
    classes, masks = [], []
    for digits, index in EXAMPLES:
        scene = draw_scenes(1, FIGURE_SEED, n_digits=digits, split="test", start=index)
        explained = [(scene.labels, scene.masks), (scene.other_labels, scene.other_masks)][:digits]
        for label, mask in explained:
            images.append(scene.images[0])
            classes.append(int(label[0]))
            masks.append(mask[0])
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()
    return pixels, torch.tensor(classes), torch.from_numpy(np.stack(masks))


def main() -> None:
    results = json.loads((machine.RESULTS / "quality.json").read_text())
    write(results, Path(__file__).parents[1] / "docs")


if __name__ == "__main__":
    main()
