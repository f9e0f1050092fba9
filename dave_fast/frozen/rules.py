"""The frozen form of each torch function: one table from its name to its rule.

A rule is `rule(operator, func, args, kwargs) -> result`; `operator(tensor)` makes a constant of a tensor that the input
chose, and a result of `NotImplemented` means that the function runs as it is. Once the operators are constants, every
result is linear in the arguments of the lowest rank; the affine replay runs these same lines with recorded operators.
The frozen forms are those of DAVE, arXiv 2602.06613, Eq. 3-5; gated products and selections are added here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dave_fast.frozen.ranks import Rank, rank_of, set_rank

Operator = Callable[[Tensor], Tensor]
Function = Callable[..., Any]
Rule = Callable[[Operator, Function, Sequence[Any], dict[str, Any]], Any]

# gates act(u)/u are taken here for smaller |u|; negative, so that activations with a kink get ReLU's 0
_TINY = -1e-30


def _rows(names: str, rule: Rule) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


def _wide(x: Tensor) -> Tensor:
    """Return x in at least float32, so that gates and norm scales of half precision are not rounded twice."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _live(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _bind(names: str, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return arguments by name, None where one was not given."""
    order = names.split()
    return {**dict.fromkeys(order), **dict(zip(order, args, strict=False)), **kwargs}


