"""What launchers share: the device's architecture, the dtypes that kernels take, and which candidate runs.

A candidate is a `triton.Config` (tile sizes, warps, stages) or a `Library`, a routine of PyTorch's in place of a
kernel. The first candidate of an op is fixed for an architecture, needs no search, and is what docs/kernels.md lists.
With DAVE_FAST_AUTOTUNE=1 all candidates are timed at the first call of each shape, and the fastest is kept on disk
(`dave_fast.ops.choices`), from where every later process takes it. The interpreter (TRITON_INTERPRET=1) has small fixed
tiles.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import triton
from torch import Tensor

from dave_fast.ops.choices import Choice, Choices

logger = logging.getLogger("dave_fast")

INTERPRETED: bool = triton.knobs.runtime.interpret


@dataclass(frozen=True)
class Library:
    """A routine of PyTorch's that does an op's work, by name."""

    name: str

    def __str__(self) -> str:
        return self.name


Candidate = triton.Config | Library
# one thread at a time: what runs beside a candidate would be timed with it
_choosing = threading.Lock()
# (problem, rows, device) -> what runs
_taken: dict[tuple[str, int, torch.device], Candidate] = {}


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


@cache
def choices(device: torch.device) -> Choices:
    """The measured choices of a device, on disk."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return Choices.of(name)


def run(
    problem: str,
    rows: int,
    device: torch.device,
    candidates: Sequence[Candidate],
    launch: Callable[[Candidate], Any],
    trial: Callable[[Candidate], Any] | None = None,
) -> Any:
    """Launch with the candidate that was measured to be fastest here, or with the first where none was measured.

    Args:
        problem: names all that decides but the rows: op, dtype, features, epilogue.
        rows: of the operands.
        device: of the operands.
        candidates: the fixed one first.
        launch: does the op's work by a candidate.
        trial: does it for timing, many times over; `launch` itself unless that changes its operands.

    Returns:
        what `launch` returned.
    """
    key = problem, rows, device
    taken = _taken.get(key)
    # operands that lie in another way may have other candidates
    if not any(type(each) is type(taken) and each == taken for each in candidates):
        with _choosing:
            taken = _taken[key] = _choose(problem, rows, device, candidates, trial or launch)
    assert taken is not None
    return launch(taken)


def _choose(
    problem: str, rows: int, device: torch.device, candidates: Sequence[Candidate], trial: Callable[[Candidate], Any]
) -> Candidate:
    if INTERPRETED or len(candidates) == 1:
        return candidates[0]
    known, offered = choices(device), {str(each): each for each in candidates}
    measured = known.all().get(problem, {}).get(rows)
    # candidates that were not timed then are timed now, with those that were
    if autotuning() and (measured is None or not offered.keys() <= measured.milliseconds.keys()):
        milliseconds = {name: _milliseconds(trial, each, problem) for name, each in offered.items()}
        timed = {name: value for name, value in milliseconds.items() if value is not None}
        if timed:
            known.keep(problem, rows, Choice(min(timed, key=timed.__getitem__), milliseconds))
    # a choice that is no candidate any more was made by another version of the kernels
    return offered.get(known.find(problem, rows) or "", candidates[0])


def _milliseconds(trial: Callable[[Candidate], Any], candidate: Candidate, problem: str) -> float | None:
    """Median time of a launch; None, and a line in the log, for a candidate that cannot run here."""
    try:
        return float(triton.testing.do_bench(partial(trial, candidate), warmup=10, rep=40, return_mode="median"))
    except (RuntimeError, triton.TritonError) as error:
        logger.warning("%s: the candidate %s cannot run: %s", problem, candidate, " ".join(str(error).split())[:200])
        return None
