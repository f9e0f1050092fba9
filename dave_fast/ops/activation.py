"""Activations as gates: act(u) = gate(u)·u, with the gate held constant in the frozen VJP.

gate(u) = act(u)/u, and its limit at u = 0. A gated MLP act(a)·b has the gate act(a) on the value b.
(DAVE, arXiv 2602.06613, Eq. 3-5 for GELU; the other activations follow the same rule.)
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dave_fast.errors import BackendError
from dave_fast.ops import _ext

GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": torch.special.ndtr,
    # ½(1 + tanh z) = sigmoid(2z), which does not cancel for large negative u
    "gelu_tanh": lambda u: torch.sigmoid(2.0 * math.sqrt(2.0 / math.pi) * (u + 0.044715 * u * u * u)),
    "silu": torch.sigmoid,
    "relu": lambda u: (u > 0).to(u.dtype),
    "quick_gelu": lambda u: torch.sigmoid(1.702 * u),
}


def parts_of(activation: str) -> tuple[str, int]:
    """Return the gate's name, and 0 for no gated MLP, 1 for one whose value is u's second half, 2 for its first.

    Raises:
        BackendError: there is no such activation.
    """
    name, glu, order = activation.partition("_glu")
    if name not in GATES or order not in ("", "_last"):
        known = f"{', '.join(GATES)}, and each with _glu or _glu_last behind it"
        raise BackendError(f"there is no activation {activation!r}; known are {known}")
    return name, 0 if not glu else 2 if order else 1


def activate_ref(u: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Return (act(u), gate), both of u's shape and dtype.

    With a name that ends in "_glu" ("silu_glu"), u (..., 2M) is a, then b, and the result is (act(a)·b, act(a)), both
    (..., M); with "_glu_last" u is b, then a.
    """
    name, gated = parts_of(activation)
    if not gated:
        gate = GATES[name](u)
        return gate * u, gate
    a, b = u.chunk(2, dim=-1) if gated == 1 else reversed(u.chunk(2, dim=-1))
    gate = GATES[name](a) * a
    return gate * b, gate


def widen_gate(gate: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a uint8 gate (0 to 255 stand for 0 to 1) in `dtype`, and any other gate unchanged."""
    return gate.to(dtype) / 255 if gate.dtype == torch.uint8 else gate


def activate_native(u: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Run `activate_ref` in C++ on the host, in one pass; float64 is left to PyTorch."""
    if u.dtype == torch.float64:
        return activate_ref(u, activation)
    name, gated = parts_of(activation)
    rows, width = u.shape
    hidden = width // 2 if gated else width
    # A gated MLP's result is narrower than u; any other activation is written over u itself.
    h = u.new_empty(rows, hidden) if gated else u
    gate = u.new_empty(rows, hidden)
    _ext.run_native("activate", u, list(GATES).index(name), gated, rows, hidden, h, gate)
    return h, gate
