"""How far a map is from its limit, and whether the bounds that `dave_fast.convergence` states hold.

    python -m benchmarks.convergence samples --set fit          one file a scene in build/convergence, resumable
    python -m benchmarks.convergence samples --set validation
    python -m benchmarks.convergence fit                        the factors that convergence.py then holds
    python -m benchmarks.convergence validate                   JSON beside the other results, and docs/figures

Scenes of the demo model's held-out split, one and two digits in turns, explained for the predicted class in float32,
every scene with draws of its own. The factors are fitted on scenes of one seed and validated, once, on scenes of
another. A scene's file holds its limit map and the final maps of the first blocks of consecutive samples of several
sizes, so that any estimate from halves can be tried without computing a sample again.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import dave_fast
from dave_fast.demo import draw_scenes
from dave_fast.sampling import draw, join

# samples a block, and how many blocks of a size are kept; a block's halves are blocks of the size below
SIZES = (4, 6, 8, 12, 16, 24, 25, 32, 48, 50, 64, 96, 100, 128, 256)
BLOCKS = 8
ROWS = 16
FOLDER = Path("build/convergence")


@dataclass(frozen=True)
class SceneSet:
    """Scenes 0 … images − 1 of a seed, and how many samples make their limit."""

    seed: int
    images: int
    limit: int


SETS = {"fit": SceneSet(2026_11, 100, 1024), "validation": SceneSet(2026_12, 200, 4096)}


def scene(chosen: SceneSet, number: int) -> Tensor:
    """Scene `number` of a set, normalised (3, H, W): one digit where it is even, two where it is odd."""
    drawn = draw_scenes(1, chosen.seed, n_digits=1 + number % 2, split="test", start=number // 2)
    return torch.from_numpy(drawn.images[0]).permute(2, 0, 1).float().div(127.5).sub(1).contiguous()


def contributions(explainer: dave_fast.DAVE, image: Tensor, key: int, samples: int) -> Tensor:
    """The first samples of one image, for its predicted class: (S, C, H, W)."""
    target = explainer.predict(image[None]).argmax(1)[:, None]
    height, width = image.shape[1:]
    draws = draw(samples, height=height, width=width, image_keys=(key,), sampling=explainer.sampling)
    made = torch.empty(samples, *image.shape)
    for start in range(0, samples, ROWS):
        rows = slice(start, min(start + ROWS, samples))
        made[rows] = explainer.contributions(image[None], join([draws[rows]]), target)[0]
    return made


def write_scene(explainer: dave_fast.DAVE, chosen: SceneSet, number: int, path: Path) -> None:
    """The limit and the blocks of one scene, whole or not at all."""
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
    """Scenes that are not there yet, for so many seconds; whether all are there now."""
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


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stage", choices=("samples",))
    parser.add_argument("--set", choices=tuple(SETS), default="fit")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long; run again to go on")
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    raise SystemExit(0 if compute_samples(chosen.set, chosen.seconds) else 3)


if __name__ == "__main__":
    main()
