"""Validate `dave-fast tune`: choose noise_alpha on eight scenes, and compare it with the best by EnergyPG on others.

    python scripts/validate_tune.py demo noised large

demo is the embedded model; noised adds normal noise of half their standard deviation to all its matrices; large has
192 px and a resampled position embedding. The rule was fixed on scenes of other seeds (101, 103, 104) before the first
run of this script. It writes benchmarks/results/tune.json, with an entry for each model; existing entries are kept.
"""

import json
import sys
from pathlib import Path

import torch

from dave_fast import DAVE
from dave_fast.evaluate import metrics
from dave_fast.evaluate.statistics import over_images, paired
from dave_fast.evaluate.tuning import ALPHAS, tune
from dave_fast.models.demo import draw_scenes, load_demo_model

TUNED_ON, COMPARED_ON = 501, 502
SCENES = {"demo": 16, "noised": 16, "large": 8}
SAMPLES = 50
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "tune.json"


def model_of(kind: str) -> torch.nn.Module:
    """Return one of the three models."""
    model = load_demo_model().requires_grad_(False)
    if kind == "large":
        model.set_input_size(img_size=(192, 192))
    if kind == "noised":
        generator = torch.Generator().manual_seed(0)
        for matrix in (p for p in model.parameters() if p.ndim == 2):
            matrix += 0.5 * matrix.std() * torch.randn(matrix.shape, generator=generator)
    return model


def scenes_of(n: int, seed: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images (n, 3, H, W), normalised, and masks."""
    scenes = draw_scenes(n, seed, split="test", size=size)
    images = torch.from_numpy(scenes.images).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()
    return images, torch.from_numpy(scenes.masks)


def validate(kind: str) -> dict:
    """Tune a model, measure all α, and compare."""
    model = model_of(kind)
    size = model.patch_embed.img_size[0]
    found = tune(DAVE(model, precision="fp32", noise_alpha=0.5), scenes_of(8, TUNED_ON, size)[0])
    print(kind, "chosen:", found.noise_alpha, found.n_samples, flush=True)
    images, masks = scenes_of(SCENES[kind], COMPARED_ON, size)
    scores = {}
    for alpha in ALPHAS:
        explainer = DAVE(model, precision="fp32", noise_alpha=alpha)
        maps = explainer.explain(images, None, SAMPLES, image_keys=range(len(images))).maps
        scores[alpha] = metrics.energy_pointing_game(maps, masks)
        print(kind, alpha, scores[alpha].mean().item(), flush=True)
    means = {alpha: each.mean().item() for alpha, each in scores.items()}
    best = max(means, key=means.__getitem__)
    difference = paired(scores[found.noise_alpha].numpy(), scores[best].numpy())
    return {
        "chosen": found.noise_alpha,
        "n_samples": found.n_samples,
        "repeatability": dict(zip(map(str, ALPHAS), found.means.tolist(), strict=True)),
        "decision kept": dict(zip(map(str, ALPHAS), found.kept.tolist(), strict=True)),
        "bound of the relative error": {str(size): error for size, error in found.errors.items()},
        "scenes": SCENES[kind],
        "EnergyPG": {str(alpha): mean for alpha, mean in means.items()},
        "best": best,
        "share of the best": means[found.noise_alpha] / means[best],
        "difference from the best": vars(difference),
        "interval of the chosen": vars(over_images(scores[found.noise_alpha].numpy())),
    }


def known() -> dict:
    """Read the existing entries."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def main() -> None:
    """Validate the models of the command line."""
    for kind in sys.argv[1:]:
        if kind in known():
            continue
        found = validate(kind)
        # read again, because another process may have added an entry meanwhile
        RESULTS.write_text(json.dumps(known() | {kind: found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
