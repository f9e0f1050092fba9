"""How often the bounds of `dave_fast.explain.convergence` hold for maps of the tokens that enter a block.

    python -m benchmarks.convergence_depth samples      the evidence of each scene in build/convergence, resumable
    python -m benchmarks.convergence_depth factors      JSON beside the other results; factors for convergence.py

Scenes are drawn and explained as in `benchmarks.convergence`, from a seed of their own: the factors are those of the
even ones, and the odd ones say how often the bounds hold.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import dave_fast
from benchmarks import machine
from benchmarks.convergence import FORMS, LEVEL, ROWS, scenes
from dave_fast.engine.levels import Levels, Pulled
from dave_fast.explain.convergence import estimate, factor, relative_distance
from dave_fast.sampling import Draws, draw

SCENES, LIMIT, SEED = 100, 512, 2026_16
# blocks of the embedded model, and numbers of samples, of which as many maps are made of each scene as `MAPS` says
BLOCKS, SIZES, MAPS = (1, 3, 4), (8, 16, 32, 64), 2
FOLDER = Path("build/convergence/depth")


def draws_of(explainer: dave_fast.DAVE, image: Tensor, number: int) -> Draws:
    """Return the draws of the scene of a number."""
    height, width = image.shape[-2:]
    return draw(LIMIT, height=height, width=width, image_keys=(number,), sampling=explainer.sampling)


def compute_samples(explainer: dave_fast.DAVE) -> None:
    """Compute the evidence (S, N) of every block of the missing scenes."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    settings = {"scenes": SCENES, "seed": SEED, "limit": LIMIT, "noise_alpha": explainer.sampling.noise_alpha}
    machine.keep_to(FOLDER / "made_with.json", settings)
    began = time.monotonic()
    for number, (image, _) in enumerate(scenes(SCENES, SEED)):
        path = FOLDER / f"{number}.pt"
        if path.exists():
            continue
        draws, target = draws_of(explainer, image, number), explainer.predict(image[None]).argmax(1)[:, None]
        levels = Levels(False, tuple(range(len(explainer.blocks(image)))))
        starts = range(0, LIMIT, ROWS)
        parts = [explainer.samples(image[None], draws[at : at + ROWS], target, levels).evidence for at in starts]
        torch.save([torch.cat([part[block][0] for part in parts]) for block in levels.blocks], path)
        print(f"{number}: {time.monotonic() - began:.0f} s", flush=True)


def ratios(explainer: dave_fast.DAVE, number: int) -> dict[tuple[str, int, int], list[tuple[float, float]]]:
    """Return by form, block and S the errors of maps of a scene, and the estimates from their halves.

    A limit has a map's samples among its own, for which the distance is corrected as in `benchmarks.convergence`.
    """
    image, evidence = torch.zeros(1, 3, 128, 128), torch.load(FOLDER / f"{number}.pt")
    draws, grids = draws_of(explainer, image, number), explainer.blocks(image)
    found: dict[tuple[str, int, int], list[tuple[float, float]]] = {}
    for form, shrink in FORMS.items():
        for block in BLOCKS:
            kept = Pulled(None, (evidence[block][None],))

            def maps(some: slice, kept: Pulled = kept, block: int = block, shrink: bool = shrink) -> Tensor:
                own = kept.part(some), draws[some], (block,), grids
                return explainer.aggregate_levels(image, *own, shrink=shrink)[1][:, 0]

            limit = maps(slice(LIMIT))
            for size in SIZES:
                for start in range(0, MAPS * size, size):
                    middle, stop = start + size // 2, start + size
                    made, halves = maps(slice(start, stop)), (maps(slice(start, middle)), maps(slice(middle, stop)))
                    distance = relative_distance(made, limit)[0] / np.sqrt(1 - size / LIMIT)
                    found.setdefault((form, block, size), []).append((distance, estimate(made, *halves)[0]))
    return found


def table(explainer: dave_fast.DAVE) -> list[dict[str, Any]]:
    """Return the factors of the even scenes by form and S, and how often each block's bounds held for odd ones."""
    each = []
    for number in range(SCENES):
        each.append(ratios(explainer, number))
        print(number, flush=True)
    rows = []
    for form, shrink in FORMS.items():
        for size in SIZES:
            fitted = [error / told for one in each[0::2] for block in BLOCKS for error, told in one[form, block, size]]
            row: dict[str, Any] = {"form": form, "samples": size, "scenes": len(each[0::2])}
            row["factor"] = float(np.quantile(fitted, LEVEL))
            for name, used in (("pixels' factor", factor(size, shrink=shrink)), ("factor", row["factor"])):
                for block in BLOCKS:
                    held = [error <= used * told for one in each[1::2] for error, told in one[form, block, size]]
                    row[f"held at block {block} by the {name}"] = float(np.mean(held))
            first = [one[form, block, size][0] for one in each[1::2] for block in BLOCKS]
            row["median_error"], row["median_estimate"] = np.median(np.array(first), axis=0).tolist()
            rows.append(row)
            print(row, flush=True)
    return rows


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stage", choices=("samples", "factors"))
    parser.add_argument("--out", type=Path, default=machine.results_path("convergence_depth"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    explainer = dave_fast.DAVE("demo", precision="fp32")
    if given.stage == "samples":
        compute_samples(explainer)
    else:
        machine.write_json(given.out, {"environment": machine.environment(), "blocks": table(explainer)})


if __name__ == "__main__":
    main()
