"""An independent truth for every route: autograd in float64 with each operator held by detach(), and its own proof.

The rules are those of DAVE, arXiv 2602.06613, Eq. 3-5, written once more and without anything of dave_fast: softmax and
attention weights, 1/σ of norms, gates act(u)/u of activations, the winners of a maximum and all that is no floating
point number are held. `truth` then checks by itself that the held model is affine: the operators of the images are
played back at two other inputs. Where that fails, no effective gradient exists, and a route has to refuse the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_ACTIVATIONS = "gelu silu relu relu6 leaky_relu elu selu celu mish hardswish hardtanh tanh softshrink abs absolute"
_OPERATORS = (
    "softmax softmin sigmoid hardsigmoid exp expm1 rsqrt sqrt log log1p reciprocal softplus logsigmoid var std norm "
    "vector_norm linalg_vector_norm sin cos erf logsumexp"
)
_MIXES = "linear matmul __matmul__ bmm conv2d einsum sum mean addmm layer_norm rms_norm"
ACTIVATIONS, OPERATORS = frozenset(_ACTIVATIONS.split()), frozenset(_OPERATORS.split())
ELEMENTWISE_PRODUCTS = frozenset({"mul", "multiply", "__mul__", "__rmul__", "mul_", "__imul__"})
# what makes a value of an activation
MIXES = frozenset(_MIXES.split())
WIDE = {
    torch.float32: torch.float64,
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.complex64: torch.complex128,
}
# relative error of a change against its slope
AFFINE = 1e-9


class LeftThePathError(Exception):
    """A pass that asked for other operators than the recorded one."""


class Held(TorchFunctionMode):
    """A mode that holds every operator, and computes in float64 whatever the tensors around the input are.

    Attributes:
        tape: the operators of the first pass, which the passes after `rewind` use in place of their own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tape: list[Tensor] = []
        self._at: int | None = None
        self._input = torch.empty(0)
        self._reaches: dict[Any, bool] = {}

    def run(self, model: nn.Module, x: Tensor) -> Any:
        """Return the output at x, a leaf that requires a gradient."""
        self._input, self._reaches = x, {}
        with self:
            return model(x.clone())

    def _depends(self, tensor: Tensor) -> bool:
        """Return whether a tensor depends on the input; others that require a gradient are constants."""
        if not tensor.requires_grad or tensor.is_leaf:
            return tensor is self._input
        return self._leads_to_input(tensor.grad_fn)

    def _leads_to_input(self, node: Any) -> bool:
        if node not in self._reaches:
            further = [each for each, _ in node.next_functions if each is not None]
            here = getattr(node, "variable", None) is self._input
            self._reaches[node] = here or any(map(self._leads_to_input, further))
        return self._reaches[node]

    def rewind(self) -> None:
        if self._at not in (None, len(self.tape)):
            raise LeftThePathError
        self._at = 0

    def hold(self, operator: Tensor) -> Tensor:
        if self._at is None:
            self.tape.append(operator.detach().clone())
            return self.tape[-1]
        if self._at >= len(self.tape) or self.tape[self._at].shape != operator.shape:
            raise LeftThePathError
        self._at += 1
        return self.tape[self._at - 1]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__", "requires_grad_", "register_hook", "retain_grad"):
            # accessors of a tensor's attributes
            return func(*args, **kwargs)
        if func is getattr(F, name, None):
            # a function of torch.nn.functional hands over what its name stands for, which may be a replacement of it
            func = getattr(func, "__wrapped__", func)
        args, kwargs = self._constants(list(args)), {key: self._constants(value) for key, value in kwargs.items()}
        live = live_tensors([*args, *kwargs.values()])
        if live or any(isinstance(a, Tensor) and a.dtype in WIDE.values() for a in args):
            args, kwargs = _widened(args), {key: _widened(value) for key, value in kwargs.items()}
        if not live:
            return func(*args, **kwargs)
        result = self._ruled(func, name.split(".")[0], args, kwargs)
        if isinstance(result, Tensor) and not result.requires_grad and not result.is_floating_point():
            return self.hold(result) if not result.is_complex() else result
        if isinstance(result, Tensor) and name not in MIXES and len(live) == 1 and is_gated(live[0]):
            result.is_gated = True
        return result

    def _constants(self, value: Any) -> Any:
        """Detach what does not depend on the input."""
        if isinstance(value, Tensor) and value.requires_grad and not self._depends(value):
            return value.detach()
        if type(value) in (list, tuple):
            return type(value)(map(self._constants, value))
        return value

    def _ruled(self, func: Callable[..., Any], name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Call a function by its rule; functions without one keep autograd's own derivative."""
        if name in ("float", "half", "bfloat16"):
            return args[0]
        if name in RULES:
            return RULES[name](self, *args, **kwargs)
        if name.rstrip("_") in ACTIVATIONS:
            return self._activation(func, args, kwargs)
        if name.removeprefix("special_").rstrip("_") in OPERATORS:
            return self.hold(func(*args, **kwargs))
        if name in ELEMENTWISE_PRODUCTS and len(args) == 2:
            args = self._without_gates(args)
        if name in ("max", "min", "topk", "sort") and (len(args) > 1 or kwargs):
            return self._selection(func, args, kwargs)
        return func(*args, **kwargs)

    def _activation(self, func: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]) -> Tensor:
        u, rest = args[0], args[1:]
        kept = {k: v for k, v in kwargs.items() if k != "inplace"}
        with torch.no_grad():
            value, small = func(u.clone(), *rest, **kept), torch.full_like(u, -1e-30)
            gate = torch.where(u == 0, func(small.clone(), *rest, **kept) / small, value / u)
        gated = u * self.hold(gate)
        gated.is_gated = True
        return gated

    def _without_gates(self, args: list[Any]) -> list[Any]:
        """Hold the activated one of two factors, as in silu(a)·b."""
        gated = [is_gated(a) for a in args]
        if sum(gated) == 1 and all(isinstance(a, Tensor) and a.requires_grad for a in args):
            return [self.hold(a) if g else a for a, g in zip(args, gated, strict=True)]
        return args

    def _selection(self, func: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]) -> Any:
        dim = kwargs.get("dim", args[1] if len(args) > 1 and func.__name__ != "topk" else -1)
        found = func(*args, **kwargs)
        if isinstance(found, Tensor):
            first = self.hold(found == args[0])
            return torch.where(first, args[0], args[1])
        indices = self.hold(found.indices)
        dropped = indices.ndim < args[0].ndim
        values = args[0].gather(dim, indices.unsqueeze(dim) if dropped else indices)
        return type(found)((values.squeeze(dim) if dropped else values, indices))


