"""The frozen route: the effective transformation of any nn.Module, by autograd through its own forward pass.

DAVE (arXiv 2602.06613, Eq. 3-5) writes every sub-layer as F(X) = L(X)·X + b with an operator L(X) that the input
chooses, and keeps only L(X) in the gradient. `freeze()` is a TorchFunctionMode: under it a model's forward runs as
written, each L(X) is a constant, and autograd returns the frozen vector-Jacobian product (VJP).

Operators are told from values by ranks. Every tensor that depends on the input has one:

    VALUE        linear in the residual stream
    ACTIVATION   the output of act(u) with act(0) = 0. It is the value gate·u with the frozen gate act(u)/u, and
                 a reshape or a constant factor keeps it so. Multiplied by a VALUE, act(u) as a whole is an operator:
                 silu(a)·b, x·(1 + tanh(…))
    OPERATOR     the output of any other nonlinear function (softmax, sigmoid, exp, rsqrt, a norm …), and any
                 function of OPERATORs and constants alone

In a product of two factors that depend on the input the one of higher rank is detached; in a quotient, the
denominator. Norm layers and attention keep r and P; indices, masks and the winners of a maximum are operators too.
So softmax(q·kᵀ)·v, x·rsqrt(mean x² + eps) and hand-written activations freeze as written, without a list of modules.
An OPERATOR is detached where it meets a value and not before. One that is used as a value (x + sigmoid(x)), or a
product of two VALUEs (x·x), has no rule and keeps autograd's gradient; `frozen.proof`, which checks every model, finds
it. The rules are in `dave_fast/frozen/rules.py`.

The input alone is live: a tensor depends on it if autograd's graph of the tensor reaches it. Every other tensor, a
parameter, a leaf that requires a gradient, or a value kept from an earlier pass with its graph, enters every function
as a detached alias. Until the backward pass autograd keeps the gates and norm scales of every layer, and P where the
model writes attention as two matrix products.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.overrides import TorchFunctionMode

from dave_fast.errors import ModelError
from dave_fast.frozen.ranks import KEEPS_ACTIVATION, TAKES_A_FORM, Rank, canonical, rank_of, set_rank
from dave_fast.frozen.rules import RULES
from dave_fast.given.isolation import class_name
from dave_fast.given.own_forward import logits_of, own_errors

Function = Callable[..., Any]

_DISPATCH_CHECKS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
# the attribute of a tensor that holds the mark of the input on which it depends
_MARK = "_dave_fast_input"
_ATTRIBUTE_ACCESS = ("__get__", "__set__", "__delete__", "requires_grad_", "register_hook")


class _Mark:
    """The identity of one input, and the tensors that require a gradient and do not depend on it, by their id."""

    def __init__(self) -> None:
        self.constants: dict[int, weakref.ref[Tensor]] = {}


class FrozenMode(TorchFunctionMode):
    """A mode in which every operator that depends on the input is a constant for autograd.

    Args:
        inputs: the input, (B, C, H, W) images or (R, N, D) tokens; it requires a gradient.
        keep: of the affine replay: (name of a function, its operator) -> the operator to use.
        forms: function of PyTorch -> what is called in its place, which differs from it by rounding alone.

    Attributes:
        met: names of the functions that were called on tensors that depend on the input.
    """

    def __init__(
        self,
        inputs: Tensor,
        keep: Callable[[str, Tensor], Tensor] | None = None,
        forms: Mapping[Function, Function] | None = None,
    ) -> None:
        super().__init__()
        self._inputs, self._keep, self._forms = inputs, keep, forms or {}
        # asked here, since a function below autograd, as in a TorchDispatchMode, cannot
        self._node = get_gradient_edge(inputs).node if inputs.requires_grad else None
        # a mark of the tensors that depend on this input, kept by it: the modes of its backward passes share it
        self._mark = getattr(inputs, _MARK, None) or _Mark()
        setattr(inputs, _MARK, self._mark)
        self.met: set[str] = set()
        self._name = ""
        self._inside: list[Function] = []

    def __torch_function__(
        self,
        func: Function,
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name in _ATTRIBUTE_ACCESS and not (name == "__get__" and self.is_live(args[0])):
            return func(*args, **kwargs)
        args = [self._constant(a) for a in args]
        kwargs = {key: self._constant(value) for key, value in kwargs.items()}
        live = live_tensors((*args, *kwargs.values()))
        if not live:
            return self._forms.get(func, func)(*args, **kwargs)
        # Tensor.unflatten and similar methods call their own name once more, by super()
        composite = None if self._inside and self._inside[-1] is func else _entered(func)
        if composite is None:
            return self._call(func, args, kwargs, live)
        self._inside.append(func)
        try:
            with self:
                return composite(*args, **kwargs)
        finally:
            self._inside.pop()

    def is_live(self, tensor: Any) -> bool:
        """Return whether a tensor depends on the input by a differentiable path."""
        if not isinstance(tensor, Tensor) or not tensor.requires_grad or isinstance(tensor, nn.Parameter):
            return False
        if getattr(tensor, _MARK, None) is self._mark:
            return True
        # made outside of the mode, by a custom autograd function, or in place
        if tensor is self._inputs or (self._node is not None and _reaches(tensor, self._node)):
            setattr(tensor, _MARK, self._mark)
            return True
        known = self._mark.constants.get(id(tensor))
        if _in_backward() and (known is None or known() is not tensor):
            # a graph of its own, which a custom autograd function builds in its backward
            return True
        self._mark.constants[id(tensor)] = weakref.ref(tensor)
        return False

    def _constant(self, value: Any) -> Any:
        """Return a detached alias of a tensor that does not depend on the input, whatever its requires_grad."""
        if isinstance(value, Tensor):
            return value.detach() if value.requires_grad and not self.is_live(value) else value
        if isinstance(value, list | tuple) and any(isinstance(v, Tensor) and v.requires_grad for v in value):
            return [self._constant(v) for v in value]
        return value

    def _call(self, func: Function, args: Sequence[Any], kwargs: dict[str, Any], live: list[Tensor]) -> Any:
        """Run one function of PyTorch's core on `live` tensors, by its rule or as it is."""
        name, in_place = canonical(func)
        func = self._forms.get(func, func)
        self._name = name
        self.met.add(name)
        if name in TAKES_A_FORM:
            live = live_tensors(args[:1]) or live
        ranks = [rank_of(tensor) for tensor in live]
        operators_only = min(ranks) == Rank.OPERATOR
        rule = None if operators_only else RULES.get(name)
        result = NotImplemented if rule is None else rule(self.operator, func, args, kwargs)
        if result is NotImplemented:
            kept = operators_only or (len(live) == 1 and name in KEEPS_ACTIVATION)
            result = self._as_is(func(*args, **kwargs), ranks[0] if kept else Rank.VALUE)
        if in_place and result is not args[0]:
            # the rule made a new tensor, and callers expect the result in the argument
            result = set_rank(args[0].copy_(result), rank_of(result))
        for tensor in live_tensors([result]):
            setattr(tensor, _MARK, self._mark)
        return result

    def operator(self, tensor: Tensor) -> Tensor:
        """Return the tensor as a constant; in a replay, the operator of the recorded pass."""
        constant = tensor.detach()
        return constant if self._keep is None else self._keep(self._name, constant)

    def _as_is(self, result: Any, rank: Rank) -> Any:
        """Rank the result of a function; indices and masks that the input chose (argsort, x > 0) are operators."""
        if isinstance(result, list | tuple):
            for tensor in live_tensors(result):
                set_rank(tensor, rank)
        elif isinstance(result, Tensor):
            if result.requires_grad:
                return set_rank(result, rank)
            if not result.is_floating_point():
                return self.operator(result)
        return result


