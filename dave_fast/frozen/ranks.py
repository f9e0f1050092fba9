"""Names and ranks under frozen operators: what a torch function is called, and how far a tensor is from a value."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Any

from torch import Tensor


class Rank(IntEnum):
    """How far a tensor is from a value: see `dave_fast/frozen/mode.py`."""

    VALUE = 0
    ACTIVATION = 1
    OPERATOR = 2


def rank_of(tensor: Tensor) -> Rank:
    """VALUE unless a rule has marked the tensor."""
    return getattr(tensor, "_dave_fast_rank", Rank.VALUE)


def set_rank(tensor: Tensor, rank: Rank) -> Tensor:
    """Mark the tensor; the mark lives and dies with it."""
    if rank is not rank_of(tensor):
        tensor._dave_fast_rank = rank  # type: ignore[attr-defined]
    return tensor


def canonical(func: Callable[..., Any]) -> tuple[str, bool]:
    """One name for a function's many spellings, and whether it works in place: Tensor.__imul__ → ("mul", True)."""
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
# Functions of one tensor through which an activation stays one.
KEEPS_ACTIVATION = frozenset(_KEEPS_ACTIVATION.split())

# Functions that take of their second tensor its shape or its type: its rank is no matter.
TAKES_A_FORM = frozenset({"view_as", "reshape_as", "expand_as", "type_as"})
