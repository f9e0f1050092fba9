"""What launchers share: the device's architecture, the dtypes that kernels take, and which configuration runs.

A configuration is a `triton.Config`: tile sizes, warps, stages. Every op has a fixed one for an architecture, which
needs no search and is what docs/kernels.md lists. With DAVE_FAST_AUTOTUNE=1 the op's candidates are timed at the first
call of each shape, and the fastest is kept for the process. The interpreter (TRITON_INTERPRET=1) has small fixed tiles.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Sequence
from functools import cache, partial
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

INTERPRETED: bool = triton.knobs.runtime.interpret

_fastest: dict[Hashable, triton.Config] = {}


@cache
def architecture(device: torch.device) -> int:
    """80, 90, 100 ... ; 0 for the interpreter."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def multiprocessors(device: torch.device) -> int:
    """How many of them the device has; 2 in the interpreter, so that persistent programs have more than one tile."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def covered(*tensors: Tensor | None) -> bool:
    """Whether kernels take these dtypes: no float64, and no bfloat16 in the interpreter, which multiplies its bits."""
    kept_out = (torch.float64, torch.bfloat16) if INTERPRETED else (torch.float64,)
    return all(t is None or t.dtype not in kept_out for t in tensors)


def row_blocks(width: int) -> tuple[int, int]:
    """(rows, columns) of a program that holds whole rows: about 4096 values."""
    columns = triton.next_power_of_2(width)
    return max(1, min(128, 4096 // columns)), columns


def autotuning() -> bool:
    """Whether candidates are timed."""
    return not INTERPRETED and os.environ.get("DAVE_FAST_AUTOTUNE", "0") == "1"


def run(
    key: Hashable, candidates: Sequence[triton.Config], launch: Callable[[triton.Config], Any], *, tune: bool
) -> None:
    """Launches with the first of the candidates, or, to be tuned, with the one that was fastest for this key."""
    chosen = candidates[0]
    if tune and len(candidates) > 1:
        if key not in _fastest:
            _fastest[key] = min(candidates, key=partial(_milliseconds, launch))
        chosen = _fastest[key]
    launch(chosen)


def _milliseconds(launch: Callable[[triton.Config], Any], candidate: triton.Config) -> float:
    """Median time of a launch; infinite where the device lacks the shared memory for it."""
    try:
        return float(triton.testing.do_bench(partial(launch, candidate), warmup=10, rep=40, return_mode="median"))
    except OutOfResources:
        return float("inf")
