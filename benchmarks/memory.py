"""Memory that an explanation of one image adds to a process with the model loaded: packed weights, walks, samples.

    python -m benchmarks.memory [--model vit_base_patch16_224] [--size 224] [--samples 50]

Random weights, each precision in a process of its own, on a CPU under Linux, where /proc tells the most that was
resident.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from dave_fast import DAVE
from dave_fast.bench.shapes import build_model
from dave_fast.ops.precision import why_not

PRECISIONS = ("fp32", "bf16", "int8")


def resident(field: str) -> int:
    """Return VmRSS or VmHWM of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def added(name: str, size: int | None, samples: int, precision: str) -> int:
    """Return the bytes by which explaining an image of a model raises the peak of this process.

    Args:
        name: of the model.
        size: of its images in pixels; None for its own.
        samples: S.
        precision: to explain in.
    """
    model = build_model(name, size)
    image = torch.randn(1, 3, *model.patch_embed.img_size)
    # the kernel's own way to let VmHWM begin anew
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    DAVE(model, precision=precision, noise_alpha=0.5).explain(image, 0, n_samples=samples)
    return resident("VmHWM") - before


def main(arguments: list[str] | None = None) -> None:
    """Measure the precisions that this CPU multiplies and print what each takes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--size", type=int)
    parser.add_argument("--samples", type=int, default=50)
    args = parser.parse_args(arguments)
    for precision in PRECISIONS:
        reason = why_not(precision, torch.device("cpu"))
        if reason is None:
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                taken = pool.submit(added, args.model, args.size, args.samples, precision).result()
            print(f"{args.model} {precision}: {taken >> 20:,} MiB", flush=True)
        else:
            print(f"{args.model} {precision}: not measured, {reason}", flush=True)


if __name__ == "__main__":
    main()