def freeze(inputs: Tensor) -> FrozenMode:
    """Return a context in which any model's forward pass on these inputs has frozen operators.

    Use it as `with freeze(x): output = model(x)`, with an input that requires a gradient. Activation checkpointing
    recomputes in the backward pass, so call `torch.autograd.grad` within the context of the same input too. A context
    serves one `with` at a time; take one per thread.
    """
    return FrozenMode(inputs)


def run_frozen(model: nn.Module, inputs: Tensor, mode: FrozenMode | None = None) -> Tensor:
    """Call a model with frozen operators and return its output, checked.

    Args:
        model: any module in evaluation mode; it may change the inputs in place.
        inputs: (B, ...), requires a gradient.
        mode: of these inputs, or of a leaf that they are a view of; None makes one.

    Returns:
        The output (B, ...) or its tensor `logits`, with autograd's graph to `inputs`.

    Raises:
        ModelError: the model is in training mode, its forward raises, its output is no tensor and has no tensor
            `logits`, or the output does not depend on the inputs.
    """
    _require_evaluation(model)
    mode = mode or freeze(inputs)
    form = f"forward pass on inputs {tuple(inputs.shape)} in {str(inputs.dtype).removeprefix('torch.')}"
    with own_errors(model, form), mode:
        output = model(inputs)
    logits = logits_of(model, output)
    if not mode.is_live(logits):
        raise ModelError(
            f"the output of {class_name(model)} does not depend on its input by any differentiable path: does "
            "its forward use torch.no_grad() or detach()?"
        )
    return logits


def _require_evaluation(model: nn.Module) -> None:
    """Raise ModelError where the model, a dropout or a batch norm is in training mode; the user has to change it."""
    by_mode = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase)
    for path, module in model.named_modules():
        if module.training and (module is model or isinstance(module, by_mode)):
            where = f"its module {path!r} ({type(module).__name__})" if path else "it"
            raise ModelError(
                f"the model {class_name(model)} is to be explained as it predicts, but {where} is in training "
                "mode: call model.eval() first"
            )


def live_tensors(values: Iterable[Any]) -> list[Tensor]:
    """Return the tensors that depend on the input, also those in lists and tuples."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            if value.requires_grad:
                found.append(value)
        elif isinstance(value, list | tuple):
            found += live_tensors(value)
    return found


def _in_backward() -> bool:
    """Return whether this thread runs a backward pass; activation checkpointing repeats the forward pass in it."""
    return bool(torch._C._current_graph_task_id() != -1)


def _reaches(tensor: Tensor, goal: Node) -> bool:
    """Return whether autograd's graph of a tensor leads back to a node."""
    pending, seen = [tensor.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is goal:
            return True
        if node is not None and node not in seen:
            seen.add(node)
            pending += [before for before, _ in node.next_functions]
    return False


def _entered(func: Function) -> Function | None:
    """Return a copy of a Python composite whose body runs under the mode; None for any other function.

    F.multi_head_attention_forward, F.normalize, Tensor.norm and others first check whether a mode is active, and then
    pass themselves to it as one opaque call. In the copy this check returns False, so that the mode gets the functions
    of the body instead.
    """
    if not isinstance(func, types.FunctionType):
        return None
    if not any(name in func.__globals__ for name in _DISPATCH_CHECKS if name in func.__code__.co_names):
        return None
    scope = {**func.__globals__, **dict.fromkeys(_DISPATCH_CHECKS, lambda *_: False)}
    copy = types.FunctionType(func.__code__, scope, func.__name__, func.__defaults__, func.__closure__)
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy
