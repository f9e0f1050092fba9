"""linear with operands of eight-bit integers, for CPUs that multiply them (VNNI on x86, dot products on Arm).

    x̂[t, i] = s_x[t, g]·q_x    s_x = max|x|/127 of a row's in-features [384 g, 384 (g + 1)), q_x in [-127, 127]
    ŵ[o, i] = s_w[o]·q_w       s_w = max|w|/127 of an out-feature
    y = row_scale ⊙ s_w ⊙ Σ_g s_x·(Σ_{i in g} q_x q_w) + bias, and the epilogues of `ops.linear`, in float32

Sums inside of a group are integers, and those over groups float32 in a fixed order, so that the products have the same
bits in any batch, with any number of threads and in every instruction set. Why 384: docs/design.md.

T rows (tokens) · I in-features · O out-features.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dave_fast.ops.activation import GATES, activate_ref
from dave_fast.ops.linear import NativeWeight, linear_native, linear_ref, pack_panels, row_squares
from dave_fast.ops.precision import statistics_dtype

# In-features that share a scale: scale_group of csrc/linear.h.
GROUP = 384
LARGEST = 127.0
# The largest magnitude whose inverse would overflow; what is smaller becomes zero.
SMALLEST = 2.0**-100


class Int8Weight(NamedTuple):
    """A weight in eight-bit integers.

    Attributes:
        codes: (O, I) int8, from -127 to 127.
        scale: (O,) float32, multiplies each row of the codes.
    """

    codes: Tensor
    scale: Tensor


def pack_int8_ref(matrix: Tensor) -> Int8Weight:
    """Return matrix (O, I) of any floating dtype in eight bits, with one scale an out-feature."""
    codes, scale = quantise(matrix.float())
    return Int8Weight(codes.to(torch.int8), scale)


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return integers (..., I) in float32 and the scale (...) of each row of x (..., I) float32.

    The scale of a row with NaN or infinity is NaN.
    """
    largest = x.abs().amax(-1)
    finite = largest.isfinite()
    scale = (largest / largest.new_full((), LARGEST)).where(finite, torch.nan)
    inverse = (largest.new_full((), LARGEST) / largest).where(finite & (largest >= SMALLEST), 0.0)[..., None]
    return (x * inverse).round().where(inverse != 0, 0.0), scale


def linear_int8_ref(
    x: Tensor,
    weight: Any,
    bias: Tensor | None = None,
    *,
    row_scale: Tensor | None = None,
    activation: str | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    squares: bool = False,
    overwrite: bool = False,
) -> Any:
    """Return `linear_ref` with operands of eight bits; C++ has the same bits but for activations.

    Args:
        x: (T, I) bfloat16 or float32, or float64, for which the same integers are scaled and summed in float64.
        weight: what `pack_int8_ref` returned, or `pack_ref` for a product in bfloat16.
        bias: (O,) as `linear_ref`'s.
        row_scale: (T,) float32.
        activation: as `linear_ref`'s.
        gate: (T, O) bfloat16 or float32.
        residual: (T, O) bfloat16 or float32.
        squares: as `linear_ref`'s.
        overwrite: ignored here; C++ may then write into the residual's memory.

    Returns:
        As `linear_ref`; y is of the residual's dtype, or bfloat16 (float64 for float64) where there is none.
    """
    if not isinstance(weight, Int8Weight):
        # a product that calibration left in bfloat16
        epilogue: Any = {"row_scale": row_scale, "activation": activation, "gate": gate, "residual": residual}
        return linear_ref(x, weight, bias, **epilogue, squares=squares)
    exact = statistics_dtype(x.dtype)
    narrow = torch.float64 if exact == torch.float64 else torch.bfloat16
    y = torch.zeros(len(x), len(weight.codes), dtype=exact)
    for part, codes in zip(x.split(GROUP, 1), weight.codes.split(GROUP, 1), strict=True):
        integers, scale = quantise(part.float())
        product = (integers.double() @ codes.double().T).to(exact)
        y = fused(product, scale[:, None], y) if exact == torch.float32 else y + product * scale[:, None]
    y = y * weight.scale
    if row_scale is not None:
        y = y * row_scale[:, None]
    if bias is not None:
        y = y + bias.to(exact)
    if activation is not None:
        # the two halves of a gated MLP are stored before they are combined
        made, new_gate = activate_ref(y if activation in GATES else y.to(narrow), activation)
        return made.to(narrow), new_gate.to(narrow)
    if gate is not None:
        y = y * gate.to(exact)
    if residual is not None:
        y = y + residual.to(exact)
    y = y.to(narrow if residual is None else residual.dtype)
    return (y, row_squares(y)) if squares else y


def fused(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Return a·b + c of float32 tensors rounded once to float32, as a fused multiply-add.

    The product of two float32 numbers is exact in float64. Its sum with c is rounded to odd there, which makes the
    second rounding that of the exact sum.
    """
    product, c = a.double() * b.double(), c.double()
    total = product + c
    # what the addition lost (Knuth's two-sum)
    other = total - product
    lost = (product - (total - other)) + (c - other)
    bits = total.contiguous().view(torch.int64)
    towards = torch.where((lost > 0) == (total > 0), 1, -1)
    odd = torch.where((lost != 0) & total.isfinite() & (bits % 2 == 0), bits + towards, bits)
    return odd.view(torch.float64).float()


def in_integers(weight: Any) -> bool:
    """Return whether a packed weight is in eight-bit integers."""
    return isinstance(weight, Int8Weight) or (isinstance(weight, NativeWeight) and weight.operand == "int8")


def rounding(x: Tensor) -> Tensor:
    """Return what an operand x (T, I) loses as integers, float32."""
    parts = []
    for part in x.float().split(GROUP, 1):
        integers, scale = quantise(part)
        parts.append(part - integers * scale[:, None])
    return torch.cat(parts, dim=1)


def pack_int8_native(matrix: Tensor) -> NativeWeight:
    """Return matrix (O, I) in eight bits in panels for C++."""
    return pack_panels(matrix, "int8")


linear_int8_native = linear_native