def _gate(operator: Operator, func: Function, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """Write act(u) as gate·u with gate = act(u)/u, at u = 0 its limit."""
    given = dict(kwargs)
    u = args[0] if args else given.pop("input")
    wide = _wide(u.detach())
    rest = [_wide(a) if isinstance(a, Tensor) else a for a in args[1:]]
    safe = torch.where(wide.abs() < -_TINY, _TINY, wide)
    # func may work in place
    gate = operator(func(safe.clone(), *rest, **given) / safe)
    return set_rank((u * gate).to(u.dtype), Rank.ACTIVATION)


def _operator(operator: Operator, func: Function, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Mark a nonlinearity without a gate; the product in which it meets a value detaches it."""
    result = func(*args, **kwargs)
    for tensor in result if isinstance(result, tuple) else (result,):
        set_rank(tensor, Rank.OPERATOR)
    return result


def _var_mean(operator: Operator, func: Function, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    spread, mean = func(*args, **kwargs)
    return set_rank(spread, Rank.OPERATOR), mean


def _power(operator: Operator, func: Function, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Freeze x^p: negative and fractional p are operators; a whole power a^n of an activation is a^(n−1) times a."""
    base, exponent = args[0], args[1] if len(args) > 1 else kwargs.get("exponent", 2)
    if not _live(base) or isinstance(exponent, Tensor) or exponent < 1 or exponent != int(exponent):
        return _operator(operator, func, args, kwargs)
    if exponent > 1 and rank_of(base) == Rank.ACTIVATION:
        return set_rank(base * operator(base.detach() ** (exponent - 1)), Rank.ACTIVATION)
    return NotImplemented


def _product(addend: int | None = None, addend_name: str = "", rank: Rank | None = Rank.VALUE) -> Rule:
    """Return the rule of a product, which freezes the factors above the lowest rank.

    Args:
        addend: position of the argument that is added and not multiplied.
        addend_name: its name, where it is given by keyword.
        rank: of the result; None for the rank of the lowest factor.
    """

    def rule(operator: Operator, func: Function, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        slots: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        factors = [k for k, v in slots.items() if _live(v) and k not in (addend, addend_name)]
        if len(factors) < 2:
            return NotImplemented
        lowest = _freeze_above_lowest(operator, slots, factors)
        given = [slots[i] for i in range(len(args))]
        result = func(*given, **{name: slots[name] for name in kwargs})
        return set_rank(result, lowest if rank is None else rank)

    return rule


def _freeze_above_lowest(operator: Operator, slots: Any, factors: Sequence[Any]) -> Rank:
    """Replace each factor of `slots` above the lowest rank by an operator and return the lowest rank."""
    lowest = min(rank_of(slots[k]) for k in factors)
    for k in factors:
        if rank_of(slots[k]) > lowest:
            # a copy, since the product may be written into its first factor
            slots[k] = operator(slots[k]).clone()
    return lowest


def _einsum(operator: Operator, func: Function, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    equation, *operands = args
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    factors = [i for i, x in enumerate(operands) if _live(x)]
    if len(factors) < 2:
        return NotImplemented
    _freeze_above_lowest(operator, operands, factors)
    return func(equation, operands, **kwargs)


def _second_is_operator(names: str) -> Rule:
    """Return the rule of functions linear in the first argument and chosen by the second: quotients, grid sampling."""

    def rule(operator: Operator, func: Function, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        given = {k: v for k, v in kwargs.items() if k in names.split()}
        first, second = _bind(names, args[:2], given).values()
        if not _live(second):
            return NotImplemented
        if not _live(first):
            return _operator(operator, func, args, kwargs)
        rest = {k: v for k, v in kwargs.items() if k not in names.split()}
        return set_rank(func(first, operator(second), *args[2:], **rest), rank_of(first))

    return rule


def _normalised(operator: Operator, x: Tensor, dims: Sequence[int], eps: float, centred: bool = True) -> Tensor:
    """Return (x − mean x)·r with r = 1/√(var x + eps) frozen; the mean stays linear."""
    x = _wide(x)
    if centred:
        x = x - x.mean(tuple(dims), keepdim=True)
    return x * operator(torch.rsqrt(x.detach().square().mean(tuple(dims), keepdim=True) + eps))


def _scaled(y: Tensor, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).to(dtype)


def _layer_norm(operator: Operator, func: Function, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    a = _bind("input normalized_shape weight bias eps", args, kwargs)
    dims = range(-len(a["normalized_shape"]), 0)
    y = _normalised(operator, a["input"], dims, 1e-5 if a["eps"] is None else a["eps"])
    return _scaled(y, a["weight"], a["bias"], a["input"].dtype)


def _rms_norm(operator: Operator, func: Function, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    a = _bind("input normalized_shape weight eps", args, kwargs)
    x, dims = a["input"], range(-len(a["normalized_shape"]), 0)
    eps = torch.finfo(x.dtype).eps if a["eps"] is None else a["eps"]
    return _scaled(_normalised(operator, x, dims, eps, centred=False), a["weight"], None, x.dtype)


def _first_of(rule: Rule, n: int) -> Rule:
    """Return the rule of a native entry point, whose statistics behind the output are None: no caller reads them."""

    def native(operator: Operator, func: Function, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        return (rule(operator, func, args, kwargs), *(None,) * (n - 1))

    return native


def _group_norm(operator: Operator, func: Function, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    a = _bind("input num_groups weight bias eps", args, kwargs)
    x = a["input"]
    grouped = x.reshape(x.shape[0], a["num_groups"], -1)
    y = _normalised(operator, grouped, (-1,), 1e-5 if a["eps"] is None else a["eps"]).reshape(x.shape)
    weight, bias = (p if p is None else p.view(-1, *(1,) * (x.ndim - 2)) for p in (a["weight"], a["bias"]))
    return _scaled(y, weight, bias, x.dtype)


def _instance_norm(operator: Operator, func: Function, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    a = _bind("input weight bias running_mean running_var use_input_stats momentum eps", args, kwargs)
    if not a["use_input_stats"]:
        return NotImplemented
    groups = (a["input"], a["input"].shape[1], a["weight"], a["bias"], a["eps"])
    return _group_norm(operator, func, groups, {})


def _batch_norm(operator: Operator, func: Function, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Write out batch norm with running statistics, which is linear.

    PyTorch 2.15's own backward pass on CPUs is wrong for a cotangent that is laid out channels last, as
    x.flatten(2).transpose(1, 2) makes one.
    """
    a = _bind("input weight bias running_mean running_var training momentum eps", args, kwargs)
    if a["training"] or a["running_var"] is None:
        return NotImplemented
    x, shape = a["input"], (-1, *(1,) * (a["input"].ndim - 2))
    mean, variance = (_wide(a[k]).view(shape) for k in ("running_mean", "running_var"))
    weight, bias = (p if p is None else p.view(shape) for p in (a["weight"], a["bias"]))
    return _scaled((_wide(x) - mean) * torch.rsqrt(variance + a["eps"]), weight, bias, x.dtype)


def _attention(operator: Operator, func: Function, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Freeze P of P·v: with q, k and the mask constant, the fused kernel's own backward pass is Pᵀg for v."""
    names = "query key value attn_mask"
    bound = _bind(names, args[:4], {k: v for k, v in kwargs.items() if k in names.split()})
    value = bound.pop("value")
    if not _live(value):
        return _operator(operator, func, args, kwargs)
    query, key, mask = (operator(x) if _live(x) else x for x in bound.values())
    rest = {k: v for k, v in kwargs.items() if k not in names.split()}
    return set_rank(func(query, key, value, mask, *args[4:], **rest), rank_of(value))


def _glu(operator: Operator, func: Function, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    a = _bind("input dim", args, kwargs)
    value, gate = a["input"].chunk(2, dim=-1 if a["dim"] is None else a["dim"])
    gated: Tensor = value * operator(torch.sigmoid(gate))
    return gated


def _clamp(operator: Operator, func: Function, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """Keep the value inside the bounds and a constant outside; the mask is an operator."""
    x = args[0]
    clamped = func(x.detach().clone(), *args[1:], **kwargs)
    return torch.where(operator(clamped == x), x, operator(clamped))


def _larger(operator: Operator, func: Function, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    a, b = args[0], args[1] if len(args) > 1 else kwargs["other"]
    return torch.where(operator(func(a, b) == a), a, b)


def _extreme_mean(operator: Operator, func: Function, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Write amax or amin as the mean of the winners, among which autograd divides the gradient too."""
    a = _bind("input dim keepdim", args, kwargs)
    dim = () if a["dim"] is None else a["dim"]
    winners = (a["input"] == func(a["input"], dim, True)).to(a["input"].dtype)
    dims = dim if dim != () else tuple(range(a["input"].ndim))
    share = operator(winners / winners.sum(dims, keepdim=True))
    result: Tensor = (a["input"] * share).sum(dims, keepdim=bool(a["keepdim"]))
    return result


def _select(default_dim: int | None, position: int) -> Rule:
    """Return the rule of functions with (values, indices): the indices are an operator, the values are gathered."""

    def rule(operator: Operator, func: Function, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        dim = kwargs.get("dim", args[position] if len(args) > position else default_dim)
        if isinstance(dim, Tensor) or "other" in kwargs:
            return _larger(operator, func, args, kwargs)
        if dim is None or isinstance(dim, bool):
            return NotImplemented
        found = func(*args, **kwargs)
        indices = operator(found.indices)
        dropped = indices.ndim < args[0].ndim
        values = args[0].gather(dim, indices.unsqueeze(dim) if dropped else indices)
        return type(found)((values.squeeze(dim) if dropped else values, indices))

    return rule


def _max_pool(operator: Operator, func: Function, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    settings = {k: v for k, v in kwargs.items() if k != "return_indices"}
    _, indices = torch._C._nn.max_pool2d_with_indices(*args, **settings)
    indices = operator(indices)
    pooled: Tensor = args[0].flatten(-2).gather(-1, indices.flatten(-2))
    return pooled.view_as(indices)


_ACTIVATIONS = (
    "relu relu6 leaky_relu prelu elu selu celu gelu silu mish hardswish hardtanh tanh softshrink hardshrink abs"
)
_OPERATORS = (
    "softmax softmin sigmoid hardsigmoid log_sigmoid softplus exp exp2 expm1 log log2 log10 log1p sin cos tan erf erfc "
    "sqrt rsqrt reciprocal var std norm linalg_norm linalg_vector_norm linalg_matrix_norm frobenius_norm "
    "cosine_similarity cdist dist sign round floor ceil logsumexp"
)

RULES: dict[str, Rule] = {
    **_rows(_ACTIVATIONS, _gate),
    **_rows(_OPERATORS, _operator),
    **_rows("var_mean std_mean", _var_mean),
    **_rows("pow square", _power),
    "mul": _product(rank=None),
    **_rows("matmul mm bmm mv dot inner outer kron tensordot", _product()),
    **_rows("linear conv1d conv2d conv3d", _product(2, "bias")),
    **_rows("addmm baddbmm addbmm addcmul addmv", _product(0, "input")),
    "einsum": _einsum,
    "div": _second_is_operator("input other"),
    "grid_sampler": _second_is_operator("input grid"),
    "layer_norm": _layer_norm,
    "native_layer_norm": _first_of(_layer_norm, 3),
    "rms_norm": _rms_norm,
    "fused_rms_norm": _first_of(_rms_norm, 2),
    "group_norm": _group_norm,
    "instance_norm": _instance_norm,
    "batch_norm": _batch_norm,
    "scaled_dot_product_attention": _attention,
    "glu": _glu,
    **_rows("clamp clamp_min clamp_max", _clamp),
    **_rows("maximum minimum", _larger),
    **_rows("amax amin", _extreme_mean),
    **_rows("max min", _select(None, 1)),
    "topk": _select(-1, 2),
    "sort": _select(-1, 1),
    "max_pool2d": _max_pool,
}
