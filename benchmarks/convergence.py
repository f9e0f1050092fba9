"""The distance of a map from its limit, and how often the bounds of `dave_fast.explain.convergence` hold.

    python -m benchmarks.convergence samples --set fit          a file for each image in build/convergence, resumable
    python -m benchmarks.convergence samples --set validation
    python -m benchmarks.convergence samples --set photographs --model hf:FOLDER --photographs FOLDER --boxes FILE
    python -m benchmarks.convergence mosaics                        resumable, too
    python -m benchmarks.convergence fit                        prints the factors for convergence.py
    python -m benchmarks.convergence validate                   JSON beside the other results, and docs/figures

Scenes are of the demo model's held-out split, alternately with one and two digits; photographs are even ones of the
folder, by name, and then odd ones. All are explained for the predicted class, each with its own draws, scenes in
float32 and photographs in the device's own precision. The factors are fitted on scenes of one seed and validated, once,
on scenes of another, and on the photographs. An image's file has its limit maps, with and without shrinkage, and the
maps of the first blocks of consecutive samples of several sizes, so that any estimate from halves can be tried without
computing the samples again. `validate` also compares shrunk maps with those of the paper: EnergyPG, the pointing game,
the correlation with the paper's limit, and GridPG in 2×2 mosaics of other scenes.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import dave_fast
from benchmarks import machine
from dave_fast.evaluate import items, metrics, rows
from dave_fast.evaluate.annotations import Annotations, read_boxes
from dave_fast.evaluate.mosaics import resized
from dave_fast.evaluate.settings import VARIANTS
from dave_fast.evaluate.sources import DemoScenes, ImageFiles
from dave_fast.explain.convergence import FACTORS, estimate, factor, relative_distance
from dave_fast.images import find_images, preprocessing
from dave_fast.models.demo import draw_scenes, load_demo_model
from dave_fast.models.labels import labels_of
from dave_fast.ops.shrink import MEAN_SIGMA, POWER_SIGMA
from dave_fast.run.identity import weights_hash
from dave_fast.sampling import draw, join

# samples of a block, and how many blocks of each size are stored; a block's halves are two blocks of half its size
SIZES = (4, 6, 8, 12, 16, 24, 25, 32, 48, 50, 64, 96, 100, 128, 256)
BLOCKS = 8
# numbers of samples at which the bounds are checked
VALIDATED = (16, 32, 64)
# numbers of samples at which shrunk maps are compared with the paper's
COMPARED = (8, 16, 32, 64, 256)
# probability with which a bound should hold
LEVEL = 0.9
ROWS = 16
FOLDER = Path("build/convergence")
# what is compared, and GridPG in how many 2×2 mosaics; no other scenes of this seed are used anywhere
METRICS = ("EnergyPG", "pointing game", "correlation")
IN_MOSAICS, MOSAIC_SEED, MOSAICS = 50, 2026_14, FOLDER / "mosaics" / "scores.jsonl"
# the names of maps with and without shrinkage, in the files
FORMS = {"shrunk": True, "plain": False}


@dataclass(frozen=True)
class ImageSet:
    """Images 0 … images − 1.

    Attributes:
        images: how many.
        limit: samples of the maps that are taken as the limit.
        seed: of the scenes; None for photographs.
    """

    images: int
    limit: int
    seed: int | None = None


SETS = {
    "fit": ImageSet(100, 1024, 2026_11),
    "validation": ImageSet(200, 1024, 2026_12),
    "photographs": ImageSet(30, 512),
}
# image (3, H, W), normalised, and the mask (H, W) of each class's object
Example = tuple[Tensor, dict[int, Tensor]]


def scenes(images: int, seed: int) -> Iterator[Example]:
    """Yield the scenes of a seed, with one digit where their number is even, otherwise two."""
    for number in range(images):
        drawn = draw_scenes(1, seed, n_digits=1 + number % 2, split="test", start=number // 2)
        objects = {int(drawn.labels[0]): torch.from_numpy(drawn.masks[0])}
        if number % 2:
            objects[int(drawn.other_labels[0])] = torch.from_numpy(drawn.other_masks[0])
        yield torch.from_numpy(drawn.images[0]).permute(2, 0, 1).float().div(127.5).sub(1).contiguous(), objects


def photographs(chosen: ImageSet, model: torch.nn.Module, folder: Path, boxes: Path) -> Iterator[Example]:
    """Yield photographs of a folder with their boxes, as many of the even ones as of the odd ones."""
    files, half = find_images([folder]), (chosen.images + 1) // 2
    source = ImageFiles(
        [*files[0::2][:half], *files[1::2][: chosen.images - half]],
        preprocessing(model),
        Annotations(labels_of(model), read_boxes(boxes)),
    )
    for number in range(len(source)):
        found = source.read(number, number + 1)
        if found is None:
            raise SystemExit(f"cannot use a photograph: {source.skipped}")
        yield found.images[0], {int(found.labels[0]): found.masks[0]}


def contributions(explainer: dave_fast.DAVE, image: Tensor, key: int, target: int, samples: int) -> Tensor:
    """Return contributions (S, C, H, W) of the first samples of one image."""
    height, width = image.shape[1:]
    draws = draw(samples, height=height, width=width, image_keys=(key,), sampling=explainer.sampling)
    made = torch.empty(samples, *image.shape)
    for start in range(0, samples, ROWS):
        rows = slice(start, min(start + ROWS, samples))
        made[rows] = explainer.contributions(image[None], join([draws[rows]]), torch.tensor([[target]]))[0]
    return made


def write_maps(explainer: dave_fast.DAVE, limit: int, example: Example, number: int, path: Path) -> None:
    """Write the limits and the blocks of one image atomically."""
    image, objects = example
    target = int(explainer.predict(image[None]).argmax(1))
    made = contributions(explainer, image, number, target, limit)
    # no object of the predicted class: a mask without a pixel
    maps: dict[str, Any] = {"mask": objects.get(target, torch.zeros(image.shape[1:], dtype=torch.bool)).numpy()}
    maps["further"] = explainer.aggregate(made[None, COMPARED[-1] :], shrink=False)[1][0].numpy()
    for form, shrink in FORMS.items():
        maps[f"{form}_limit"] = explainer.aggregate(made[None], shrink=shrink)[1][0].numpy()
        for size in (each for each in SIZES if each <= limit):
            count = min(BLOCKS, limit // size)
            blocks = made[: count * size].view(count, size, *made.shape[1:])
            maps[f"{form}_{size}"] = explainer.aggregate(blocks, shrink=shrink)[1].numpy().astype(np.float16)
    part = path.with_suffix(".part.npz")
    np.savez(part, **maps)
    os.replace(part, path)


def compute_samples(name: str, given: argparse.Namespace) -> bool:
    """Compute missing images until `seconds` have passed; return whether all are there."""
    chosen, folder = SETS[name], FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    if chosen.seed is not None:
        explainer = dave_fast.DAVE("demo", precision="fp32")
        examples = scenes(chosen.images, chosen.seed)
    else:
        explainer = dave_fast.DAVE(given.model)
        examples = photographs(chosen, explainer.model, given.photographs, given.boxes)
    settings = {
        "weights": weights_hash(explainer.model),
        "noise_alpha": explainer.sampling.noise_alpha,
        "precision": explainer.precision,
        "images": given.photographs and [path.name for path in find_images([given.photographs])],
        "limit": chosen.limit,
        "sizes": SIZES,
        "compared": COMPARED,
        "windows of shrink": (MEAN_SIGMA, POWER_SIGMA),
    }
    machine.keep_to(folder / "made_with.json", settings)
    began = time.monotonic()
    for number, example in enumerate(examples):
        path = folder / f"{number:04d}.npz"
        if path.exists():
            continue
        if time.monotonic() - began > given.seconds:
            return False
        write_maps(explainer, chosen.limit, example, number, path)
        print(f"{name} {number}: {time.monotonic() - began:.0f} s", flush=True)
    return True


def errors(chosen: ImageSet, file: Path, samples: int, form: str) -> tuple[np.ndarray, np.ndarray]:
    """Return for each block of `samples` its distance to the limit, and the estimate from its halves.

    The limit includes the block's samples: the distance from a mean of N that includes the S is too small by the factor
    √(1 − S/N), and is corrected.
    """
    with np.load(file) as arrays:
        limit, blocks, halves = (
            torch.from_numpy(arrays[f"{form}_{name}"].astype(np.float64)) for name in ("limit", samples, samples // 2)
        )
    count = min(len(blocks), len(halves) // 2)
    blocks, halves = blocks[:count], halves[: 2 * count]
    distance = np.array(relative_distance(blocks, limit[None])) / np.sqrt(1 - samples / chosen.limit)
    return distance, np.array(estimate(blocks, halves[0::2], halves[1::2]))


def files(name: str) -> list[Path]:
    """Return the files of the images computed so far."""
    return sorted(path for path in (FOLDER / name).glob("*.npz") if ".part" not in path.name)


def fit() -> dict[str, Any]:
    """Fit the factors: the 0.9 quantile of error / estimate over the scenes of the fit set, with equal weights.

    "left_out_share" is how often the bound of a scene's first block holds with factors fitted on the other scenes.
    """
    table = []
    for form, shrink in FORMS.items():
        for samples in sorted(FACTORS[shrink]):
            pairs = (errors(SETS["fit"], file, samples, form) for file in files("fit"))
            ratios = [distance / told for distance, told in pairs]
            without = [np.concatenate(ratios[:i] + ratios[i + 1 :]) for i in range(len(ratios))]
            held = [ratio[0] <= np.quantile(others, LEVEL) for ratio, others in zip(ratios, without, strict=True)]
            table.append(
                {
                    "form": form,
                    "samples": samples,
                    "scenes": len(ratios),
                    # scenes have equal weights, since all have as many blocks of a size
                    "factor": float(np.quantile(np.concatenate(ratios), LEVEL)),
                    "left_out_share": float(np.mean(held)),
                }
            )
            print(table[-1])
    return {"limit": SETS["fit"].limit, "table": table}


def coverage(name: str, form: str, samples: int) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """Return how often the bounds of the first S samples of a set's images hold, the errors and the bounds."""
    pairs = [errors(SETS[name], path, samples, form) for path in files(name)]
    distance, told = (np.array([pair[which][0] for pair in pairs]) for which in (0, 1))
    bound = factor(samples, shrink=FORMS[form]) * told
    row = {
        "set": name,
        "form": form,
        "samples": samples,
        "images": len(pairs),
        "bound_held": int((distance <= bound).sum()),
        "share": float(np.mean(distance <= bound)),
        "median_error": float(np.median(distance)),
        "median_estimate": float(np.median(told)),
        "correlation_of_logs": float(np.corrcoef(np.log(distance), np.log(told))[0, 1]),
    }
    return row, distance, bound