def live_tensors(values: Iterable[Any]) -> list[Tensor]:
    """Return the tensors that require a gradient, those in lists too."""
    nested = [live_tensors(v) if isinstance(v, list | tuple) else [v] for v in values]
    return [v for each in nested for v in each if isinstance(v, Tensor) and v.requires_grad]


def is_gated(value: Any) -> bool:
    """Return whether a tensor is an activation, perhaps scaled, which is an operator where it meets a value."""
    return getattr(value, "is_gated", False)


def _widened(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(WIDE[value.dtype]) if value.dtype in WIDE else value
    if isinstance(value, torch.dtype):
        return WIDE.get(value, value)
    if isinstance(value, list | tuple) and any(isinstance(v, Tensor) for v in value):
        return type(value)(map(_widened, value)) if type(value) in (list, tuple) else value
    return value


def _norm(held: Held, x: Tensor, dims: tuple[int, ...], eps: float, centred: bool = True) -> Tensor:
    if centred:
        x = x - x.mean(dims, keepdim=True)
    return x * held.hold((x.detach() ** 2).mean(dims, keepdim=True).add(eps) ** -0.5)


def _affine(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _layer_norm(
    held: Held,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    return _affine(_norm(held, input, tuple(range(-len(normalized_shape), 0)), eps), weight, bias)


def _rms_norm(
    held: Held,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    return _affine(_norm(held, input, tuple(range(-len(normalized_shape), 0)), eps, centred=False), weight, None)


def _attention(
    held: Held,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    assert not (is_causal or dropout_p or enable_gqa), "the truth has no such attention"
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return held.hold(torch.softmax(scores.detach(), -1)) @ value


def _multi_head(held: Held, query: Tensor, key: Tensor, value: Tensor, width: int, heads: int, *args: Any, **_: Any):
    """Self-attention of nn.MultiheadAttention without masks: (tokens, batch, width)."""
    in_weight, in_bias, _, _, _, _, out_weight, out_bias = args[:8]
    weights, biases = in_weight.chunk(3), in_bias.chunk(3)

    def split(x: Tensor, i: int) -> Tensor:
        return F.linear(x, weights[i], biases[i]).unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)

    mixed = _attention(held, split(query, 0), split(key, 1), split(value, 2))
    return F.linear(mixed.permute(2, 0, 1, 3).flatten(-2), out_weight, out_bias), None


def _unit(held: Held, input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, **_: Any) -> Tensor:
    return input * held.hold(1 / input.detach().norm(p, dim, keepdim=True).clamp_min(eps))


def _amax(held: Held, input: Tensor, dim: int | Sequence[int] = (), keepdim: bool = False) -> Tensor:
    winners = input == torch.Tensor.amax(input, dim, keepdim=True)
    share = winners.double() / winners.double().sum(dim, keepdim=True)
    return (input * held.hold(share)).sum(dim, keepdim=keepdim)


def _quotient(held: Held, a: Any, b: Any, **settings: Any) -> Tensor:
    return torch.div(a, held.hold(b) if isinstance(b, Tensor) and b.requires_grad else b, **settings)


def _clamp(held: Held, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    bounded = torch.clamp(input.detach(), *args, **kwargs)
    return torch.where(held.hold(bounded == input), input, held.hold(bounded))


RULES: dict[str, Callable[..., Any]] = {
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "scaled_dot_product_attention": _attention,
    "multi_head_attention_forward": _multi_head,
    "normalize": _unit,
    "amax": _amax,
    "clamp": _clamp,
    **dict.fromkeys(("div", "divide", "true_divide", "__truediv__"), _quotient),
}


def truth(model: nn.Module, images: Tensor, classes: Tensor) -> Tensor | None:
    """Return the effective gradient (B, C, H, W) float64 of the scores of classes (B,), or None where none exists.

    Args:
        model: in evaluation mode and in float64.
        images: (B, C, H, W).
        classes: one class an image.
    """
    generator = torch.Generator().manual_seed(5)
    held = Held()
    x = images.detach().double().requires_grad_()

    def scores(at: Tensor) -> Tensor:
        return held.run(model, at).gather(1, classes[:, None]).sum()

    score = scores(x)
    (gradient,) = torch.autograd.grad(score, x, allow_unused=True) if score.requires_grad else (None,)
    if gradient is None:
        return None
    try:
        for _ in range(2):
            step = torch.randn(x.shape, generator=generator, dtype=torch.float64)
            held.rewind()
            change = (scores((x + step).detach().requires_grad_()) - score).detach()
            size = change.abs() + gradient.norm() * step.norm() / x.numel() ** 0.5 + 0.01 * score.detach().abs()
            if not (change - (gradient * step).sum()).abs() <= AFFINE * size:
                return None
        held.rewind()
    except LeftThePathError:
        return None
    return gradient
