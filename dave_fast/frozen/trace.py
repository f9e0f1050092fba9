"""The module at which an affine replay fails: each module's own slope is compared with its own change.

A module whose operators are frozen satisfies ⟨c, out(x+δ) − out(x)⟩ = ⟨Jᵀc, in(x+δ) − in(x)⟩, whatever the modules
before it did. The culprit is the first and innermost module, in execution order, that does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

# far above rounding in float64 through one module, far below any variation of an operator that matters
_LOCAL_TOLERANCE = 1e-9

# how much more error than its input and one rounding a module's output may have
_ROUNDING = 8

Recorded = list[tuple[Tensor, Tensor]]


@dataclass
class Call:
    """One call of a module.

    Attributes:
        path: dotted path of the module.
        kind: name of its class.
        inputs: its floating tensors, each with a copy, since modules may work in place.
        outputs: the floating tensors that it returned, likewise.
    """

    path: str
    kind: str
    inputs: Recorded
    outputs: Recorded = field(default_factory=list)

    @property
    def name(self) -> str:
        """The dotted path and the class, for messages."""
        return f"module {self.path!r} ({self.kind})" if self.path else f"the forward of {self.kind} itself"


class Trace:
    """The module calls of one forward pass, in the order in which they finish.

    Args:
        keeps_calls: whether tensors are recorded; otherwise only the running module is known.

    Attributes:
        calls: the recorded calls.
    """

    def __init__(self, keeps_calls: bool = False) -> None:
        self.calls: list[Call] = []
        self._keeps_calls = keeps_calls
        self._open: list[Call] = []

    @property
    def where(self) -> str:
        """The module that runs now, or that ran when an error was raised."""
        return self._open[-1].name if self._open else "the model"

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Register hooks on every module of the replay's copy for the time of one pass."""
        handles = []
        for path, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(partial(self._enter, path), with_kwargs=True))
            handles.append(module.register_forward_hook(self._leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        inputs = _recorded((args, kwargs)) if self._keeps_calls else []
        self._open.append(Call(path, type(module).__name__, inputs))
        return _cloned((args, kwargs)) if self._keeps_calls else None

    def _leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        call = self._open.pop()
        if not self._keeps_calls:
            return None
        call.outputs = _recorded(output)
        self.calls.append(call)
        return _cloned(output)


def find_culprit(before: Trace, after: Trace, score: Tensor) -> str:
    """Name the first and innermost module whose change is not that of its slope.

    Args:
        before: the recorded pass at x, with its graph.
        after: the replay at x + δ.
        score: of the recorded pass.

    Returns:
        The module and how it fails, as the end of a sentence.
    """
    outputs = [t for call in before.calls for t, _ in call.outputs if t.requires_grad]
    gradients = torch.autograd.grad(score, outputs, retain_graph=True, allow_unused=True)
    # outputs that only operators are made of (queries, norms, gates) get no gradient and need not be linear
    reached = {id(t) for t, g in zip(outputs, gradients, strict=True) if g is not None}
    for call, moved in zip(before.calls, after.calls, strict=True):
        reason = _broken(call, moved, reached)
        if reason is not None:
            return f"{call.name}: {reason}"
    return f"a step outside of any module, or rounding (no module is off by more than {_LOCAL_TOLERANCE:.0e})"


def find_rounding(exact: Trace, rounded: Trace, unit: float) -> str:
    """Name the first and innermost module whose output has far more error than its input.

    Args:
        exact: a pass in float64.
        rounded: a pass of a copy in lower precision, at the same input.
        unit: the machine epsilon of that precision.
    """
    for call, other in zip(exact.calls, rounded.calls, strict=False):
        before, after = _error(call.inputs, other.inputs), _error(call.outputs, other.outputs)
        if not after <= _ROUNDING * (before + unit):
            return call.name
    return "all modules together"


def _error(exact: Recorded, rounded: Recorded) -> float:
    """Return the largest relative difference of tensors in pairs."""
    pairs = [(a, b.to(a)) for (_, a), (_, b) in zip(exact, rounded, strict=False) if a.shape == b.shape]
    return max((float((a - b).norm() / a.norm().clamp(min=1e-300)) for a, b in pairs), default=0.0)


def _broken(call: Call, moved: Call, reached: set[int]) -> str | None:
    """Return how a call of a module fails the comparison, or None; `reached` are ids of outputs with a gradient."""
    d_in = [b - a for (_, a), (_, b) in zip(call.inputs, moved.inputs, strict=True)]
    d_out = [b - a for (_, a), (_, b) in zip(call.outputs, moved.outputs, strict=True)]
    if _lost(call.inputs, d_in):
        # the gradient was lost before this module
        return None
    if _lost(call.outputs, d_out):
        return "its output changes with the input but carries no gradient (detach() or no_grad)"
    used = [i for i, (t, _) in enumerate(call.outputs) if id(t) in reached]
    live = [i for i, (t, _) in enumerate(call.inputs) if t.requires_grad]
    if not used or not live:
        return None
    generator = torch.Generator().manual_seed(0)
    cotangents = [torch.randn(d_out[i].shape, generator=generator, dtype=torch.float64).to(d_out[i]) for i in used]
    slopes = torch.autograd.grad(
        [call.outputs[i][0] for i in used],
        [call.inputs[i][0] for i in live],
        cotangents,
        retain_graph=True,
        allow_unused=True,
    )
    terms = [(c, d_out[i]) for c, i in zip(cotangents, used, strict=True)]
    terms += [(-s, d_in[i]) for s, i in zip(slopes, live, strict=True) if s is not None]
    scale = sum(float(a.norm() * b.norm()) for a, b in terms)
    difference = abs(sum(float((a * b).sum()) for a, b in terms))
    if difference <= _LOCAL_TOLERANCE * scale:
        return None
    return "with frozen operators its output is not linear in its input, or its gradient is not that of its output"


def _lost(tensors: Recorded, differences: list[Tensor]) -> bool:
    """Return whether a tensor that changes with the input has no gradient."""
    pairs = zip(tensors, differences, strict=True)
    return any(not t.requires_grad and d.norm() > _LOCAL_TOLERANCE * (value.norm() + 1) for (t, value), d in pairs)


def _recorded(tree: Any) -> Recorded:
    return [(t, t.detach().clone()) for t in _floating(tree)]


def _floating(tree: Any) -> list[Tensor]:
    """Return the floating tensors, each once, since attention is called as f(x, x, x)."""
    found = {id(t): t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor) and t.is_floating_point()}
    return list(found.values())


def _cloned(tree: Any) -> Any:
    """Return the tree with copies of its floating tensors, so that later changes in place do not reach the record.

    Each tensor has one copy, since modules check whether two arguments are the same object.
    """
    copies = {id(t): t.clone() for t in _floating(tree)}
    return pytree.tree_map(lambda t: copies.get(id(t), t), tree)
