"""Agreement of a form of an op with float64, without which it is not timed.

The truth is the reference on the operands converted to float64. Each result is compared with plain PyTorch's on the
same operands, as a whole and in parts (`SCALES`: images, rows, columns, tiles, elements), so that an error in few
elements is not lost among many. In a part ‖error‖ may be

    RATIO · (the largest share ‖error‖ / ‖size‖ of plain PyTorch's result in any such part) · ‖size‖

or, if that is more, the error of computing in float32 and rounding once to the result's dtype; twice as much in single
elements, and somewhat more in results of few elements. The size of an element t is √(t² + the mean square of its image
or row). In a result narrower than float32 rounding hides small errors from norms, but not from sums: the error's
projection on the truth, a scale error, must be within its noise.

Buffers are filled with NaN before the form runs, so that an element that is not written shows. The form runs twice on
the same operands, which it must not change, and both results are checked. Where rounding decides whether robust_mean
keeps a sample (`Case.undecided`), the element must lie between the least and the largest contribution that may be kept.

Not detected are errors of one part below these limits: in float32 about 10⁻⁶, in bfloat16 0.5 to 1 % of a row or tile
and 2 to 5 % of an element; scale errors of a whole bfloat16 result of n elements below about 0.03/√n (0.01 % is
detected from about 100,000 elements, 0.1 % from about 1,000); in products of eight-bit operands scale errors below
0.1 %; and errors in options that no case sets: attention's bias, the sums of squares that linear returns and row_rstd
takes, codes in eight bits as results, an RMSNorm after which a centred stream starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from dave_fast.bench.case import Case, Load, Operands, Undecided, results_of, widened
from dave_fast.ops import _registry

RATIO = 2.0
# float64 against float64: the error of reordering sums
EXACT = 1e-12
TINY = torch.finfo(torch.float64).tiny
SCALES = ("the whole", "an image", "a row", "a column", "a tile", "an element")
TILE = 16
# error allowed besides rounding the result once, as a share of an element's size: four float32 roundings; for products
# of eight-bit operands the error of Hopper's tensor cores, whose sums have 13 bits
COMPUTING = 4 * torch.finfo(torch.float32).eps
COMPUTING_FP8 = 2.0**-10
# an eight-bit gate counts in steps of 1/255
EIGHT_BITS = 0.5 / 255
# standard deviations that the projection of rounding errors may reach
DEVIATIONS = 4.0


@dataclass(frozen=True)
class Agreement:
    """Relative errors (Euclidean norms) against float64.

    Attributes:
        error: of the form.
        plain: of plain PyTorch.
        reason: why the form is refused; None if it agrees.
    """

    error: float
    plain: float
    reason: str | None


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill new uninitialised buffers with NaN, or integers with 7, within this context."""

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
    """Return the function that gives a backend's form of an op, the default for ops that it lacks."""
    return lambda op: _registry.bind(op, backend, device)


def reference(op: str) -> Callable[..., Any]:
    """Return the op in plain PyTorch."""
    return _registry.load(op, "torch")


@dataclass(frozen=True)
class Expected:
    """The expected results of a case.

    Attributes:
        truth: in float64.
        plain: of plain PyTorch in the same precision.
        undecided: of each result, elements that rounding decides, or None.
        computing: error allowed besides rounding once, as a share of an element's size.
    """

    truth: tuple[Tensor, ...]
    plain: tuple[Tensor, ...]
    undecided: Sequence[Undecided | None]
    computing: float

    @classmethod
    def of(cls, case: Case, operands: Operands, dtype: torch.dtype) -> Expected:
        """Compute the expected results."""
        wide = widened(operands)
        truth = results_of(case.bind(reference, wide, torch.float64)())
        plain = results_of(case.bind(reference, operands, dtype)())
        undecided = [None] * len(truth) if case.undecided is None else case.undecided(wide)
        return cls(truth, plain, undecided, COMPUTING_FP8 if case.op == "linear_fp8" else COMPUTING)

    def agreement(self, found: tuple[Tensor, ...]) -> Agreement:
        """Compare results with the expected ones."""
        reason = misfit(found, self.plain)
        results = zip(found, self.plain, self.truth, self.undecided, strict=True) if reason is None else ()
        for *each, undecided in results:
            reason = reason or refusal(*each, computing=self.computing, undecided=undecided)
        return Agreement(distance(found, self.truth), distance(self.plain, self.truth), reason)


def check(case: Case, load: Load, operands: Operands, dtype: torch.dtype) -> tuple[Agreement, tuple[Tensor, ...]]:
    """Check a form on operands, called twice; return its agreement and its first results.

    Args:
        case: the op at one shape.
        load: gives the functions of the form's backend.
        operands: of the case.
        dtype: of the operands.
    """
    expected, before = Expected.of(case, operands, dtype), _tensors(operands)
    kept = {name: [each.clone() for each in tensors] for name, tensors in before.items()}
    with poisoned():
        call = case.bind(load, operands, dtype)
        # a copy, because the second call may write to the same memory
        found = tuple(each.clone() for each in results_of(call()))
        again = results_of(call())
    for name, tensors in before.items():
        if not all(map(torch.equal, tensors, kept[name])):
            return replace(expected.agreement(found), reason=f"it changed its operand {name!r}"), found
    agreement = expected.agreement(found)
    if agreement.reason is None:
        agreement = expected.agreement(again)
        if agreement.reason is not None:
            agreement = replace(agreement, reason=f"called a second time: {agreement.reason}")
    return agreement, found