def compare(name: str, samples: dict[str, int]) -> dict[str, Any]:
    """Return what the maps of a set's images score by form, each of its first samples: `METRICS`.

    The limit is of further samples: one that included these would share their noise, most of all the map that keeps it.
    Differences are shrunk less plain, paired; images whose predicted class has no object count for the correlation.
    """
    scores: dict[str, list[tuple[float, ...]]] = {form: [] for form in FORMS}
    for path in files(name):
        with np.load(path) as arrays:
            mask, limit = torch.from_numpy(arrays["mask"])[None], torch.from_numpy(arrays["further"])[None].double()
            for form in FORMS:
                one = torch.from_numpy(arrays[f"{form}_{samples[form]}"][:1].astype(np.float64))
                games = (metrics.energy_pointing_game, metrics.pointing_game) if mask.any() else ()
                inside = [float(game(one, mask)) for game in games] or [np.nan, np.nan]
                scores[form].append((*inside, float(metrics.correlation(one, limit))))
    row: dict[str, Any] = {"set": name, "samples": samples}
    for at, metric in enumerate(METRICS):
        row |= difference(metric, *(np.array(scores[form])[:, at] for form in FORMS))
    return row


def difference(metric: str, shrunk: np.ndarray, plain: np.ndarray) -> dict[str, float]:
    """Return the means of a metric by form, and the mean of their paired difference with its standard error."""
    known = (shrunk - plain)[~np.isnan(shrunk - plain)]
    return {
        f"{metric} shrunk": float(np.nanmean(shrunk)),
        f"{metric} plain": float(np.nanmean(plain)),
        f"{metric} difference": float(known.mean()),
        f"{metric} standard error": float(known.std(ddof=1) / np.sqrt(len(known))),
    }


