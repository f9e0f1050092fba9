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
# (digits, index) of scenes that no number was looked at for: the first four of each kind's seed
EXAMPLES = ((1, 0), (1, 1), (1, 2), (2, 0), (2, 1))
FIGURE_SEED = 11


def write(results: dict[str, Any], docs: Path) -> None:
    """The page and the figure."""
    (docs / FIGURE).parent.mkdir(parents=True, exist_ok=True)
    draw_figure(docs / FIGURE)
    (docs / "quality.md").write_text(page(results))


def page(results: dict[str, Any]) -> str:
    """The Markdown page."""
    s = results["settings"]
    env = results["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items())
    tiles = (
        f"tiles of {s['image size']} px side by side, the position embedding resampled by timm"
        if s["tiles"] == "native"
        else f"tiles shrunk, so that the mosaic has {s['image size']} px"
    )
    return f"""# Quality

How good the maps are, against the usual alternatives, on the one model whose evidence is known to the pixel: the
embedded demo model (accuracy {s["accuracy"]:.1%} on these scenes) and its held-out scenes. A small model on drawn scenes
says which method is sound, not how it does on ImageNet; the paper's own numbers for that are in its Table 1.

![Maps of all methods for the same scenes]({FIGURE.as_posix()})

Maps of all methods behind the same post-processing, each on its own scale. Outlined: the pixels of the explained digit.

## Where the attribution lies

{table(results["rows"], WHERE)}

## How it behaves

{table(results["rows"], HOW)}

Mean over images and its {0.95:.0%} bootstrap interval. **Bold**: the best mean of a column among the methods; two
whose intervals overlap are not told apart. Controls stand below the line of the methods.

## What was measured

- **Scenes**: {s["scenes"]} of one digit, explained for its label, and {s["scenes"]} of two, drawn from glyphs that the model was
  not trained on, nothing left out. The digit covers {s["mask area"]:.1%} of a scene: what a map without any knowledge scores.
- **Methods**: DAVE with S = {s["samples"]} and noise_alpha = {s["noise_alpha"]}, `schedule="sequence"`, fp32. The frozen gradient is a single
  unperturbed sample of it. Integrated gradients ({s["samples"]} steps from 0) and SmoothGrad ({s["samples"]} samples, σ = {s["SmoothGrad sigma"]}) are captum's.
  All are ⊙ input. Settings were fixed before the first run; none was tuned on these scenes.
- **As it is / smoothed**: the signed sum over channels, or the same behind `dave_fast.ops.smooth`, DAVE's own
  post-processing, which every method gets alike. Only positive values count in both; deletion ranks signed values.
- **EnergyPG**: share of the positive attribution on the digit's pixels. **Pointing game**: whether the maximum is there.
- **GridPG**: {s["mosaics"]} mosaics of each size, of scenes of different classes that the model names rightly with p ≥ {s["confident"]}, explained
  for every cell's class; share of the positive attribution in the right cell. {tiles[0].upper() + tiles[1:]}. Intervals draw mosaics.
- **Two digits / wrong digit**: the share on one digit's pixels when that digit is explained, and on the same pixels
  when the other is: a map that follows its class is high in the first and low in the second.
- **Deletion AUC**: mean probability while the least important pixels are replaced by a blurred copy (31×31, σ = 7), up to
  90 % of them in {s["deletion steps"]} steps; scenes with p ≥ {s["confident"]} only. Higher is better.
- **Stability**: correlation of the map of x with that of x + {s["stability sigma"]}·N(0, I), at the same seed.
- **Border excess**: how much stronger |attribution| is beside the borders between patches than elsewhere; 0 is no grid.
- **Controls**: the same with an untrained model, the input's magnitude, and a constant.

Exact definitions, ties and undefined cases: `dave_fast/metrics.py`.

## Again

    pip install dave-fast captum
    python -m benchmarks.quality

Commit {env["commit"]}, Python {env["python"]}, {versions}. Numbers with their intervals: `benchmarks/results/quality.json`.
"""


def table(rows: dict[str, Any], columns: tuple[str, ...]) -> str:
    """A Markdown table: a line for each method and variant that has one of the columns."""
    best = {column: _best(rows, column) for column in columns}
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for name, variants in rows.items():
        for variant, scores in variants.items():
            if not any(column in scores for column in columns):
                continue
            cells = [_cell(scores.get(column), best[column]) for column in columns]
            lines.append(f"| {name}, {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _best(rows: dict[str, Any], column: str) -> float | None:
    if column not in HIGHER:
        return None
    scores = [
        v[column]["mean"]
        for name, r in rows.items()
        if name not in CONTROLS
        for v in r.values()
        if column in v
    ]
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
                    axes.set_title(["input", *maps][column], fontsize=8, pad=3)
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
