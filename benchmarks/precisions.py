"""What a precision costs a map: the same draws in float32, bfloat16 and eight-bit integers, beside float32's limit.

    python -m benchmarks.precisions scenes                      the demo model and scenes of its held-out split
    python -m benchmarks.precisions photographs --model hf:FOLDER --photographs FOLDER --boxes FILE
    python -m benchmarks.precisions write                       prints the tables of docs/guide.md

Of each image: the correlation of a precision's map with float32's map of the same draws ("alike"), its correlation with
the limit, float32's map of 640 other draws, and EnergyPG. `write` compares both of the latter with float32's own,
image by image. build/precisions/SET.jsonl has a line for each image: an interrupted run goes on, and `write` reads it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dave_fast
from benchmarks import machine
from benchmarks.convergence import Example, ImageSet, photographs, scenes
from dave_fast.evaluate.metrics import correlation, energy_pointing_game
from dave_fast.models.catalog import load_model
from dave_fast.models.demo import load_demo_model

FOLDER = Path("build/precisions")
PRECISIONS, SAMPLES, LIMIT = ("fp32", "bf16", "int8"), (16, 32, 64), 640
# added to an image's key for the draws of its limit
OTHER_DRAWS = 2**32
IMAGES, SEED = 30, 2026_19


def score(explainers: dict[str, dave_fast.DAVE], example: Example, number: int) -> dict[str, Any]:
    """Return the scores of all precisions for one image: score -> precision -> S -> number."""
    image, objects = example[0][None], example[1]
    label, mask = next(iter(objects.items()))

    def explain(precision: str, samples: int, key: int) -> torch.Tensor:
        return explainers[precision].explain(image, target=label, n_samples=samples, image_keys=(key,)).maps

    limit = explain("fp32", LIMIT, number + OTHER_DRAWS)
    scores: dict[str, Any] = {kind: {p: {} for p in PRECISIONS} for kind in ("alike", "limit", "EnergyPG")}
    for samples in SAMPLES:
        maps = {precision: explain(precision, samples, number) for precision in PRECISIONS}
        for precision, found in maps.items():
            scores["alike"][precision][samples] = correlation(found, maps["fp32"]).item()
            scores["limit"][precision][samples] = correlation(found, limit).item()
            scores["EnergyPG"][precision][samples] = energy_pointing_game(found, mask[None]).item()
    return scores


def measure(given: argparse.Namespace) -> None:
    """Score the images of a set that have no line yet."""
    path = FOLDER / f"{given.what}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    done = len(path.read_text().splitlines()) if path.exists() else 0
    if given.what == "scenes":
        model, source = load_demo_model(), scenes(IMAGES, SEED)
    else:
        model, _ = load_model(given.model)
        source = photographs(ImageSet(IMAGES, LIMIT), model, given.photographs, given.boxes)
    alpha = {} if given.noise_alpha is None else {"noise_alpha": given.noise_alpha}
    explainers = {precision: dave_fast.DAVE(model, precision=precision, **alpha) for precision in PRECISIONS}
    for number, example in enumerate(source):
        if number >= done:
            scores = score(explainers, example, number)
            with path.open("a") as lines:
                lines.write(json.dumps(scores) + "\n")
            print(f"{given.what}: {number + 1} of {IMAGES}", flush=True)


def table(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Return precision -> S -> the correlation with float32's map, and the differences in the limit and in EnergyPG."""
    found: dict[str, Any] = {}
    for precision in PRECISIONS[1:]:
        for samples in map(str, SAMPLES):

            def of(kind: str, which: str, samples: str = samples) -> np.ndarray:
                return np.array([line[kind][which][samples] for line in lines])

            alike = of("alike", precision)
            lost = {kind: of(kind, precision) - of(kind, "fp32") for kind in ("limit", "EnergyPG")}
            found.setdefault(precision, {})[samples] = {
                "images": len(lines),
                "alike": {"least": alike.min(), "mean": alike.mean()},
                **{
                    kind: {
                        "fp32": of(kind, "fp32").mean(),
                        "difference": d.mean(),
                        "half": 1.96 * d.std(ddof=1) / np.sqrt(len(d)),
                    }
                    for kind, d in lost.items()
                },
            }
    return found


def write() -> None:
    """Store the tables beside the other results and print them."""
    results = {}
    for path in sorted(FOLDER.glob("*.jsonl")):
        results[path.stem] = table([json.loads(line) for line in path.read_text().splitlines()])
    machine.write_json(machine.results_path("precisions"), {"environment": machine.environment(), "sets": results})
    for name, precisions in results.items():
        columns = (
            "S",
            "least correlation with fp32's map",
            "mean",
            "limit, fp32",
            "change",
            "EnergyPG, fp32",
            "change",
        )
        print(f"\n| {name} | {' | '.join(columns)} |")
        print("|---|---|---|---|---|---|---|---|")
        for precision, by_samples in precisions.items():
            for samples, row in by_samples.items():
                alike, limit, inside = row["alike"], row["limit"], row["EnergyPG"]
                print(
                    f"| {precision} | {samples} | {alike['least']:.4f} | {alike['mean']:.4f} | {limit['fp32']:.4f} "
                    f"| {limit['difference']:+.4f} ± {limit['half']:.4f} | {inside['fp32']:.3f} "
                    f"| {inside['difference']:+.4f} ± {inside['half']:.4f} |"
                )


def main() -> None:
    """Run one of the commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("scenes", "photographs", "write"))
    parser.add_argument("--model", help="a name that dave-fast knows, or hf:FOLDER")
    parser.add_argument("--photographs", type=Path)
    parser.add_argument("--boxes", type=Path)
    parser.add_argument("--noise-alpha", type=float)
    given = parser.parse_args()
    if given.what == "write":
        write()
    else:
        measure(given)


if __name__ == "__main__":
    main()
