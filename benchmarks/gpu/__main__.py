"""One stage of scripts/gpu: `python -m benchmarks.gpu STAGE`, with its rows on the screen and in $DAVE_FAST_ROWS.

The exit code is 1 if the state of a row is "failed", otherwise 0.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import signal
import sys
import warnings
from pathlib import Path

from benchmarks.gpu.rows import write
from benchmarks.gpu.setting import tuned

# stage -> module:function
STAGES = {
    "forms": "forms:rows",
    "ops": "ops:rows",
    "walks": "walks:rows",
    "speed": "speed:rows",
    "kernels": "kernels:rows",
    "products": "side_by_side:products",
    "attention": "side_by_side:attention",
    "pixels": "side_by_side:pixels",
    "peers": "others:peers",
    "plain": "others:plain",
    "authors": "others:authors",
    "choices": "forms:choices",
}


def micro_batch(text: str) -> int | None:
    """Return the rows of a micro-batch; None for "own", the engine's own choice."""
    return None if text == "own" else int(text)


def parser() -> argparse.ArgumentParser:
    """Return the parser of one stage's command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("stage", choices=STAGES)
    made.add_argument("--precisions", nargs="+", choices=["fp32", "bf16", "fp8"], default=["bf16", "fp8"])
    made.add_argument("--micro-batches", nargs="+", type=micro_batch, default=[None], help='rows; "own": our choice')
    made.add_argument("--images", nargs="+", type=int, default=[1, 8], help="explained at once")
    made.add_argument("--samples", type=int, default=50, help="S")
    made.add_argument("--size", type=int, help="pixels a side; 224 by default")
    made.add_argument("--repeats", type=int, default=5)
    made.add_argument("--budget", type=float, default=1.0, help="seconds of timing for each row")
    made.add_argument("--modes", nargs="+", choices=["default", "max-autotune-no-cudagraphs"], default=["default"])
    made.add_argument("--authors", type=Path, help="a checkout of the authors' code")
    return made


def main() -> int:
    """Run the stage and return the exit code."""
    args = parser().parse_args()
    # so that the log of a stage that was interrupted has its stack, even inside a call of the driver
    faulthandler.register(signal.SIGINT, all_threads=True, chain=True)
    warnings.simplefilter("ignore")
    module, function = STAGES[args.stage].split(":")
    bad = False
    for made in getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function)(args):
        write({"tuned": tuned()} | made)
        bad |= made["state"] == "failed"
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
