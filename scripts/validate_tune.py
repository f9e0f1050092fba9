"""Measure how far noise_alpha, as chosen by default and by `dave-fast tune`, is from the best level by EnergyPG.

    python scripts/validate_tune.py demo noised large pixels
    python scripts/validate_tune.py --model hf:FOLDER --boxes boxes.json --half 1 --name dinov2

demo is the embedded model; noised adds normal noise of half their standard deviation to all its matrices; large has
192 px and a resampled position embedding; pixels normalises its images itself. A model of your own is measured on
photographs with boxes, those at even (--half 0) or odd (--half 1) positions of the list sorted by name; it is tuned on
eight of the others. boxes.json lists file (beside it), width, height and boxes (x0, y0, x1, y1).

The level of the default was chosen on scenes of seed 505 and on --half 0. The results are entries of
benchmarks/results/tune.json; an existing entry is kept.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import Normalize

from dave_fast import DAVE
from dave_fast.evaluate import metrics
from dave_fast.evaluate.statistics import over_images, paired
from dave_fast.evaluate.tuning import tune
from dave_fast.explain.noise_level import noise_level
from dave_fast.explain.subject import Subject
from dave_fast.images import Preprocessing, read_image
from dave_fast.models.demo import draw_scenes, load_demo_model

TUNED_ON, COMPARED_ON = 501, 502
SCENES = {"demo": 16, "noised": 16, "large": 8, "pixels": 16}
LEVELS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7)
SAMPLES = 32
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "tune.json"
Data = tuple[torch.Tensor, torch.Tensor]


def model_of(kind: str) -> torch.nn.Module:
    """Return one of the models of the scenes."""
    model = load_demo_model().requires_grad_(False)
    if kind == "large":
        model.set_input_size(img_size=(192, 192))
    if kind == "noised":
        generator = torch.Generator().manual_seed(0)
        for matrix in (p for p in model.parameters() if p.ndim == 2):
            matrix += 0.5 * matrix.std() * torch.randn(matrix.shape, generator=generator)
    return torch.nn.Sequential(Normalize([0.5] * 3, [0.5] * 3), model) if kind == "pixels" else model


def scenes_of(kind: str, n: int, seed: int) -> Data:
    """Return inputs (n, 3, H, W) of one of the models of the scenes, and masks (n, H, W)."""
    scenes = draw_scenes(n, seed, split="test", size=192 if kind == "large" else 128)
    pixels = torch.from_numpy(scenes.images).permute(0, 3, 1, 2).float().div(255)
    inputs = pixels if kind == "pixels" else pixels.mul(2).sub(1)
    return inputs.contiguous(), torch.from_numpy(scenes.masks)


def photographs(path: Path, prepare: Preprocessing, half: int) -> Data:
    """Return inputs (n, 3, H, W) of every second photograph of a boxes.json, and masks (n, H, W) of their boxes."""
    inputs, masks = [], []
    for entry in sorted(json.loads(path.read_text()), key=lambda entry: entry["file"])[half::2]:
        inside = np.zeros((entry["height"], entry["width"]), np.uint8)
        for left, top, right, bottom in entry["boxes"]:
            inside[top:bottom, left:right] = 255
        inputs.append(prepare.transform(read_image(path.parent / entry["file"])))
        masks.append(torch.from_numpy(prepare.crop(Image.fromarray(inside))[..., 0] > 127))
    return torch.stack(inputs), torch.stack(masks)


def validate(explainer: DAVE, tuned_on: torch.Tensor, compared_on: Data) -> dict:
    """Choose the level by default and by tuning, measure all levels, and compare."""
    default = noise_level(explainer.model, type(explainer.model).__name__, lambda: explainer.prepare)
    found = tune(explainer, tuned_on)
    chosen = {"default": default, "tuned": found.noise_alpha}
    print(chosen, "n_samples", found.n_samples, flush=True)
    images, masks = compared_on
    scores = {}
    for alpha in sorted({*LEVELS, *chosen.values()}):
        at_level = DAVE(explainer.model, precision=explainer.precision, noise_alpha=alpha)
        maps = at_level.explain(images, None, SAMPLES, image_keys=range(len(images))).maps
        scores[alpha] = metrics.energy_pointing_game(maps, masks).numpy()
        print(alpha, scores[alpha].mean(), flush=True)
    best = max(scores, key=lambda alpha: scores[alpha].mean())
    return {
        **chosen,
        "n_samples": found.n_samples,
        "images": len(images),
        "share of pixels inside": masks.double().mean().item(),
        "EnergyPG": {str(alpha): score.mean() for alpha, score in scores.items()},
        "best": best,
        "share of the best": {who: scores[alpha].mean() / scores[best].mean() for who, alpha in chosen.items()},
        "difference from the best": {who: vars(paired(scores[alpha], scores[best])) for who, alpha in chosen.items()},
        "interval of the default": vars(over_images(scores[default])),
        "decision kept": dict(zip(map(str, found.alphas.tolist()), found.kept.tolist(), strict=True)),
        "bound of the relative error": {str(size): error for size, error in found.errors.items()},
    }


def known() -> dict:
    """Read the existing entries."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def main() -> None:
    """Validate what the command line names."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("kinds", nargs="*", help=", ".join(SCENES))
    arguments.add_argument("--model")
    arguments.add_argument("--boxes", type=Path)
    arguments.add_argument("--half", type=int, choices=(0, 1), default=0)
    arguments.add_argument("--name", default="photographs")
    given = arguments.parse_args()
    if unknown := set(given.kinds) - SCENES.keys():
        arguments.error(f"{', '.join(unknown)}: expected some of {', '.join(SCENES)}")
    if (given.model is None) != (given.boxes is None):
        arguments.error("--model and --boxes belong together")
    for name in [*given.kinds, *([given.name] if given.model else [])]:
        if name in known():
            print(name, "is known: remove its entry to measure it again", flush=True)
            continue
        print(name, flush=True)
        if name in SCENES:
            explainer = DAVE(model_of(name), precision="fp32", noise_alpha=0.0)
            data = scenes_of(name, 8, TUNED_ON)[0], scenes_of(name, SCENES[name], COMPARED_ON)
        else:
            explainer, prepare, _ = Subject.load(given.model, noise_alpha=0.0)
            others = photographs(given.boxes, prepare, 1 - given.half)[0]
            data = others[:: len(others) // 8][:8], photographs(given.boxes, prepare, given.half)
        found = validate(explainer, *data)
        # read again, because another process may have added an entry meanwhile
        RESULTS.write_text(json.dumps(known() | {name: found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
