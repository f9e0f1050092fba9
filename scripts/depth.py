"""Evidence at the blocks: how its samples are averaged, and at which block.

    python scripts/depth.py scenes
    python scripts/depth.py photographs --out DIR --model FOLDER --boxes PATH --photographs DIR --classes DIR
    python scripts/depth.py score
    python scripts/depth.py write

The arguments of photographs are those of scripts/quality_photographs.py, of whose photographs the half for choices is
taken. The first two steps write what each sample tells at every block, a file for each image in build/depth; `score`
makes maps of every form of it (`benchmarks.depth_forms`) and scores them; `write` stores means and paired differences
in benchmarks/results and tables in docs/depth.md. All go on where they were stopped.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import machine
from benchmarks.depth_evidence import collect
from benchmarks.depth_forms import scores_of, together
from scripts import depth_models, depth_tables

EVIDENCE = Path("build/depth")


def score(only: str) -> None:
    """Write the scores of each file of evidence that has none, beside it."""
    for path in sorted(EVIDENCE.glob("*/alpha-*/[0-9][0-9][0-9].npz")):
        if only in path.parts[-3]:
            alpha = float(path.parent.name.removeprefix("alpha-"))
            _write_absent(path.with_name(f"scores-{path.name}"), lambda: scores_of(path, alpha))  # noqa: B023
            _write_absent(path.with_name(f"groups-{path.name}"), lambda: {"groups": together(path, alpha)})  # noqa: B023


def _write_absent(path: Path, make: Callable[[], dict[str, np.ndarray]]) -> None:
    if not path.exists():
        part = path.with_name(f"part-{path.name}")
        np.savez(part, **make())
        os.replace(part, path)
        print(path, flush=True)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("scenes", "photographs", "score", "write"))
    parser.add_argument("--only", default="", help="runs whose names hold this, so that two processes share the work")
    for name in ("out", "model", "boxes", "photographs", "classes"):
        parser.add_argument(f"--{name}", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.step == "score":
        score(args.only)
        return
    if args.step == "write":
        runs = [depth_tables.summary(folder) for folder in depth_tables.folders(EVIDENCE)]
        machine.write_json(machine.RESULTS / "depth.json", {"environment": machine.environment(), "runs": runs})
        depth_tables.write_page(runs)
        return
    if args.step == "photographs" and None in (args.out, args.model, args.boxes, args.photographs, args.classes):
        parser.error("photographs need --out, --model, --boxes, --photographs and --classes")
    runs = depth_models.scenes() if args.step == "scenes" else depth_models.photographs(args)
    for run in runs:
        if args.only in run.name:
            collect(run, EVIDENCE)


if __name__ == "__main__":
    main()
