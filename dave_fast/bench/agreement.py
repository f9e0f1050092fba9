"""A form of an op that is wrong is not timed: its error against float64, beside that of plain PyTorch.

The rule is the tests': on the same operands, at most twice the error of plain PyTorch in the same precision. The truth
is the reference on the operands widened to float64. Buffers are poisoned while the form runs, so that an element that
nobody wrote is a NaN and not a lucky number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from dave_fast.bench.cases import Case, Load, Operands, results_of, widened
from dave_fast.ops import _registry

RATIO = 2.0
# float64 against float64: what reordering sums may cost
EXACT = 1e-12


@dataclass(frozen=True)
class Agreement:
    """Relative errors (Euclidean norms) against float64. reason: why the form is refused, None where it agrees."""

    error: float
    plain: float
    reason: str | None


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh uninitialised buffers hold NaN (integers: a value that no result has)."""

    def poisoning(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            fresh = make(*args, **kwargs)
            if fresh.is_floating_point():
                return fresh.fill_(torch.nan)
            return fresh if fresh.dtype == torch.bool else fresh.fill_(7)

        return made

    with (
        patch.object(torch, "empty", poisoning(torch.empty)),
        patch.object(torch, "empty_like", poisoning(torch.empty_like)),
        patch.object(Tensor, "new_empty", poisoning(Tensor.new_empty)),
    ):
        yield


def loader(backend: str, device: str) -> Load:
    """The functions of a backend by op; ops that it lacks keep their default, as in the engine."""
    return lambda op: _registry.bind(op, backend, device)


def reference(op: str) -> Callable[..., Any]:
    """The op in plain PyTorch."""
    return _registry.load(op, "torch")


def check(case: Case, load: Load, operands: Operands, dtype: torch.dtype) -> tuple[Agreement, tuple[Tensor, ...]]:
    """How a form agrees on these operands, and its results."""
    truth = results_of(case.bind(reference, widened(operands), torch.float64)())
    plain = distance(results_of(case.bind(reference, operands, dtype)()), truth)
    with poisoned():
        found = results_of(case.bind(load, operands, dtype)())
    error = distance(found, truth)
    limit = EXACT if dtype == torch.float64 else RATIO * max(plain, torch.finfo(dtype).eps)
    reason = None
    if not error <= limit:
        reason = (
            f"its error against float64 is {error:.1e}; at most {limit:.1e} is allowed (plain PyTorch: {plain:.1e})"
        )
    return Agreement(error, plain, reason), found


def distance(found: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> float:
    """The largest ‖found − truth‖ / ‖truth‖ of the results; NaN where one holds it, infinity for another shape."""
    if len(found) != len(truth) or any(f.shape != t.shape for f, t in zip(found, truth, strict=True)):
        return float("inf")
    worst = torch.zeros((), dtype=torch.float64)
    for each, true in zip(found, truth, strict=True):
        # gates may be stored in eight bits, as a share of 255
        wide = each.double() / 255 if each.dtype == torch.uint8 else each.double()
        norm = true.norm().clamp(min=torch.finfo(torch.float64).tiny)
        # maximum, unlike max(), keeps NaN
        worst = torch.maximum(worst, ((wide - true).norm() / norm).cpu())
    return float(worst)
