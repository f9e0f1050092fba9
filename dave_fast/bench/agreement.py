"""A form of an op that is wrong is not timed: its error against float64, beside that of plain PyTorch.

The truth is the reference on the operands widened to float64. Each result is held for itself against plain PyTorch's on
the same operands, in the whole and in parts (`SCALES`: images, rows, columns, tiles, elements), so that an error in few
elements is not lost among many. In a part ‖error‖ may reach

    RATIO · (the largest share ‖error‖ / ‖size‖ of plain PyTorch's result in any such part) · ‖size‖

or, where that is more, what computing in float32 and rounding once to the result's type costs; twice as much in single
elements, and somewhat more in results of few elements. The size of an element t is √(t² + the mean square of its image
or row). Where a result is narrower than float32 its rounding hides small errors from norms, but not from sums: the
error's projection on the truth, a scale error, must be within its noise.

Buffers are poisoned while the form runs, so that an element that nobody wrote is a NaN and not a lucky number. The form
runs twice on the same operands, which it must leave as they are, and both results are held to the rule. Of the few
elements (`Case.undecided`) in which rounding decides whether robust_mean keeps a sample it is only asked that they lie
between the least and the largest contribution that may be kept.

What is not seen: errors of one part below these limits: in float32 some 10⁻⁶, in bfloat16 0.5 to 1 % of a row or tile
and 2 to 5 % of an element; scale errors of a whole bfloat16 result of n elements below some 0.03/√n (0.01 % is seen
from about 100,000 elements on, 0.1 % from about 1,000); in products of eight-bit operands scale errors below 0.1 %; and
options that no case sets: attention's bias, the sums of squares that linear leaves and row_rstd takes, codes in eight
bits as results, an RMSNorm behind which a centred stream starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from dave_fast.bench.case import Case, Load, Operands, Undecided, results_of, widened
from dave_fast.ops import _registry

RATIO = 2.0
# float64 against float64: what reordering sums may cost
EXACT = 1e-12
SCALES = ("the whole", "an image", "a row", "a column", "a tile", "an element")
TILE = 16
# What a form may add to rounding its result once, as a share of an element's size: four float32 roundings, and for
# products of eight-bit operands what Hopper's tensor cores, whose sums keep 13 bits, lose of them.
COMPUTING = 4 * torch.finfo(torch.float32).eps
COMPUTING_FP8 = 2.0**-10
# an eight-bit gate counts in steps of 1/255
EIGHT_BITS = 0.5 / 255
# standard deviations that the projection of rounding errors may reach
DEVIATIONS = 4.0


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


@dataclass(frozen=True)
class Expected:
    """What results are held against: float64's, plain PyTorch's, what rounding decides, and what computing may cost."""

    truth: tuple[Tensor, ...]
    plain: tuple[Tensor, ...]
    undecided: Undecided | None
    computing: float

    @classmethod
    def of(cls, case: Case, operands: Operands, dtype: torch.dtype) -> Expected:
        """Compute it."""
        wide = widened(operands)
        truth = results_of(case.bind(reference, wide, torch.float64)())
        plain = results_of(case.bind(reference, operands, dtype)())
        undecided = None if case.undecided is None else case.undecided(wide)
        return cls(truth, plain, undecided, COMPUTING_FP8 if case.op == "linear_fp8" else COMPUTING)

    def agreement(self, found: tuple[Tensor, ...]) -> Agreement:
        """How results agree."""
        reason = misfit(found, self.plain)
        for each in zip(found, self.plain, self.truth, strict=True) if reason is None else ():
            reason = reason or refusal(*each, computing=self.computing, undecided=self.undecided)
        return Agreement(distance(found, self.truth), distance(self.plain, self.truth), reason)


def check(case: Case, load: Load, operands: Operands, dtype: torch.dtype) -> tuple[Agreement, tuple[Tensor, ...]]:
    """How a form agrees on these operands, called twice, and its first results."""
    expected, before = Expected.of(case, operands, dtype), _tensors(operands)
    kept = {name: [each.clone() for each in tensors] for name, tensors in before.items()}
    with poisoned():
        call = case.bind(load, operands, dtype)
        # the second call may write where the first did
        found = tuple(each.clone() for each in results_of(call()))
        again = results_of(call())
    agreement = expected.agreement(found)
    reason = changed(before, kept) or agreement.reason
    if reason is None:
        agreement = expected.agreement(again)
        reason = None if agreement.reason is None else f"called a second time: {agreement.reason}"
    return replace(agreement, reason=reason), found


def _tensors(operands: Operands) -> dict[str, list[Tensor]]:
    """The tensors of each operand: those of draws are six."""
    return {name: [value] if isinstance(value, Tensor) else value.tensors() for name, value in operands.items()}


def changed(operands: dict[str, list[Tensor]], before: dict[str, list[Tensor]]) -> str | None:
    """Why a form is refused that wrote into an operand; None where it did not."""
    for name, tensors in operands.items():
        if not all(map(torch.equal, tensors, before[name])):
            return f"it changed its operand {name!r}"
    return None


def misfit(found: tuple[Tensor, ...], plain: tuple[Tensor, ...]) -> str | None:
    """Why results are not of the kind that plain PyTorch's are; None where they are."""
    if len(found) != len(plain):
        return f"it returns {len(found)} tensors; expected {len(plain)}"
    for each, expected in zip(found, plain, strict=True):
        eight_bits = each.dtype == torch.uint8 and expected.dtype.itemsize == 2
        if each.shape != expected.shape or not (each.dtype == expected.dtype or eight_bits):
            return (
                f"it returns {each.dtype} of {tuple(each.shape)}; expected {expected.dtype} of {tuple(expected.shape)}"
            )
    return None


