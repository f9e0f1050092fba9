"""A case: one op at one shape, with what it is given, what it reads, and what rounding decides in its result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Operands = dict[str, Any]
Load = Callable[[str], Callable[..., Any]]


@dataclass(frozen=True)
class Undecided:
    """Elements that rounding decides, and the range in which each lies whatever it decides.

    Args:
        where: bool, of the result's shape.
        least, most: float64, of the result's shape.
    """

    where: Tensor
    least: Tensor
    most: Tensor

    def allows(self, found: Tensor) -> Tensor:
        """Return where an element of float64 `found` may be what it is, however far from the truth; never NaN."""
        return self.where & (found >= self.least) & (found <= self.most)


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    operands: generator, dtype -> named operands on the generator's device · bind: functions by op, operands, dtype
    -> the call that is timed · reads: operands -> what of them the call reads, as tensors of the same size · undecided:
    operands in float64 -> elements of the result that rounding decides, which no two forms need to have in common.
    """

    op: str
    name: str
    operands: Callable[[torch.Generator, torch.dtype], Operands]
    bind: Callable[[Load, Operands, torch.dtype], Callable[[], Any]]
    reads: Callable[[Operands], Sequence[Tensor]]
    gigaflops: float = 0.0
    undecided: Callable[[Operands], Undecided] | None = None

    def gigabytes(self, operands: Operands, results: tuple[Tensor, ...]) -> float:
        """The least traffic with memory."""
        return 1e-9 * size_of([*self.reads(operands), *results])


def size_of(tensors: Sequence[Tensor]) -> int:
    """Bytes of all elements."""
    return sum(t.numel() * t.element_size() for t in tensors)


def named(*names: str) -> Callable[[Operands], Sequence[Tensor]]:
    """`Case.reads` of whole operands."""
    return lambda given: [given[name] for name in names]


def results_of(returned: Any) -> tuple[Tensor, ...]:
    """The tensors among what an op returned; attention's saved state is its own business."""
    values = returned if isinstance(returned, tuple) else (returned,)
    return tuple(value for value in values if isinstance(value, Tensor))


def widened(operands: Operands) -> Operands:
    """The operands in float64: the same numbers, for the truth."""
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in operands.items()
    }


def numbers(generator: torch.Generator, *shape: int) -> Tensor:
    """Standard normal numbers on the generator's device."""
    return torch.randn(*shape, generator=generator, device=generator.device)
