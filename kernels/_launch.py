"""Helpers of the launchers: the device's architecture, the dtypes that kernels take, and the choice of a candidate.

A candidate is a `triton.Config` (tile sizes, warps, stages) or a `Library`, a routine of PyTorch's in place of a
kernel. The first candidate of an op is fixed for an architecture, needs no search, and is listed in docs/kernels.md.
With DAVE_FAST_AUTOTUNE=1 all candidates are timed at the first call of each shape, and the fastest is stored on disk
(`dave_fast.ops.choices`) for every later process. The interpreter (TRITON_INTERPRET=1) has small fixed tiles.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
import triton
from torch import Tensor

from dave_fast.ops.choices import Choice, Choices
from dave_fast.ops.fp8 import TokenScales

logger = logging.getLogger("dave_fast")

INTERPRETED: bool = triton.knobs.runtime.interpret


class Library(str):
    """A routine of PyTorch's that computes an op, by name."""

    __slots__ = ()


Candidate = triton.Config | Library
# Candidates are timed by one thread at a time, since concurrent kernels would disturb the times.
_choosing = threading.Lock()
# (problem, rows, device) -> the chosen candidate.
_taken: dict[tuple[str, int, torch.device], Candidate] = {}


@cache
def architecture(device: torch.device) -> int:
    """Return the device's architecture: 80, 90, 100 ...; 0 for the interpreter."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def multiprocessors(device: torch.device) -> int:
    """Return the device's number of multiprocessors; 2 in the interpreter, to test programs with several tiles."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def covered(x: Tensor) -> bool:
    """Return whether kernels take x's dtype: not float64, and not bfloat16 where it is interpreted (as integers)."""
    return x.dtype not in ((torch.float64, torch.bfloat16) if INTERPRETED else (torch.float64,))


def scale_arguments(scales: TokenScales | None) -> tuple[float | None, float | None, int | None]:
    """Return (lead, rest, read), the arguments of kernels for static scales of tokens; three times None without."""
    return (None, None, None) if scales is None else (scales.lead, scales.rest, scales.read)


def row_blocks(width: int) -> tuple[int, int]:
    """Return (rows, columns) of a program that works on whole rows: about 4096 values."""
    columns = triton.next_power_of_2(width)
    return max(1, min(128, 4096 // columns)), columns


def autotuning() -> bool:
    """Return whether candidates are timed."""
    return not INTERPRETED and os.environ.get("DAVE_FAST_AUTOTUNE", "0") == "1"


@cache
def choices(device: torch.device) -> Choices:
    """Return the measured choices of a device."""
    return Choices.of(torch.cuda.get_device_name(device) if device.type == "cuda" else device.type)


def run(
    problem: str,
    rows: int,
    device: torch.device,
    candidates: Sequence[Candidate],
    launch: Callable[[Candidate], Any],
    trial: Callable[[Candidate], Any] | None = None,
) -> Any:
    """Launch the candidate that was measured to be the fastest, or the first one where none was measured.

    Args:
        problem: names all that decides except the rows: op, dtype, features, epilogue.
        rows: of the operands.
        device: of the operands.
        candidates: the fixed one first.
        launch: computes the op with a candidate.
        trial: computes it repeatedly for timing; needed where `launch` changes its operands.

    Returns:
        The result of `launch`.
    """
    key = problem, rows, device
    taken = _taken.get(key)
    # Operands of another memory layout may have other candidates.
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
    # All candidates are timed again where some were not among those measured.
    if autotuning() and (measured is None or not offered.keys() <= measured.milliseconds.keys()):
        milliseconds = {name: _milliseconds(trial, each, problem) for name, each in offered.items()}
        timed = {name: value for name, value in milliseconds.items() if value is not None}
        if timed:
            known.keep(problem, rows, Choice(min(timed, key=timed.__getitem__), milliseconds))
    # The stored choice may be a candidate of another version of the kernels.
    return offered.get(known.find(problem, rows) or "", candidates[0])


def _milliseconds(trial: Callable[[Candidate], Any], candidate: Candidate, problem: str) -> float | None:
    """Return the median time of a launch; None, with a warning in the log, for a candidate that cannot run here."""
    try:
        return float(triton.testing.do_bench(partial(trial, candidate), warmup=10, rep=40, return_mode="median"))
    except (RuntimeError, triton.TritonError) as error:
        logger.warning("%s: the candidate %s cannot run: %s", problem, candidate, " ".join(str(error).split())[:200])
        return None
