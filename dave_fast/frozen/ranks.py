"""Names and ranks under frozen operators: one name for each torch function, one rank for each tensor."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Any

from torch import Tensor


class Rank(IntEnum):
    """The rank of a tensor that depends on the input: see `dave_fast/frozen/mode.py`."""

    VALUE = 0
    ACTIVATION = 1
    OPERATOR = 2


def rank_of(tensor: Tensor) -> Rank:
    """Return the rank of a tensor: VALUE unless a rule has marked it."""
    return getattr(tensor, "_dave_fast_rank", Rank.VALUE)


def set_rank(tensor: Tensor, rank: Rank) -> Tensor:
    """Mark a tensor with its rank, as an attribute of the tensor itself, and return it."""
    if rank is not rank_of(tensor):
        tensor._dave_fast_rank = rank  # type: ignore[attr-defined]
    return tensor


def canonical(func: Callable[..., Any]) -> tuple[str, bool]:
    """Return one name for a function's many spellings and whether it works in place.

    Tensor.__imul__ gives ("mul", True).
    """
    spelled = getattr(func, "__name__", "").split(".")[0]
    name = spelled.strip("_").removeprefix("special_")
    if spelled.startswith("__") and name in _DUNDERS:
        return _DUNDERS[name], name.startswith("i")
    in_place = spelled.endswith("_") and not spelled.startswith("__")
    return _SYNONYMS.get(name, name), in_place


_DUNDERS = {
    **{prefix + name: name for name in ("add", "sub", "mul", "matmul", "pow") for prefix in ("", "r", "i")},
    "truediv": "div",
    "itruediv": "div",
    "div": "div",
    "idiv": "div",
}
_SYNONYMS = {
    "multiply": "mul",
    "divide": "div",
    "true_divide": "div",
    "subtract": "sub",
    "negative": "neg",
    "float_power": "pow",
    "clip": "clamp",
    "expit": "sigmoid",
    "fmax": "maximum",
    "fmin": "minimum",
}

_KEEPS_ACTIVATION = (
    "add sub rsub neg mul div clone contiguous to type type_as float double half bfloat16 dropout feature_dropout view "
    "view_as reshape flatten unflatten transpose permute movedim swapaxes t unsqueeze squeeze expand expand_as get "
    "repeat repeat_interleave broadcast_to reshape_as"
)
# functions of one tensor that return an activation for an activation
KEEPS_ACTIVATION = frozenset(_KEEPS_ACTIVATION.split())

# functions that take only the shape or the type of their second tensor, so that its rank does not matter
TAKES_A_FORM = frozenset({"view_as", "reshape_as", "expand_as", "type_as"})
