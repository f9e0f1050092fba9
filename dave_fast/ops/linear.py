"""linear: the GEMM of both walks, with the epilogues that they need.

    y = row_scale ⊙ (x Wᵀ) + bias            row_scale: the folded norm's 1/σ, one a row
    activation:   gate = act(y)/y,  y ← gate ⊙ y         forward of the MLP's first layer
    gate:         y ← y ⊙ gate                           frozen VJP of the activation
    residual:     y ← y + residual                       the residual stream, or its cotangent
    squares:      Σ y² of each row as well                for the next norm of the stream

T rows (tokens) · I in-features · O out-features.

Every backend is a pair of functions: `pack_<backend>` lays a weight out once, `linear_<backend>` uses it.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dave_fast.errors import BackendError
from dave_fast.ops import _ext, _registry
from dave_fast.ops.activation import GATES, activate_native, activate_ref, widen_gate
from dave_fast.ops.precision import statistics_dtype

# The number of rows that oneDNN packs weights for; the result does not depend on it.
PACK_ROWS = 1024
# Terms that oneDNN sums at once in float32 on CPUs without AVX-512. There its sums of 768 to 4,096 terms have 2.0 to
# 2.3 times the error of MKL's; sums of 384 terms at a time have 1.4 times, in 0.94 of the time (two Zen 3 cores).
SUM_TERMS = 384
# Rows that each thread of the C++ form lays out at most, and the sums of each that it keeps: longest_block, task_panels
# and the widest panel of csrc/linear.cpp.
BLOCK_ROWS, BLOCK_SUMS = 96, 4 * 64


def pack_ref(matrix: Tensor) -> Tensor:
    """Return matrix (O, I), contiguous."""
    return matrix.contiguous()


def linear_ref(
    x: Tensor,
    weight: Any,
    bias: Tensor | None = None,
    *,
    row_scale: Tensor | None = None,
    activation: str | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    squares: bool = False,
) -> Any:
    """Return x Wᵀ with an epilogue.

    Args:
        x: (T, I) operand; float64, float32 or bfloat16; rounded to the weight's dtype.
        weight: what `pack_ref` returned for a matrix (O, I).
        bias: (O,) of the weight's dtype or wider.
        row_scale: (T,) float32 (float64 for float64 operands), multiplies the product before the bias.
        activation: a name of `ops.activation`; the gate is returned too. Not with a gate or a residual.
        gate: (T, O) multiplies the result; a uint8 gate stands for gate/255.
        residual: (T, O) of the weight's dtype or wider, is added to the result.
        squares: whether the sums of squares of the stored y are returned too; not with an activation.

    Returns:
        y (T, O) in the weight's dtype, or a wider residual's; with an activation (y, gate), both (T, O), where a
        backend may store a gate that lies in [0, 1] in eight bits; with squares (y, (T, parts) float32 (float64)),
        partial sums of each row.
    """
    # Scaling the narrow operand costs less than scaling the product, and is what a norm does.
    if row_scale is not None:
        x = _scale_ref(x, row_scale)
    y = F.linear(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype))
    if activation is not None:
        return activate_ref(y, activation)
    if gate is not None:
        y *= widen_gate(gate, y.dtype)
    if residual is not None:
        y = y.add_(residual) if residual.dtype == y.dtype else y + residual
    return (y, row_squares(y)) if squares else y


def row_squares(y: Tensor) -> Tensor:
    """Return the sums of squares (T, 1) of rows y (T, O)."""
    return y.to(statistics_dtype(y.dtype)).square().sum(1, keepdim=True)


def pack_onednn(matrix: Tensor) -> Any:
    """Return matrix (O, I) in oneDNN's blocked layout, in parts along I whose products are summed one after the other.

    Without oneDNN, and in a dtype that it does not pack on this CPU (float64, bfloat16 before AVX-512), the result is a
    plain tensor.
    """
    if _registry.why_not("linear", "onednn", "cpu") is not None or not _packs(matrix.dtype):
        return pack_ref(matrix)
    at_once = SUM_TERMS if matrix.dtype == torch.float32 and before_avx512() else matrix.shape[1]
    parts = matrix.split(at_once, dim=1)
    return tuple(torch.ops.mkldnn._reorder_linear_weight(part.contiguous(), PACK_ROWS) for part in parts)


def before_avx512() -> bool:
    """Return whether this is an x86 CPU without AVX-512, where MKL's float32 products beat oneDNN's (Zen 3)."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return x86 and not torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def _packs(dtype: torch.dtype) -> bool:
    """Return whether oneDNN packs a dtype on this CPU; packing any other raises."""
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def linear_onednn(x: Tensor, weight: Any, bias: Tensor | None = None, **epilogue: Any) -> Any:
    """Run `linear_ref` with weights packed for oneDNN: faster than PyTorch's own GEMM on CPUs, above all in float32."""
    return _linear_packed(x, weight, bias, _scale_ref, activate_ref, **epilogue)


