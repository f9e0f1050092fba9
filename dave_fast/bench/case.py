"""A case of the bench: one op at one shape, with its operands and its call."""

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
    """Elements of a result that depend on a decision by rounding, and the range in which each lies in either case.

    Attributes:
        where: bool, of the result's shape.
        least: float64, of the result's shape, the lower end of the range.
        most: float64, of the result's shape, the upper end of the range.
    """

    where: Tensor
    least: Tensor
    most: Tensor

    def allows(self, found: Tensor) -> Tensor:
        """Return where an undecided element of `found`, float64, lies in its range; NaN does not."""
        return self.where & (found >= self.least) & (found <= self.most)


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    Attributes:
        op: its name.
        name: of the case.
        operands: generator, dtype -> named operands on the generator's device.
        bind: functions by op, operands, dtype -> the call that is timed.
        reads: operands -> the parts of them that the call reads, as tensors of the same size.
        gigaflops: arithmetic of the call, 0 for ops that only move memory.
        undecided: operands in float64 -> elements of each result that rounding decides; None where there are none.
        product: (rows, inner, outer) of a matrix product; None for other ops.
    """

    op: str
    name: str
    operands: Callable[[torch.Generator, torch.dtype], Operands]
    bind: Callable[[Load, Operands, torch.dtype], Callable[[], Any]]
    reads: Callable[[Operands], Sequence[Tensor]]
    gigaflops: float = 0.0
    undecided: Callable[[Operands], Sequence[Undecided]] | None = None
    product: tuple[int, int, int] | None = None

    @property
    def label(self) -> str:
        """The op's name, with that of the case unless they are equal."""
        return label(self.op, self.name)

    def gigabytes(self, operands: Operands, results: tuple[Tensor, ...]) -> float:
        """Return the least memory traffic: operands read once, results written once."""
        return 1e-9 * size_of([*self.reads(operands), *results])


def label(op: str, case: str) -> str:
    """Return the name of an op's case in tables."""
    return op if case == op else f"{op} {case}"


def calling(op: str, call: Callable[[Callable[..., Any], Operands, torch.dtype], Any]) -> Callable[..., Any]:
    """Return a `Case.bind` without preparation: the call gets the op's function, the operands and their dtype."""

    def bind(load: Load, given: Operands, dtype: torch.dtype) -> Callable[[], Any]:
        run = load(op)
        return lambda: call(run, given, dtype)

    return bind


def size_of(tensors: Sequence[Tensor]) -> int:
    """Return the bytes of all elements."""
    return sum(t.numel() * t.element_size() for t in tensors)


def named(*names: str) -> Callable[[Operands], Sequence[Tensor]]:
    """Return a `Case.reads` of whole operands."""
    return lambda given: [given[name] for name in names]


def results_of(returned: Any) -> tuple[Tensor, ...]:
    """Return the tensors that an op returned, without attention's saved state."""
    values = returned if isinstance(returned, tuple) else (returned,)
    return tuple(value for value in values if isinstance(value, Tensor))


def widened(operands: Operands) -> Operands:
    """Return the operands converted to float64, for the truth."""
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in operands.items()
    }


def numbers(generator: torch.Generator, *shape: int) -> Tensor:
    """Draw standard normal numbers on the generator's device."""
    return torch.randn(*shape, generator=generator, device=generator.device)
