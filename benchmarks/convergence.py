"""The distance of a map from its limit, and how often the bounds of `dave_fast.explain.convergence` hold.

    python -m benchmarks.convergence samples --set fit          a file for each scene in build/convergence, resumable
    python -m benchmarks.convergence samples --set validation
    python -m benchmarks.convergence fit                        prints the factors for convergence.py
    python -m benchmarks.convergence validate                   JSON beside the other results, and docs/figures

Scenes are of the demo model's held-out split, alternately with one and two digits, explained for the predicted class in
float32, each with its own draws. The factors are fitted on scenes of one seed and validated, once, on scenes of
another. A scene's file has its limit map, and the final maps of the first blocks of consecutive samples of several
sizes, so that any estimate from halves can be tried without computing the samples again.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import dave_fast
from benchmarks import machine
from dave_fast.explain.convergence import FACTORS, estimate, factor, relative_distance
from dave_fast.models.demo import draw_scenes
from dave_fast.sampling import draw, join

# samples of a block, and how many blocks of each size are stored; a block's halves are two blocks of half its size
SIZES = (4, 6, 8, 12, 16, 24, 25, 32, 48, 50, 64, 96, 100, 128, 256)
BLOCKS = 8
# numbers of samples at which the bounds are checked
VALIDATED = (16, 32, 64)
# probability with which a bound should hold
LEVEL = 0.9
ROWS = 16
FOLDER = Path("build/convergence")


@dataclass(frozen=True)
class SceneSet:
    """Scenes 0 … images − 1 of a seed.

    Attributes:
        seed: of the scenes.
        images: number of scenes.
        limit: samples of the map that is taken as the limit.
    """

    seed: int
    images: int
    limit: int


SETS = {"fit": SceneSet(2026_11, 100, 1024), "validation": SceneSet(2026_12, 200, 4096)}


def scene(chosen: SceneSet, number: int) -> Tensor:
    """Return scene `number` of a set, normalised (3, H, W), with one digit if it is even, otherwise two."""
    drawn = draw_scenes(1, chosen.seed, n_digits=1 + number % 2, split="test", start=number // 2)
    return torch.from_numpy(drawn.images[0]).permute(2, 0, 1).float().div(127.5).sub(1).contiguous()


def contributions(explainer: dave_fast.DAVE, image: Tensor, key: int, samples: int) -> Tensor:
    """Return contributions (S, C, H, W) of the first samples of one image, for its predicted class."""
    target = explainer.predict(image[None]).argmax(1)[:, None]
    height, width = image.shape[1:]
    draws = draw(samples, height=height, width=width, image_keys=(key,), sampling=explainer.sampling)
    made = torch.empty(samples, *image.shape)
    for start in range(0, samples, ROWS):
        rows = slice(start, min(start + ROWS, samples))
        made[rows] = explainer.contributions(image[None], join([draws[rows]]), target)[0]
    return made


def write_scene(explainer: dave_fast.DAVE, chosen: SceneSet, number: int, path: Path) -> None:
    """Write the limit and the blocks of one scene atomically."""
    made = contributions(explainer, scene(chosen, number), number, chosen.limit)
    maps = {"limit": explainer.aggregate(made[None])[1][0].numpy()}
    for size in SIZES:
        count = min(BLOCKS, chosen.limit // size)
        blocks = made[: count * size].view(count, size, *made.shape[1:])
        maps[f"blocks_{size}"] = explainer.aggregate(blocks)[1].numpy().astype(np.float16)
    part = path.with_suffix(".part.npz")
    np.savez(part, **maps)
    os.replace(part, path)


def compute_samples(name: str, seconds: float) -> bool:
    """Compute missing scenes until `seconds` have passed; return whether all are there."""
    chosen, folder = SETS[name], FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    explainer = dave_fast.DAVE("demo", precision="fp32")
    began = time.monotonic()
    for number in range(chosen.images):
        path = folder / f"{number:04d}.npz"
        if path.exists():
            continue
        if time.monotonic() - began > seconds:
            return False
        write_scene(explainer, chosen, number, path)
        print(f"{name} {number}: {time.monotonic() - began:.0f} s", flush=True)
    return True


def errors(chosen: SceneSet, scene_file: Path, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Return for each block of `samples` its distance to the limit, and the estimate from its halves.

    The limit includes the block's samples: the distance from a mean of N that includes the S is too small by the factor
    √(1 − S/N), and is corrected.
    """
    with np.load(scene_file) as arrays:
        limit, blocks, halves = (
            torch.from_numpy(arrays[name].astype(np.float64))
            for name in ("limit", f"blocks_{samples}", f"blocks_{samples // 2}")
        )
    count = min(len(blocks), len(halves) // 2)
    blocks, halves = blocks[:count], halves[: 2 * count]
    distance = np.array(relative_distance(blocks, limit[None])) / np.sqrt(1 - samples / chosen.limit)
    return distance, np.array(estimate(blocks, halves[0::2], halves[1::2]))


def files(name: str) -> list[Path]:
    """Return the files of the scenes computed so far."""
    return sorted(path for path in (FOLDER / name).glob("*.npz") if ".part" not in path.name)


def fit() -> dict[str, Any]:
    """Fit the factors: the 0.9 quantile of error / estimate over the scenes of the fit set, with equal weights.

    "left_out_share" is how often the bound of a scene's first block holds with factors fitted on the other scenes.
    """
    table = []
    for samples in sorted(FACTORS):
        scenes = [distance / told for distance, told in (errors(SETS["fit"], f, samples) for f in files("fit"))]
        without = [np.concatenate(scenes[:i] + scenes[i + 1 :]) for i in range(len(scenes))]
        held = [scene[0] <= np.quantile(others, LEVEL) for scene, others in zip(scenes, without, strict=True)]
        table.append(
            {
                "samples": samples,
                "scenes": len(scenes),
                # scenes have equal weights, since all have as many blocks of a size
                "factor": float(np.quantile(np.concatenate(scenes), LEVEL)),
                "left_out_share": float(np.mean(held)),
            }
        )
        print(table[-1])
    return {"limit": SETS["fit"].limit, "table": table}


def validate(out: Path, figure: Path) -> None:
    """Count how often the bounds hold for the first S samples of each validation scene; write JSON and figure."""
    found = files("validation")
    if not found:
        raise SystemExit("no validation scene was computed; run `samples --set validation` first")
    table = []
    points: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for samples in VALIDATED:
        pairs = [errors(SETS["validation"], path, samples) for path in found]
        distance, told = (np.array([pair[which][0] for pair in pairs]) for which in (0, 1))
        points[samples] = distance, factor(samples) * told
        held = int((distance <= points[samples][1]).sum())
        table.append(
            {
                "samples": samples,
                "scenes": len(found),
                "bound_held": held,
                "share": held / len(found),
                "median_error": float(np.median(distance)),
                "median_estimate": float(np.median(told)),
                "correlation_of_logs": float(np.corrcoef(np.log(distance), np.log(told))[0, 1]),
            }
        )
        print(table[-1])
    content = {
        "environment": machine.environment(),
        "model": "demo",
        "precision": "fp32",
        "limit": SETS["validation"].limit,
        "scenes_wanted": SETS["validation"].images,
        "scenes_computed": len(found),
        "factors": FACTORS,
        "fit": fit(),
        "validation": table,
    }
    machine.write_json(out, content)
    draw_points(points, figure)


def draw_points(points: dict[int, tuple[np.ndarray, np.ndarray]], path: Path) -> None:
    """Draw bounds against errors, a panel for each S; a bound holds above the diagonal."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(points), 3.3), layout="constrained")
    for axes, (samples, (distance, bound)) in zip(figure.subplots(1, len(points)), points.items(), strict=True):
        top = 1.05 * max(distance.max(), bound.max())
        axes.plot([0, top], [0, top], color="0.6", lw=1)
        axes.plot(distance, bound, "o", ms=3, alpha=0.6, color="#b3401f")
        axes.set(xlabel="error: distance to the limit", ylabel="stated bound", xlim=(0, top), ylim=(0, top))
        axes.set_title(f"S = {samples}: holds for {np.mean(distance <= bound):.0%} of {len(bound)}", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stage", choices=("samples", "fit", "validate"))
    parser.add_argument("--set", choices=tuple(SETS), default="fit")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long; run again to go on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=machine.results_path("convergence"))
    parser.add_argument("--figure", type=Path, default=Path("docs/figures/convergence.png"))
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    if chosen.stage == "samples":
        raise SystemExit(0 if compute_samples(chosen.set, chosen.seconds) else 3)
    if chosen.stage == "fit":
        fit()
    else:
        validate(chosen.out, chosen.figure)


if __name__ == "__main__":
    main()
