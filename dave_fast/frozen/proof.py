"""The proof of the frozen route on a given model: the affine replay.

With every operator (P, norm scales, gates, masks) recorded at x, a model replayed with those operators is an affine
function f of its input, and the frozen gradient w is its slope: f(x+δ) − f(x) = ⟨w, δ⟩ for any δ, to rounding. Where
that fails, some input-dependent product was left unfrozen, or a path lost its gradient. Equal outputs prove nothing.

The proof runs on one image and on a deep copy of the model in float64 and evaluation mode, so that it can ask for
1e-12; the user's model is not called. Casts to lower precision inside the model are lifted. It costs the memory of the
copy (8 bytes a weight) and of the recorded operators, and four forward passes and one backward pass in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dave_fast.errors import ModelError, NonFiniteError, NotFrozenError
from dave_fast.frozen.mode import FrozenMode, check_scores, live_tensors, run_frozen
from dave_fast.frozen.ranks import canonical
from dave_fast.frozen.trace import Trace, find_culprit
from dave_fast.models.fingerprint import fingerprint

TOLERANCE = 1e-12

# The functions in which attention's operator meets the values; or those in which it is made, where the values are
# weighed one by one and summed (MobileViT v2).
MIXING = frozenset({"scaled_dot_product_attention", "matmul", "bmm", "baddbmm", "einsum", "mm"})
WEIGHING = frozenset({"softmax"})

# A change of less than this, relative to the output, is rounding.
_NO_CHANGE = 1e-14
# The output itself is rounded: at 1e-12 this share allows it 45 units in the last place, and no more, where a model
# adds a small change to a large constant (CaiT's class token behind a LayerScale of 1e-5).
_OUTPUT_SHARE = 0.01
_LOW_PRECISION = (torch.float32, torch.float16, torch.bfloat16)
# Functions that take no tensors of different types, and never write into one.
_SAME_TYPE = frozenset(["matmul", "mm", "bmm", "mv", "dot", "linear", "conv1d", "conv2d", "conv3d", "addmm", "baddbmm"])


@dataclass(frozen=True)
class ReplayReport:
    """What an affine replay measured.

    errors: |⟨c, f(x+δ) − f(x)⟩ − ⟨w, δ⟩| / (‖c‖·(‖f(x+δ) − f(x)‖ + ‖f(x)‖/100)), one for each δ of norm ‖x‖; c is the
        cotangent.
    operators: how many operators were recorded.
    functions: the names of the functions in which they were met, and those of WEIGHING that were called.
    culprit: where it failed, dotted path, class and what was seen there; None where it held.
    """

    model: str
    errors: tuple[float, ...]
    operators: int
    functions: frozenset[str]
    tolerance: float = TOLERANCE
    culprit: str | None = None

    @property
    def has_attention(self) -> bool:
        """Whether somewhere an operator mixes positions: attention, fused, as a matrix product, or as a softmax."""
        return not self.functions.isdisjoint(MIXING | WEIGHING)

    @property
    def passed(self) -> bool:
        """Every error, also a NaN, is measured against the tolerance."""
        return all(error <= self.tolerance for error in self.errors)


class OperatorTape:
    """Operators in the order in which a forward pass meets them: written at x, read back at x + δ."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, Tensor]] = []
        self._next: int | None = None

    def rewind(self) -> None:
        """Read from the first operator on."""
        self._next = 0

    def keep(self, name: str, operator: Tensor) -> Tensor:
        """Write the operator, or read the one that the recorded pass had here."""
        if self._next is None:
            # The model may go on to change the tensor in place.
            self.entries.append((name, operator.clone()))
            return operator
        met = f"{name} {tuple(operator.shape)}"
        if self._next >= len(self.entries):
            raise _PathError(f"{met}, after the last recorded operator")
        kept_name, kept = self.entries[self._next]
        if (kept_name, kept.shape) != (name, operator.shape):
            raise _PathError(f"{met} where {kept_name} {tuple(kept.shape)} was recorded")
        self._next += 1
        return kept

    def finish(self) -> None:
        """Every recorded operator must have been read."""
        if self._next is not None and self._next < len(self.entries):
            raise _PathError(f"the end after {self._next} of {len(self.entries)} recorded operators")


