"""A float64 copy of a model that records its operators at one image and runs with them at others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dave_fast.errors import NotFrozenError
from dave_fast.frozen.mode import FrozenMode, live_tensors, run_frozen
from dave_fast.frozen.ranks import canonical
from dave_fast.frozen.trace import Trace
from dave_fast.given.isolation import isolated

_WIDER = {
    **dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), torch.float64),
    torch.complex64: torch.complex128,
}
# functions that take no tensors of different types, and never write into one
_SAME_TYPE = frozenset(["matmul", "mm", "bmm", "mv", "dot", "linear", "conv1d", "conv2d", "conv3d", "addmm", "baddbmm"])


class OperatorTape:
    """The operators of a forward pass in their order: recorded at x, read back at x + δ.

    Attributes:
        entries: name of the function and operator.
    """

    def __init__(self) -> None:
        self.entries: list[tuple[str, Tensor]] = []
        self._next: int | None = None

    def keep(self, name: str, operator: Tensor) -> Tensor:
        """Record the operator, or return the one that the recorded pass had here.

        Raises _PathError where the recorded pass had none here, or one of another function or shape.
        """
        if self._next is None:
            # the model may change the tensor in place afterwards
            self.entries.append((name, operator.clone()))
            return operator
        found = f"the operator {name} {tuple(operator.shape)}"
        if self._next >= len(self.entries):
            raise _PathError(f"{found} after the last one of the first input")
        kept_name, kept = self.entries[self._next]
        if (kept_name, kept.shape) != (name, operator.shape):
            raise _PathError(f"{found} in place of {kept_name} {tuple(kept.shape)}")
        self._next += 1
        return kept

    def finish(self) -> None:
        """End a pass: the next one reads from the first operator. Raise _PathError unless every operator was read."""
        if self._next is not None and self._next < len(self.entries):
            raise _PathError(f"only {self._next} of {len(self.entries)} operators")
        self._next = 0


class _PathError(NotFrozenError):
    """An operator of a replay that the recorded pass did not have there."""


class _DoubleMode(FrozenMode):
    """A mode that freezes operators and lifts a model's own casts to lower precision, so that all is float64."""

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
    """Replace a lower precision by float64; in products of equal types, constants of lower precision too."""
    if isinstance(value, torch.dtype):
        return _WIDER.get(value, value)
    if products and isinstance(value, Tensor) and value.dtype in _WIDER:
        return value.to(_WIDER[value.dtype])
    return value


class Replay:
    """A float64 copy of a model and the operators that it had at one image.

    Args:
        model: any module; it is copied and not called.
        inputs: (B, ...), of which the first is used: images, or tokens for the tail of a model.
        name: of the model, for messages.

    Attributes:
        name: of the model.
        model: the copy.
        x: the first input (1, ...) in float64.
        tape: the operators at `x`.
        functions: names of the functions in which operators were used, and "softmax" where it was called.
    """

    def __init__(self, model: nn.Module, inputs: Tensor, name: str) -> None:
        self.name = name
        self.model = isolated(model, torch.float64)
        with torch.inference_mode(False):
            self.x = inputs[:1].clone().detach().double().requires_grad_()
        self.tape = OperatorTape()
        self.functions: frozenset[str] = frozenset()
        self._passes = 0

    def forward(self, x: Tensor, trace: Trace) -> Tensor:
        """Return the output (1, K) at x (1, ...), which requires a gradient.

        The first call records the operators, all others use the recorded ones. Raises NotFrozenError where the model
        takes another path than in the recorded pass.
        """
        self._passes += 1
        with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
            # fork_rng restores the caller's generator; a model that draws numbers must not draw the same ones twice
            torch.default_generator.manual_seed(self._passes)
            try:
                mode = _DoubleMode(x, self.tape.keep)
                with trace.watching(self.model):
                    # a copy, so that a model that works in place does not change x
                    output = run_frozen(self.model, x.clone(), mode)
                self.tape.finish()
                self.functions = frozenset(name for name, _ in self.tape.entries) | (mode.met & {"softmax"})
            except _PathError as error:
                raise NotFrozenError(
                    f"{self.name} takes a path that its input chooses, which has no frozen form: at another input "
                    f"it had, in {trace.where}, {error}. Compute both branches and choose with torch.where"
                ) from error
        return output
