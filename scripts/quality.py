"""docs/quality.md and its figures: the evaluation of the embedded scenes, with settings that were fixed beforehand.

    python scripts/quality.py measure images --out DIR
    python scripts/quality.py measure mosaics --out DIR
    python scripts/quality.py write --out DIR

The two measurements are halves of one evaluation, so that each can have a core of its own. Nothing here was changed
after a result was seen.
"""

import argparse
import pickle
from pathlib import Path

from dave_fast.demo import load_demo_model
from dave_fast.evaluate import DemoScenes, Settings, evaluate
from dave_fast.evaluate.methods import Setup

# never drawn from before, by training, tuning or an earlier table
SEED = 20261124
SETUP = Setup(n_samples=50, explainer={"precision": "fp32", "noise_alpha": 0.5})
COUNTS = {"images": 200, "probes": 16, "randomised": 2, "pairs": 16, "mosaics": 12, "seeds": 3, "seed": SEED}
GRIDS = ("2x2", "2x2-rescaled", "3x3-rescaled")
HALVES = {
    "images": ("localisation", "curves", "stability", "classes", "seeds", "randomisation"),
    "mosaics": ("grids",),
}


def settings(half: str) -> Settings:
    """Of one half of the evaluation; mosaics are drawn from scenes of their own, and need no other image."""
    counts = COUNTS if half == "images" else COUNTS | {"images": 1}
    return Settings(**counts, grids=GRIDS, groups=HALVES[half])


def measure(half: str, out: Path) -> None:
    """Run one half and keep what it found."""
    chosen = settings(half)
    model = load_demo_model().requires_grad_(False)
    source = DemoScenes(chosen.images, SEED)
    results = evaluate(model, source, chosen, SETUP, lambda done, total, what: print(done, total, what, flush=True))
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{half}.pickle").write_bytes(pickle.dumps(results))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("measure", "write"))
    parser.add_argument("half", nargs="?", choices=tuple(HALVES))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    measure(args.half, args.out)


if __name__ == "__main__":
    main()