class _PathError(Exception):
    """A replay met other operators than the recorded pass."""


class _DoubleMode(FrozenMode):
    """Frozen operators in float64 throughout: a model's own casts to lower precision are lifted."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if live_tensors((*args, *kwargs.values())):
            if getattr(func, "__name__", "") in ("float", "half", "bfloat16"):
                return args[0]
            products = canonical(func)[0] in _SAME_TYPE
            args = [_lifted(a, products) for a in args]
            kwargs = {key: _lifted(value, products) for key, value in kwargs.items()}
        return super().__torch_function__(func, types, args, kwargs)


def _lifted(value: Any, products: bool) -> Any:
    """A lower precision as float64; in products that ask for equal types, constants of a lower precision too."""
    if isinstance(value, torch.dtype) and value in _LOW_PRECISION:
        return torch.float64
    if products and isinstance(value, Tensor) and value.dtype in _LOW_PRECISION:
        return value.double()
    return value


class Replay:
    """A float64 copy of a model and the operators that it had at one image."""

    def __init__(self, model: nn.Module, inputs: Tensor) -> None:
        self.name = type(model).__name__
        try:
            self.model = copy.deepcopy(model).double().eval()
        except Exception as error:
            raise ModelError(f"{self.name} cannot be copied for the affine replay: {error}") from error
        with torch.inference_mode(False):
            self.x = inputs[:1].clone().detach().double().requires_grad_()
        self.tape = OperatorTape()
        self.functions: frozenset[str] = frozenset()
        self._passes = 0

    def forward(self, x: Tensor, trace: Trace) -> Tensor:
        """The output (1,K) at x (1,C,H,W): recording the first time, with the recorded operators from then on."""
        self._passes += 1
        with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
            # The caller's generator is put back afterwards; a model that draws must not draw the same twice.
            torch.default_generator.manual_seed(self._passes)
            try:
                with _DoubleMode(self.tape) as mode, trace.watching(self.model):
                    output = run_frozen(self.model, x)
                self.tape.finish()
                self.functions = frozenset(name for name, _ in self.tape.entries) | (mode.met & WEIGHING)
            except _PathError as error:
                raise NotFrozenError(
                    f"{self.name} takes a path that its input chooses, which has no frozen form: in {trace.where} the "
                    f"affine replay met {error}"
                ) from error
        self.tape.rewind()
        return output

    def backward(self, output: Tensor, cotangent: Tensor) -> Tensor:
        """The frozen gradient at x for a cotangent of the output."""
        with FrozenMode():
            (slope,) = torch.autograd.grad(output, self.x, cotangent)
        return slope


def affine_replay(
    model: nn.Module,
    inputs: Tensor,
    target_fn: Callable[[Tensor], Tensor] | None = None,
    *,
    seed: int = 0,
    tolerance: float = TOLERANCE,
) -> ReplayReport:
    """Replay the model with the operators of its first image at two other inputs and compare with the slope.

    model: any nn.Module; inputs: (B,C,H,W), of which the first image is used.
    target_fn: output (1,K) → scores (1,), affine; by default a random combination of all outputs.
    seed: of the combination and of the δ; no global generator is touched.

    Raises ModelError for a model that is random or constant, NotFrozenError for one whose path depends on the
    input, and NonFiniteError where the output has NaN or infinity.
    """
    replay = Replay(model, inputs)
    output = replay.forward(replay.x, Trace())
    _check_output(replay, output)
    generator = torch.Generator().manual_seed(seed)
    cotangent = _cotangent(replay, output, target_fn, generator)
    slope = replay.backward(output, cotangent)
    steps = [_step(replay.x, generator) for _ in range(2)]
    errors = tuple(_error(replay, output, cotangent, slope, step) for step in steps)
    report = ReplayReport(replay.name, errors, len(replay.tape.entries), replay.functions, tolerance)
    return report if report.passed else replace(report, culprit=_locate(replay, cotangent, steps[0]))


def prove_frozen(model: nn.Module, inputs: Tensor, *, seed: int = 0) -> ReplayReport:
    """`affine_replay`, and NotFrozenError with the name of the module that breaks it."""
    report = affine_replay(model, inputs, seed=seed)
    if not report.passed:
        raise NotFrozenError(
            f"the frozen gradient of {report.model} would be wrong: its affine replay is off by "
            f"{max(report.errors):.1e} (tolerance {report.tolerance:.0e}), because of {report.culprit}. Write that "
            "step with functions that have a frozen form (dave_fast/frozen/rules.py lists them), without detach() "
            "or custom autograd functions"
        )
    return report


_proved: WeakKeyDictionary[nn.Module, dict[tuple[int, ...], tuple[object, ReplayReport]]] = WeakKeyDictionary()


def ensure_proved(model: nn.Module, inputs: Tensor) -> ReplayReport:
    """`prove_frozen` once for each model and image size, as long as the model's modules and weights stay what they are.

    Weights count, since a branch that a weight of zero had silenced was never proved. The first call costs about
    what explaining ten images in float64 does, every later one a look at the weights' fingerprint.
    """
    now, size = fingerprint(model), tuple(inputs.shape[1:])
    proved = _proved.setdefault(model, {})
    if size not in proved or proved[size][0] != now:
        proved[size] = (now, prove_frozen(model, inputs))
    return proved[size][1]


def _check_output(replay: Replay, output: Tensor) -> None:
    if not output.isfinite().all():
        raise NonFiniteError(f"{replay.name} returned NaN or infinity in float64 for the image it was to be proved on")
    again = replay.forward(replay.x, Trace())
    if (again - output).norm() > TOLERANCE * output.norm():
        raise ModelError(
            f"{replay.name} is random: two passes over one image differ by {(again - output).abs().max():.1e} though "
            "it is in evaluation mode. Does its forward draw numbers, or call F.dropout without training=self.training?"
        )


def _cotangent(
    replay: Replay, output: Tensor, target_fn: Callable[[Tensor], Tensor] | None, generator: torch.Generator
) -> Tensor:
    """The gradient of the score with respect to the output, (1,K)."""
    if target_fn is None:
        return torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.device)
    leaf = output.detach().requires_grad_()
    with torch.enable_grad():
        scores = target_fn(leaf)
        check_scores(scores, replay.x)
        (cotangent,) = torch.autograd.grad(scores.sum(), leaf)
    return cotangent


def _step(x: Tensor, generator: torch.Generator) -> Tensor:
    """A random δ of the norm of x (of an image of ones, where x is zero)."""
    direction = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
    length = x.detach().norm()
    scale = float(length) if length > 0 else x.numel() ** 0.5
    return direction * (scale / float(direction.norm()))


def _error(replay: Replay, output: Tensor, cotangent: Tensor, slope: Tensor, step: Tensor) -> float:
    moved = (replay.x + step).detach().requires_grad_()
    change = (replay.forward(moved, Trace()) - output).detach()
    if change.norm() <= _NO_CHANGE * output.detach().norm():
        raise ModelError(
            f"the output of {replay.name} does not change with its input, so that there is nothing to explain: are "
            "its weights loaded (a head or a branch of zeros)?"
        )
    scale = cotangent.norm() * (change.norm() + _OUTPUT_SHARE * output.detach().norm())
    return abs(float((cotangent * change).sum() - (slope * step).sum())) / float(scale)


def _locate(replay: Replay, cotangent: Tensor, step: Tensor) -> str:
    """Replay once more at x and at x + δ, watching every module."""
    before, after = Trace(keeps_calls=True), Trace(keeps_calls=True)
    output = replay.forward(replay.x, before)
    replay.forward((replay.x + step).detach().requires_grad_(), after)
    # The caller may be under no_grad or in inference mode.
    with torch.inference_mode(False), torch.enable_grad():
        return find_culprit(before, after, (output * cotangent).sum())
