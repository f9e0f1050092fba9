"""How good the maps are, measured on the demo model, whose scenes know which pixels carry the label.

    python -m benchmarks.quality [--scenes 100] [--grids 12] [--out benchmarks/results/quality.json]

Held-out scenes; every method with settings that were fixed beforehand (benchmarks/methods.py); every score with a
bootstrap interval over images. Each attribution is scored twice: as it is (sum over channels) and behind the same
post-processing (`dave_fast.ops.smooth`), so that no method wins by being blurred. Writes the numbers as JSON, the
page docs/quality.md and its figure.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import machine, quality_page
from benchmarks.methods import N_SAMPLES, NOISE_ALPHA, SMOOTHGRAD_SIGMA, Method, methods, resized
from dave_fast import metrics
from dave_fast.demo import draw_scenes, load_demo_model
from dave_fast.ops.smooth import smooth

SEED = 20260206
VARIANTS = ("as it is", "smoothed")
CONFIDENT = 0.9
DELETION_STEPS = 32
STABILITY_SIGMA = 0.02
BOOTSTRAPS, LEVEL = 2000, 0.95
GRIDS = (2, 3)
BATCH = 25


@dataclass(frozen=True)
class Dataset:
    """Scenes as the model sees them: images (n, 3, H, W), labels (n,), masks (n, H, W), the other digit's, too."""

    images: Tensor
    labels: Tensor
    masks: Tensor
    other_labels: Tensor
    other_masks: Tensor

    @classmethod
    def draw(cls, n: int, n_digits: int, seed: int) -> Dataset:
        """Scenes of the held-out split."""
        scenes = draw_scenes(n, seed, n_digits=n_digits, split="test")
        images = torch.from_numpy(scenes.images).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()
        others = (scenes.labels, scenes.masks, scenes.other_labels, scenes.other_masks)
        return cls(images, *(torch.from_numpy(a) for a in others))


def interval(scores: Tensor) -> dict[str, Any]:
    """Mean over images and its percentile bootstrap interval; NaN scores are left out and n says how many stay."""
    values = scores.double().numpy()
    values = values[~np.isnan(values)]
    if not len(values):
        return {"mean": None, "low": None, "high": None, "n": 0}
    picks = np.random.default_rng(0).integers(len(values), size=(BOOTSTRAPS, len(values)))
    low, high = np.quantile(values[picks].mean(axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high), "n": len(values)}


def attribute(method: Method, images: Tensor, classes: Tensor, keys: list[int] | None = None) -> Tensor:
    """Signed attributions (n, C, H, W), batch by batch."""
    keys = list(range(len(images))) if keys is None else keys
    batches = range(0, len(images), BATCH)
    return torch.cat([method(images[i : i + BATCH], classes[i : i + BATCH], keys[i : i + BATCH]) for i in batches])


def as_maps(raw: Tensor) -> dict[str, Tensor]:
    """Both variants of an attribution (n, C, H, W): maps (n, H, W)."""
    return {VARIANTS[0]: raw.sum(1), VARIANTS[1]: smooth(raw)}


@torch.no_grad()
def probabilities(model: Any, images: Tensor) -> Tensor:
    """(n, K)"""
    return torch.cat([model(batch) for batch in images.split(100)]).softmax(1)


def score_scenes(model: Any, method: Method, data: Dataset, patch: int) -> dict[str, dict[str, Tensor]]:
    """Variant -> metric -> a score an image, on scenes of one digit, explained for its label."""
    raw = attribute(method, data.images, data.labels)
    noise = torch.randn(data.images.shape, generator=torch.Generator().manual_seed(SEED))
    shaken = as_maps(attribute(method, data.images + STABILITY_SIGMA * noise, data.labels))
    sure = probabilities(model, data.images).gather(1, data.labels[:, None])[:, 0] >= CONFIDENT
    scores: dict[str, dict[str, Tensor]] = {}
    for variant, maps in as_maps(raw).items():
        curve = metrics.deletion_curve(model, data.images[sure], maps[sure], data.labels[sure], steps=DELETION_STEPS)
        scores[variant] = {
            "EnergyPG": metrics.energy_pointing_game(maps, data.masks),
            "pointing game": metrics.pointing_game(maps, data.masks),
            "deletion AUC": metrics.deletion_auc(*curve),
            "stability": metrics.correlation(maps, shaken[variant]),
        }
    scores[VARIANTS[0]]["border excess"] = metrics.border_excess(raw, patch)
    return scores


def score_pairs(method: Method, data: Dataset) -> dict[str, dict[str, Tensor]]:
    """Scenes of two digits: the share on the explained digit's pixels, and that on the same pixels when the other
    digit is explained."""
    right = as_maps(attribute(method, data.images, data.labels))
    wrong = as_maps(attribute(method, data.images, data.other_labels))
    return {
        variant: {
            "two digits": metrics.energy_pointing_game(right[variant], data.masks),
            "wrong digit": metrics.energy_pointing_game(wrong[variant], data.masks),
        }
        for variant in VARIANTS
    }