def refusal(
    found: Tensor,
    plain: Tensor,
    truth: Tensor,
    *,
    computing: float = COMPUTING,
    undecided: Undecided | None = None,
    scales: tuple[str, ...] = SCALES,
) -> str | None:
    """Why one result is refused; None where it agrees.

    Args:
        found, plain, truth: the form's result, plain PyTorch's in the same precision, and float64's; of one shape.
        computing: what a form may add to rounding its result once, as a share of an element's size.
        undecided: elements that are not compared where they lie in their range; None for none.
        scales: of SCALES, the parts that are looked at.
    """
    error, plain_error = widen(found) - truth, widen(plain) - truth
    if undecided is not None:
        plain_error = plain_error.masked_fill(undecided.where, 0)
        error = error.masked_fill(undecided.allows(widen(found)), 0)
    size = (truth.square() + by_image(truth.square()).mean(1).view(-1, *[1] * (truth.ndim - 1))).sqrt()
    rounding = allowance(found.dtype, truth, size, computing)
    # of few numbers the norm of the errors is itself uncertain, and of single ones the largest
    ratio = RATIO * (1 + 6 / truth.numel() ** 0.5)
    for scale in scales:
        ratio = 2 * ratio if scale == "an element" else ratio
        mine, theirs, sizes, least = (norms(t, scale) for t in (error, plain_error, size, rounding))
        share = (theirs / sizes.clamp(min=torch.finfo(torch.float64).tiny)).max()
        limit = torch.maximum(ratio * share * sizes, least)
        # an error that is NaN is beyond every limit
        beyond = torch.where(mine <= limit, 0, mine / limit.clamp(min=torch.finfo(torch.float64).tiny))
        beyond = beyond.nan_to_num(nan=torch.inf)
        if (beyond > 0).any():
            at = int(beyond.argmax())
            all_of = norms(truth, scale).view(-1)[at].clamp(min=torch.finfo(torch.float64).tiny)
            given, most, other = (float(t.view(-1)[at] / all_of) for t in (mine, limit, theirs))
            where = "" if scale == SCALES[0] else f" in {scale} (number {at})"
            return (
                f"its error against float64{where} is {given:.1e}; at most {most:.1e} is allowed "
                f"(plain PyTorch: {other:.1e})"
            )
    return scale_error(error, plain_error, truth, rounding, computing) if found.element_size() < 4 else None


def widen(result: Tensor) -> Tensor:
    """A result in float64; gates may be stored in eight bits, as a share of 255."""
    return result.double() / 255 if result.dtype == torch.uint8 else result.double()


def allowance(dtype: torch.dtype, truth: Tensor, size: Tensor, computing: float) -> Tensor:
    """What an element may be off that is computed in float32 (float64: exactly) and rounded once to `dtype`."""
    if dtype == torch.float64:
        return EXACT * size
    rounding = EIGHT_BITS if dtype == torch.uint8 else 0.5 * torch.finfo(dtype).eps * truth.abs()
    return rounding + computing * size


def norms(values: Tensor, scale: str) -> Tensor:
    """Euclidean norms of the parts of `values`, each part one element of what is returned."""
    squares = values.square()
    table = squares.reshape(-1, squares.shape[-1])
    if scale == "an element":
        return values.abs()
    if scale == "a tile":
        whole_tiles = torch.nn.functional.pad(table, (0, -table.shape[1] % TILE, 0, -table.shape[0] % TILE))
        return whole_tiles.unflatten(1, (-1, TILE)).sum(2).unflatten(0, (-1, TILE)).sum(1).sqrt()
    if scale == "an image":
        return by_image(squares).sum(1).sqrt()
    sums = squares.sum() if scale == "the whole" else table.sum(1 if scale == "a row" else 0)
    return sums.sqrt()


def by_image(values: Tensor) -> Tensor:
    """(images, ·): what belongs to one index of the first dimension together; all of a vector."""
    return values.reshape(len(values) if values.ndim > 1 else 1, -1)


def scale_error(error: Tensor, plain_error: Tensor, truth: Tensor, rounding: Tensor, computing: float) -> str | None:
    """Why the share of the truth that is in an error is more than chance; None where it is not."""
    squares = truth.square()
    total = squares.sum().clamp(min=torch.finfo(torch.float64).tiny)
    share, plain_share = ((e * truth).sum() / total for e in (error, plain_error))
    # an error within ± rounding has a third of its square on average
    chance = ((plain_error.square() + rounding.square() / 3) * squares).sum().sqrt() / total
    limit = RATIO * plain_share.abs() + DEVIATIONS * chance + computing
    if share.abs() <= limit:
        return None
    return (
        f"it is {abs(float(share)):.1e} too {'large' if share > 0 else 'small'} throughout; its rounding explains "
        f"{float(limit):.1e} (plain PyTorch: {abs(float(plain_share)):.1e})"
    )


def distance(found: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> float:
    """The largest ‖found − truth‖ / ‖truth‖ of the results; NaN where one holds it, infinity for another shape."""
    if len(found) != len(truth) or any(f.shape != t.shape for f, t in zip(found, truth, strict=True)):
        return float("inf")
    worst = torch.zeros((), dtype=torch.float64)
    for each, true in zip(found, truth, strict=True):
        norm = true.norm().clamp(min=torch.finfo(torch.float64).tiny)
        # maximum, unlike max(), keeps NaN
        worst = torch.maximum(worst, ((widen(each) - true).norm() / norm).cpu())
    return float(worst)