def score_mosaics() -> None:
    """Score the maps of mosaics by the embedded model, a line for each; go on where it was stopped."""
    MOSAICS.parent.mkdir(parents=True, exist_ok=True)
    settings = {"mosaics": IN_MOSAICS, "seed": MOSAIC_SEED, "windows of shrink": (MEAN_SIGMA, POWER_SIGMA)}
    machine.keep_to(MOSAICS.parent / "made_with.json", settings)
    done = len(MOSAICS.read_text().splitlines()) if MOSAICS.exists() else 0
    drawn = items.mosaics(DemoScenes(4 * IN_MOSAICS, MOSAIC_SEED).read(0, 4 * IN_MOSAICS), 2, IN_MOSAICS, MOSAIC_SEED)
    sized = resized(load_demo_model().requires_grad_(False), tuple(drawn[0].image.shape[2:]))
    if sized is None:
        raise SystemExit("the embedded model does not take the mosaics' size")
    family = rows.dave(sized, "DAVE", (32, 256), MOSAIC_SEED)
    for item in drawn[done:]:
        found = {row: scored["GridPG 2x2"][VARIANTS[1]] for row, scored in items.localise(item, family).items()}
        with MOSAICS.open("a") as file:
            file.write(json.dumps(found) + "\n")
        print(item.name, found, flush=True)


