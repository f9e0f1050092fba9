"""linear: the GEMM of both walks and its epilogue in one kernel.

    y[t, o] = row_scale[t] · x_scale[t] · column_scale[o] · Σ_i x[t, i] W[o, i] + bias[o]
    activation:  g = act(y)/y,  y ← g·y, g kept          gate:  y ← y·g
    residual:    y ← y + residual                        squares[t, part] = Σ y[t, o]² over the part's columns
    codes:       e4m3(y / code_scale[t]), beside y or in its place

row_scale is read, or computed from the sums of squares that the writer of x stored (`RowSums`), so that a norm needs no
kernel of its own. Products accumulate in float32, except for e4m3 operands on sm_90, where Triton by default
accumulates in the tensor cores' registers, which have fewer digits; float32 operands are multiplied as IEEE float32 (no
TF32). A gated MLP (`_glu`) has W of 2·O rows, and one program multiplies both halves.

T rows · O out-features · I in-features.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dave_fast.kernels import _launch
from dave_fast.kernels._linear import _linear_kernel
from dave_fast.ops.activation import parts_of
from dave_fast.ops.fp8 import E4M3, Codes, TokenScales
from dave_fast.ops.linear import linear_ref
from dave_fast.ops.norm import RowSums

# Columns whose squares are summed together; a wider tile writes its sum to its first part, and zeros to the others.
PART = 64
# The most rows whose products cannot fill a GPU, as those of a trimmed block: they get narrow tiles and deep steps.
FEW, FEW_PART = 64, 32
# The dtype of stored gates of low-precision operands: at most 1/510 from the true gate, as with bfloat16.
EIGHT_BIT_GATES = {torch.bfloat16: torch.uint8, torch.float8_e4m3fn: torch.uint8}
# PyTorch's own product as a candidate: cuBLAS on NVIDIA GPUs, with epilogues in separate passes.
LIBRARY = _launch.Library("pytorch")


def _configuration(
    tile: tuple[int, int, int],
    warps: int,
    stages: int,
    *,
    tma: bool,
    persistent: bool = False,
    registers: int | None = None,
) -> triton.Config:
    """Return the configuration of a tile (BLOCK_T, BLOCK_O, BLOCK_I)."""
    tiles = dict(zip(("BLOCK_T", "BLOCK_O", "BLOCK_I"), tile, strict=True)) | {"GROUP": 8}
    how = {"DESCRIPTORS": tma, "PERSISTENT": persistent}
    return triton.Config(tiles | how, num_warps=warps, num_stages=stages, maxnreg=registers)


def configurations(
    arch: int, dtype: torch.dtype, *, glu: bool, descriptors: bool, few: bool = False, twice: bool = False
) -> list[triton.Config]:
    """Return the fixed configuration, then the other candidates.

    128×128 tiles in three stages of 64 in-features take 96 KiB: on sm_90 two programs of 128 registers share a
    multiprocessor, and one's epilogue overlaps with the other's product; e4m3 has 128 in-features and half of the
    warps. sm_80 has less shared memory: 32 in-features, four stages. On sm_100 accumulators are not in registers.
    float32 has no tensor cores here and gets smaller tiles, for registers. A gated MLP has two accumulators, each half
    as wide. Few rows cannot fill a GPU: narrow tiles make more programs, and deep steps wait for memory less often.

    Args:
        arch: 80, 90, 100 ...; 0 for the interpreter.
        dtype: of the operands.
        glu: whether W has two halves.
        descriptors: whether the operands' rows start at multiples of 16 bytes, as TMA needs.
        few: whether there are at most FEW rows.
        twice: whether results are stored in two dtypes.
    """
    if arch == 0:
        return [_configuration((64, 64, 32), 4, 1, tma=False)]
    if dtype == torch.float32:
        width = 32 if glu else 64
        return [_configuration((64, width, 32), warps, 2, tma=False) for warps in (8, 4)]
    tma = descriptors and arch >= 90
    width, two = 64 if glu else 128, 128 if arch < 100 else None
    deep, stages = (128 // dtype.itemsize, 3) if arch >= 90 else (64 // dtype.itemsize, 4)
    if few:
        depth = 2 * deep, 4 if arch >= 90 else 3
        return [_configuration((64, n, depth[0]), 4, depth[1], tma=tma) for n in (32, 64)]
    found = [
        _configuration((128, width, deep), 8, stages, tma=tma, registers=two),
        _configuration((128, width, deep), 4, stages, tma=tma),
        _configuration((64, width, deep), 4, 4, tma=tma),
    ]
    # Half of the warps, each with twice the registers, do not spill there.
    if arch < 100 and (dtype.itemsize == 1 or (arch < 90 and not glu)):
        found[:2] = found[1::-1]
    if not glu:
        narrow = _configuration((128, 64, deep), 8 if twice and arch >= 100 else 4, 4, tma=tma)
        # Two stores of a wide tile do not fit the registers (Triton 3.6 spills 160 to 500 bytes).
        found.insert(0 if twice else len(found), narrow)
    if tma and not glu:
        found += [
            _configuration((128, 128, deep), 8, stages, tma=False, registers=two),
            _configuration((128, 128, deep), 8, 4, tma=True, persistent=True),
            _configuration((128, 256, deep), 8, 3, tma=True, persistent=True),
        ]
    return found


def linear_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    row_scale: Tensor | RowSums | None = None,
    activation: str | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    squares: bool = False,
    overwrite: bool = False,
    column_scale: Tensor | None = None,
    x_scale: TokenScales | None = None,
    dtype: torch.dtype | None = None,
    code_scale: TokenScales | None = None,
    wide: bool = True,
) -> Any:
    """Run `linear_ref` in one kernel.

    Args:
        x: (T, I) float32, float16, bfloat16 or e4m3, rows of any stride.
        weight: (O, I) contiguous, what `pack_ref` returned.
        bias: (O,) as `linear_ref`'s.
        row_scale: (T,) float32, or the sums of squares that it is computed from.
        activation: as `linear_ref`'s.
        gate: as `linear_ref`'s.
        residual: as `linear_ref`'s.
        squares: as `linear_ref`'s.
        overwrite: whether y may be written into the residual's memory.
        column_scale: (O,) float32, the scales of an e4m3 weight.
        x_scale: the scales of the rows of an e4m3 x.
        dtype: of y; None takes x's.
        code_scale: scales with which y is stored in e4m3; the result is then `ops.fp8.Codes`.
        wide: with code_scale, whether y itself is stored too.

    Returns:
        As `linear_ref`.
    """
    epilogue: dict[str, Any] = {"activation": activation, "gate": gate, "residual": residual}

    def plain() -> Any:
        scale = row_scale.rstd() if isinstance(row_scale, RowSums) else row_scale
        return linear_ref(x, weight, bias, row_scale=scale, **epilogue, squares=squares)

    if not _launch.covered(x):
        return plain()
    name, glu = ("", 0) if activation is None else parts_of(activation)
    x = x if x.stride(1) == 1 else x.contiguous()
    # The kernel addresses both like y.
    gate, residual = (t if t is None or t.is_contiguous() else t.contiguous() for t in (gate, residual))
    epilogue |= {"gate": gate, "residual": residual}
    (T, I), O = x.shape, weight.shape[0] // (2 if glu else 1)
    aligned = all(t.stride(0) * t.itemsize % 16 == 0 and t.data_ptr() % 16 == 0 for t in (x, weight))
    few, stored = T <= FEW, dtype or x.dtype
    part = FEW_PART if few else PART
    # row_scale, or row_sums with row_parts, count and eps
    factors: tuple[Any, ...] = (row_scale, None, 0, 1, 0.0)
    if isinstance(row_scale, RowSums):
        factors = (None, row_scale.sums, row_scale.sums.shape[1], row_scale.count, row_scale.eps)
    # Whether only the residual follows the product.
    bare = bias is None and row_scale is None and activation is None and gate is None and not squares

    def launch(candidate: Any, *, into: bool = overwrite) -> Any:
        if candidate is LIBRARY:
            return residual.addmm_(x, weight.T) if into and bare and residual is not None else plain()
        y = codes = new_gate = sums = None
        if wide:
            y = residual if into and residual is not None else torch.empty(T, O, dtype=stored, device=x.device)
        if code_scale is not None:
            codes = torch.empty(T, O, dtype=E4M3, device=x.device)
        if activation is not None:
            kept = stored if glu else EIGHT_BIT_GATES.get(x.dtype, stored)
            new_gate = torch.empty(T, O, dtype=kept, device=x.device)
        if squares:
            sums = torch.empty(T, triton.cdiv(O, part), dtype=torch.float32, device=x.device)
        tile = candidate.kwargs
        x_desc = w_desc = None
        if tile["DESCRIPTORS"]:
            x_desc = TensorDescriptor.from_tensor(x, [tile["BLOCK_T"], tile["BLOCK_I"]])
            w_desc = TensorDescriptor.from_tensor(weight, [tile["BLOCK_O"], tile["BLOCK_I"]])
        tiles = triton.cdiv(T, tile["BLOCK_T"]) * triton.cdiv(O, tile["BLOCK_O"])
        grid = min(tiles, _launch.multiprocessors(x.device)) if tile["PERSISTENT"] else tiles
        _linear_kernel[(grid,)](
            *(x, weight, x_desc, w_desc, bias, *factors[:2], column_scale, gate, residual),
            *(y, codes, new_gate, sums, T, O, I, x.stride(0), weight.stride(0), 0 if sums is None else sums.shape[1]),
            *(*factors[2:], *_row_scales(x_scale), *_row_scales(code_scale)),
            ACTIVATION=name or None,
            GLU=glu,
            EXACT=x.dtype == torch.float32,
            PART=part,
            ROW_PARTS=triton.next_power_of_2(factors[2] or 1),
            EVEN_I=I % tile["BLOCK_I"] == 0,
            INTERPRETED=_launch.INTERPRETED,
            **candidate.all_kwargs(),
        )
        result = y if codes is None else Codes(codes, code_scale, stored, y)
        if squares:
            return result, sums
        return result if new_gate is None else (result, new_gate)

    arch, twice = _launch.architecture(x.device), code_scale is not None and wide
    found: list[_launch.Candidate] = [
        *configurations(arch, x.dtype, glu=bool(glu), descriptors=aligned, few=few, twice=twice)
    ]
    if x.dtype in (torch.bfloat16, torch.float16) and code_scale is None and (few or bare):
        found.append(LIBRARY)
    operands = {"gate": gate, "residual": residual, "bias": bias, "row_scale": factors[0], "row_sums": factors[1]}
    options = {"squares": squares, "codes": code_scale is not None, "wide": twice}
    words = [word for word, operand in operands.items() if operand is not None]
    words += [word for word, on in options.items() if on] + [activation] * (activation is not None)
    problem = f"linear {str(x.dtype)[6:]} O={O} I={I} {' '.join(words)}"
    return _launch.run(problem, T, x.device, found, launch, trial=partial(launch, into=False))


def _row_scales(scales: TokenScales | None) -> tuple[float | int | None, ...]:
    """Return (lead, rest, tokens, read), the kernel's arguments for static scales of rows; None each without."""
    return (None,) * 4 if scales is None else (scales.lead, scales.rest, scales.tokens, scales.read)