# The operands that C++ multiplies, in the order of Operand in csrc/linear.h.
OPERANDS = ("fp32", "bf16", "int8")


@dataclass(frozen=True)
class NativeWeight:
    """A matrix in the panels of `csrc/linear.h`.

    Attributes:
        words: int32, the packed values.
        operand: one of OPERANDS.
        features: (O, I).
        panel: out-features of a panel.
    """

    words: Tensor
    operand: str
    features: tuple[int, int]
    panel: int

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of products that are added to nothing."""
        return torch.float32 if self.operand == "fp32" else torch.bfloat16


def pack_native(matrix: Tensor) -> Any:
    """Return matrix (O, I), float32 or bfloat16, in panels for C++.

    bfloat16 is packed for oneDNN where the CPU multiplies it in tiles (AMX), which C++ does not; float64 is left to
    PyTorch.
    """
    operand = {torch.float32: "fp32", torch.bfloat16: "bf16"}.get(matrix.dtype)
    if operand is None or (operand == "bf16" and torch.cpu._is_amx_tile_supported()):
        return pack_onednn(matrix)
    return pack_panels(matrix, operand)


def pack_panels(matrix: Tensor, operand: str) -> NativeWeight:
    """Return matrix (O, I) of any floating dtype in panels for C++, rounded to an operand of OPERANDS."""
    native, (outs, ins) = _ext.module(), matrix.shape
    sizes = (OPERANDS.index(operand), outs, ins, native.linear_panel())
    words = torch.empty(native.packed_length(*sizes), dtype=torch.int32)
    wide = matrix.float().contiguous()
    native.pack_linear(_ext.memory(wide), *sizes, _ext.memory(words))
    return NativeWeight(words, operand, (outs, ins), sizes[-1])


def linear_native(
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
    """Run `linear_ref` in C++ on the host, in one pass.

    All arithmetic behind the operands is float32. A row has the same bits in any batch, unlike in MKL's products.

    Args:
        x: (T, I) float32 or bfloat16, whatever the weight is.
        weight: what `pack_native` or `pack_panels` returned.
        bias: (O,) as `linear_ref`'s.
        row_scale: (T,) float32.
        activation: as `linear_ref`'s.
        gate: (T, O) float32, bfloat16 or uint8.
        residual: (T, O) float32 or bfloat16.
        squares: as `linear_ref`'s.
        overwrite: whether y may be written over the residual.

    Returns:
        As `linear_ref`; y is of the residual's dtype, or of the weight's where there is none.

    Raises:
        BackendError: an operand has another dtype or shape than `linear_ref` names: C++ would read past it.
    """
    if not isinstance(weight, NativeWeight):
        epilogue: Any = {"row_scale": row_scale, "activation": activation, "gate": gate, "residual": residual}
        return _linear_packed(x, weight, bias, _scale_native, activate_native, **epilogue, squares=squares)
    (outs, ins), rows = weight.features, len(x)
    # The two halves of a gated MLP are combined in a pass of their own.
    fused = activation if activation in GATES else None
    gate = None if gate is None else widen_gate(gate, weight.dtype)
    _checked("x", x, (rows, ins))
    x = x if x.stride(1) == 1 else x.contiguous()
    operands = [
        None if bias is None else _checked("bias", bias.float(), (outs,)),
        _checked("row_scale", row_scale, (rows,), (torch.float32,)),
        _checked("gate", gate, (rows, outs)),
        _checked("residual", residual, (rows, outs)),
    ]
    y = residual if overwrite and operands[3] is residual else None
    if y is None:
        y = x.new_empty(rows, outs, dtype=weight.dtype if residual is None else residual.dtype)
    new_gate = None if fused is None else torch.empty_like(y)
    _ext.run_native(
        "linear",
        *(_ext.strided(x), rows, x.stride(0)),
        *(weight.words, OPERANDS.index(weight.operand), outs, ins, weight.panel),
        [None if operand is None else _ext.memory(operand) for operand in operands],
        *(-1 if fused is None else list(GATES).index(fused), new_gate, y),
    )
    if activation is not None:
        return (y, new_gate) if fused else activate_native(y, activation)
    return (y, row_squares(y)) if squares else y


def _checked(
    name: str,
    operand: Tensor | None,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16),
) -> Tensor | None:
    """Return an operand for C++, contiguous; raise BackendError for another dtype, shape or device."""
    if operand is None:
        return None
    if operand.dtype not in dtypes or operand.shape != shape or operand.device.type != "cpu":
        raise BackendError(
            f"linear's {name} is {operand.dtype} of {tuple(operand.shape)} on {operand.device}; these weights go with "
            f"{' or '.join(map(str, dtypes))} of {shape} on cpu"
        )
    return operand.contiguous()


def _linear_packed(
    x: Tensor,
    weight: Any,
    bias: Tensor | None,
    scale: Callable[[Tensor, Tensor], Tensor],
    activate: Callable[[Tensor, str], tuple[Tensor, Tensor]],
    *,
    row_scale: Tensor | None = None,
    activation: str | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    squares: bool = False,
) -> Any:
    if isinstance(weight, Tensor):
        epilogue: Any = {"row_scale": row_scale, "activation": activation, "gate": gate, "residual": residual}
        return linear_ref(x, weight, bias, **epilogue, squares=squares)
    if row_scale is not None:
        x = scale(x, row_scale)
    x = x.to(weight[0].dtype)
    bias = None if bias is None else bias.to(x.dtype)
    gate = None if gate is None else widen_gate(gate, x.dtype)
    # a residual of another dtype is added to the rounded product
    alike = residual is not None and residual.dtype == x.dtype
    y = residual if gate is None and alike else None
    *before, last = zip(x.split(weight[0].shape[1], dim=1), weight, strict=True)
    for part, packed in before:
        y = _product(part, packed, None, y, "add")
    if y is None and gate is not None:
        y = _product(*last, bias, gate, "mul")
    else:
        y = _product(*last, bias, y, "add")
        y = y if gate is None else y.mul_(gate)
    if residual is not None and (gate is not None or not alike):
        y = y + residual
    if activation is not None:
        return activate(y, activation)
    return (y, row_squares(y)) if squares else y


def _product(x: Tensor, packed: Tensor, bias: Tensor | None, other: Tensor | None, operation: str) -> Any:
    """Return x Wᵀ + bias, with `operation` ("add" or "mul") applied to another tensor where one is given."""
    pointwise = torch.ops.mkldnn._linear_pointwise
    if other is None:
        return pointwise(x, packed, bias, "none", [], "")
    return pointwise.binary(x, other, packed, bias, operation)


def _scale_ref(x: Tensor, row_scale: Tensor) -> Tensor:
    return (x * row_scale[:, None]).to(x.dtype)


def _scale_native(x: Tensor, row_scale: Tensor) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    _ext.run_native("scale_rows", x, row_scale, *x.shape, y)
    return y