def score_grids(method: Method, mosaics: Tensor, classes: Tensor, grid: int) -> dict[str, dict[str, Tensor]]:
    """GridPG, averaged within each mosaic, so that the bootstrap draws whole mosaics. classes (M, grid²)."""
    cells = torch.arange(grid**2)
    scores: dict[str, list[Tensor]] = {variant: [] for variant in VARIANTS}
    for number, (mosaic, wanted) in enumerate(zip(mosaics, classes, strict=True)):
        repeated = mosaic.expand(grid**2, -1, -1, -1).contiguous()
        maps = as_maps(attribute(method, repeated, wanted, [number] * grid**2))
        for variant in VARIANTS:
            scores[variant].append(metrics.grid_pointing_game(maps[variant], cells, grid).mean())
    return {variant: {f"GridPG {grid}×{grid}": torch.stack(scores[variant])} for variant in VARIANTS}


def mosaics_of(grid: int, of_two: int) -> int:
    """How many mosaics of grid×grid take as many maps as `of_two` mosaics of 2×2."""
    return max(1, 4 * of_two // grid**2)


def make_grids(model: Any, grid: int, count: int, *, rescale: bool) -> tuple[Tensor, Tensor]:
    """Mosaics of scenes that the model names rightly with confidence, and their classes (M, grid²)."""
    # classes run out at different times, and not every scene is named rightly
    pool = Dataset.draw(max(300, 4 * count * grid**2), 1, SEED + grid)
    probability, predicted = probabilities(model, pool.images).max(1)
    kept = ((predicted == pool.labels) & (probability >= CONFIDENT)).nonzero()[:, 0]
    chosen = kept[metrics.choose_mosaics(pool.labels[kept], probability[kept], grid, count, seed=SEED)]
    return metrics.build_mosaics(pool.images[chosen], rescale=rescale), pool.labels[chosen]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All scores of all methods, as intervals: rows -> variant -> metric."""
    model = load_demo_model().requires_grad_(False)
    size, patch = model.patch_embed.img_size[0], model.patch_embed.patch_size[0]
    one, two = Dataset.draw(args.scenes, 1, SEED), Dataset.draw(args.scenes, 2, SEED + 1)
    predicted = probabilities(model, one.images)
    rows: dict[str, dict[str, dict[str, Any]]] = {}

    def note(name: str, scores: dict[str, dict[str, Tensor]]) -> None:
        for variant, by_metric in scores.items():
            row = rows.setdefault(name, {}).setdefault(variant, {})
            row.update({metric: interval(values) for metric, values in by_metric.items()})

    for name, method in methods(model).items():
        print(f"{name}: scenes", flush=True)
        note(name, score_scenes(model, method, one, patch))
        note(name, score_pairs(method, two))
    for grid in GRIDS:
        mosaics, classes = make_grids(model, grid, mosaics_of(grid, args.grids), rescale=args.tiles == "rescaled")
        wide = resized(model, mosaics.shape[-1])
        for name, method in methods(wide).items():
            print(f"{name}: {grid}×{grid} mosaics of {mosaics.shape[-1]} px", flush=True)
            note(name, score_grids(method, mosaics, classes, grid))
    return {
        "settings": {
            "scenes": args.scenes,
            "mosaics": {f"{grid}×{grid}": mosaics_of(grid, args.grids) for grid in GRIDS},
            "tiles": args.tiles,
            "image size": size,
            "samples": N_SAMPLES,
            "noise_alpha": NOISE_ALPHA,
            "SmoothGrad sigma": SMOOTHGRAD_SIGMA,
            "stability sigma": STABILITY_SIGMA,
            "deletion steps": DELETION_STEPS,
            "confident": CONFIDENT,
            "seed": SEED,
            "accuracy": (predicted.argmax(1) == one.labels).double().mean().item(),
            "mask area": one.masks.double().mean().item(),
        },
        "environment": machine.environment("captum"),
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=100, help="scenes of one digit, and as many of two")
    parser.add_argument("--grids", type=int, default=12, help="mosaics of 2×2; of 3×3 as many as give as many maps")
    parser.add_argument(
        "--tiles",
        choices=("native", "rescaled"),
        default="native",
        help="native: tiles keep their pixels and the position embedding is resampled; rescaled: mosaics keep the size",
    )
    parser.add_argument("--out", type=Path, default=machine.RESULTS / "quality.json")
    parser.add_argument("--docs", type=Path, default=Path(__file__).parents[1] / "docs")
    args = parser.parse_args()
    results = measure(args)
    machine.write_json(args.out, results)
    quality_page.write(results, args.docs)
    print(f"wrote {args.out} and {args.docs / 'quality.md'}")


if __name__ == "__main__":
    main()