def _tensors(operands: Operands) -> dict[str, list[Tensor]]:
    """Return the tensors of each operand; those of draws are several."""
    return {name: [value] if isinstance(value, Tensor) else value.tensors() for name, value in operands.items()}


def misfit(found: tuple[Tensor, ...], plain: tuple[Tensor, ...]) -> str | None:
    """Return how results differ from plain PyTorch's in number, shape or dtype, or None."""
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
    """Return why one result is refused, or None if it agrees.

    Args:
        found: the form's result.
        plain: plain PyTorch's in the same precision.
        truth: float64's; all three have one shape.
        computing: error allowed besides rounding once, as a share of an element's size.
        undecided: elements that need only lie in their range, or None.
        scales: of SCALES, the parts to compare.
    """
    error, plain_error = widen(found) - truth, widen(plain) - truth
    if undecided is not None:
        plain_error = plain_error.masked_fill(undecided.where, 0)
        error = error.masked_fill(undecided.allows(widen(found)), 0)
    size = (truth.square() + by_image(truth.square()).mean(1).view(-1, *[1] * (truth.ndim - 1))).sqrt()
    rounding = allowance(found.dtype, truth, size, computing)
    # the ratio of two norms of rounding errors varies by chance, the more the fewer the elements; that of the largest
    # single errors varies most
    ratio = RATIO * (1 + 6 / truth.numel() ** 0.5)
    for scale in scales:
        ratio = 2 * ratio if scale == "an element" else ratio
        mine, theirs, sizes, least = (norms(t, scale) for t in (error, plain_error, size, rounding))
        share = (theirs / sizes.clamp(min=TINY)).max()
        limit = torch.maximum(ratio * share * sizes, least)
        # NaN exceeds every limit
        beyond = torch.where(mine <= limit, 0, mine / limit.clamp(min=TINY))
        beyond = beyond.nan_to_num(nan=torch.inf)
        if (beyond > 0).any():
            at = int(beyond.argmax())
            all_of = norms(truth, scale).view(-1)[at].clamp(min=TINY)
            given, most, other = (float(t.view(-1)[at] / all_of) for t in (mine, limit, theirs))
            where = "" if scale == SCALES[0] else f" in {scale} (number {at})"
            return (
                f"its error against float64{where} is {given:.1e}; at most {most:.1e} is allowed "
                f"(plain PyTorch: {other:.1e})"
            )
    return scale_error(error, plain_error, truth, rounding, computing) if found.element_size() < 4 else None


def widen(result: Tensor) -> Tensor:
    """Convert a result to float64; gates may be stored in eight bits, as a share of 255."""
    return result.double() / 255 if result.dtype == torch.uint8 else result.double()


def allowance(dtype: torch.dtype, truth: Tensor, size: Tensor, computing: float) -> Tensor:
    """Return the error allowed for each element if computed in float32 (or float64) and rounded once to `dtype`."""
    if dtype == torch.float64:
        return EXACT * size
    rounding = EIGHT_BITS if dtype == torch.uint8 else 0.5 * torch.finfo(dtype).eps * truth.abs()
    return rounding + computing * size


def norms(values: Tensor, scale: str) -> Tensor:
    """Return Euclidean norms of the parts of `values`, an element for each part."""
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
    """Return values with all dimensions but the first flattened; a vector is a single row."""
    return values.reshape(len(values) if values.ndim > 1 else 1, -1)


def scale_error(error: Tensor, plain_error: Tensor, truth: Tensor, rounding: Tensor, computing: float) -> str | None:
    """Return why the projection of an error on the truth is more than chance, or None."""
    squares = truth.square()
    total = squares.sum().clamp(min=TINY)
    share, plain_share = ((e * truth).sum() / total for e in (error, plain_error))
    # the mean square of an error uniform within ±rounding is rounding² / 3
    chance = ((plain_error.square() + rounding.square() / 3) * squares).sum().sqrt() / total
    limit = RATIO * plain_share.abs() + DEVIATIONS * chance + computing
    if share.abs() <= limit:
        return None
    return (
        f"it is {abs(float(share)):.1e} too {'large' if share > 0 else 'small'} throughout; its rounding explains "
        f"{float(limit):.1e} (plain PyTorch: {abs(float(plain_share)):.1e})"
    )


def distance(found: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> float:
    """Return the largest ‖found − truth‖ / ‖truth‖ of the results; NaN if one has NaN, infinity for another shape."""
    if len(found) != len(truth) or any(f.shape != t.shape for f, t in zip(found, truth, strict=True)):
        return float("inf")
    worst = torch.zeros((), dtype=torch.float64)
    for each, true in zip(found, truth, strict=True):
        norm = true.norm().clamp(min=TINY)
        # torch.maximum, unlike max(), propagates NaN
        worst = torch.maximum(worst, ((widen(each) - true).norm() / norm).cpu())
    return float(worst)