def compare_mosaics() -> list[dict[str, Any]]:
    """Return GridPG of shrunk maps and the paper's: of 32 samples both, and of 32 against 256."""
    lines = [json.loads(line) for line in MOSAICS.read_text().splitlines()] if MOSAICS.exists() else []
    shrunk = np.array([line["DAVE, S = 32"] for line in lines])
    compared = []
    for samples in (32, 256) if lines else ():
        plain = np.array([line[f"DAVE, S = {samples}, {rows.PAPERS}"] for line in lines])
        about = {"set": "mosaics", "mosaics": len(lines), "samples": {"shrunk": 32, "plain": samples}}
        compared.append(about | difference("GridPG 2x2", shrunk, plain))
        print(compared[-1])
    return compared


def validate(out: Path, figure: Path) -> None:
    """Count how often the bounds hold for the first S samples of each validation image; write JSON and figure."""
    if not files("validation"):
        raise SystemExit("no validation scene was computed; run `samples --set validation` first")
    table, compared = [], []
    points: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for name in (each for each in ("validation", "photographs") if files(each)):
        for samples in VALIDATED:
            for form in FORMS:
                row, distance, bound = coverage(name, form, samples)
                table.append(row)
                print(row)
                if (name, form) == ("validation", "shrunk"):
                    points[samples] = distance, bound
        for samples in COMPARED:
            compared.append(compare(name, {"shrunk": samples, "plain": samples}))
            print(compared[-1])
        compared.append(compare(name, {"shrunk": 32, "plain": 256}))
        print(compared[-1])
    content = {
        "environment": machine.environment(),
        "limits": {name: chosen.limit for name, chosen in SETS.items()},
        "images_wanted": {name: chosen.images for name, chosen in SETS.items()},
        "factors": {form: FACTORS[shrink] for form, shrink in FORMS.items()},
        "fit": fit(),
        "validation": table,
        "shrinkage": compared + compare_mosaics(),
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
    parser.add_argument("stage", choices=("samples", "mosaics", "fit", "validate"))
    parser.add_argument("--set", choices=tuple(SETS), default="fit")
    parser.add_argument("--model", help="of photographs")
    parser.add_argument("--photographs", type=Path, help="a folder")
    parser.add_argument("--boxes", type=Path, help="as `dave-fast evaluate --boxes` takes them")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long; run again to go on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=machine.results_path("convergence"))
    parser.add_argument("--figure", type=Path, default=Path("docs/figures/convergence.png"))
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    if chosen.stage == "samples":
        if chosen.set == "photographs" and None in (chosen.model, chosen.photographs, chosen.boxes):
            parser.error("--set photographs needs --model, --photographs and --boxes")
        raise SystemExit(0 if compute_samples(chosen.set, chosen) else 3)
    if chosen.stage == "mosaics":
        score_mosaics()
    elif chosen.stage == "fit":
        fit()
    else:
        validate(chosen.out, chosen.figure)


if __name__ == "__main__":
    main()
