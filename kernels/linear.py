"""linear: the GEMM of both walks and its epilogue in one kernel.

    y[t, o] = row_scale[t] · column_scale[o] · Σ_i x[t, i] W[o, i] + bias[o]
    activation:  g = act(y)/y,  y ← g·y, g kept          gate:  y ← y·g
    residual:    y ← y + residual                        squares[t, part] = Σ y[t, o]² over the part's columns

T rows · O out-features · I in-features. Products accumulate in float32; float32 operands are multiplied as IEEE
float32 (no TF32). A gated MLP (`_glu`) has W of 2·O rows: both halves are multiplied by one tile.

Tiles of x and W come through pointers, or through tensor descriptors (TMA) from sm_90 on; a program makes one tile, or
walks over tiles with a stride (persistent).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dave_fast.kernels import _launch
from dave_fast.ops.linear import linear_ref

# columns whose squares are summed together; a wider tile fills the first of its parts, and zeros the others
PART: tl.constexpr = tl.constexpr(64)
# what low-precision operands keep their gates in: 1/510 at most from the true one, as bfloat16
EIGHT_BIT_GATES = {torch.bfloat16: torch.uint8, torch.float8_e4m3fn: torch.uint8}


@triton.jit
def _phi(u):
    """Φ(u) to 7.3e-5 by an odd polynomial of degree 13, exactly 0 and 1 beyond ±3.8: a third of erf's instructions."""
    v = tl.minimum(tl.maximum(u, -3.8), 3.8)
    s = v * v
    p = 3.850931840143552e-08
    p = p * s - 2.3639352338128164e-06
    p = p * s + 6.244880220100117e-05
    p = p * s - 0.0009482466727460911
    p = p * s + 0.00939636095924164
    p = p * s - 0.0658943310229152
    p = p * s + 0.39880382690223
    return tl.minimum(tl.maximum(p * v + 0.5, 0.0), 1.0)


@triton.jit
def _gate(u, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """act(u)/u, and its limit at 0."""
    if ACTIVATION == "gelu":
        g = 0.5 + 0.5 * tl.math.erf(u * 0.7071067811865476) if EXACT else _phi(u)
    elif ACTIVATION == "gelu_tanh":
        g = tl.sigmoid(1.5957691216057308 * (u + 0.044715 * u * u * u))
    elif ACTIVATION == "silu":
        g = tl.sigmoid(u)
    elif ACTIVATION == "quick_gelu":
        g = tl.sigmoid(1.702 * u)
    else:
        tl.static_assert(ACTIVATION == "relu")
        g = tl.where(u > 0, 1.0, 0.0)
    return g


@triton.jit
def _product(
    x, w, x_desc, w_desc, i_t, i_o, T, O, I, stride_x, stride_w,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
    DESCRIPTORS: tl.constexpr, EVEN_I: tl.constexpr, GLU: tl.constexpr,
):  # fmt: skip
    """Σ_i x[t, i] W[o, i] of one tile; with GLU that of W's second half as well."""
    acc = tl.zeros((BLOCK_T, BLOCK_O), dtype=tl.float32)
    second = tl.zeros((BLOCK_T, BLOCK_O), dtype=tl.float32) if GLU else acc
    o_i = tl.arange(0, BLOCK_I)
    if not DESCRIPTORS:
        # rows beyond the last are read as others are, and never stored: no mask in the loop
        o_t = ((i_t * BLOCK_T + tl.arange(0, BLOCK_T)) % T).to(tl.int64)
        o_o = ((i_o * BLOCK_O + tl.arange(0, BLOCK_O)) % O).to(tl.int64)
        p_x = x + o_t[:, None] * stride_x + o_i[None, :]
        p_w = w + o_o[:, None] * stride_w + o_i[None, :]
        p_second = p_w + tl.cast(O, tl.int64) * stride_w
    for i in range(0, I, BLOCK_I):
        if DESCRIPTORS:
            b_x = x_desc.load([i_t * BLOCK_T, i])  # [BLOCK_T, BLOCK_I]
            b_w = w_desc.load([i_o * BLOCK_O, i])  # [BLOCK_O, BLOCK_I]
        elif EVEN_I:
            b_x = tl.load(p_x + i)
            b_w = tl.load(p_w + i)
        else:
            m_i = o_i[None, :] < I - i
            b_x = tl.load(p_x + i, mask=m_i, other=0.0)
            b_w = tl.load(p_w + i, mask=m_i, other=0.0)
        acc = tl.dot(b_x, b_w.T, acc, input_precision="ieee")
        if GLU:
            if DESCRIPTORS:
                b_w = w_desc.load([O + i_o * BLOCK_O, i])
            elif EVEN_I:
                b_w = tl.load(p_second + i)
            else:
                b_w = tl.load(p_second + i, mask=m_i, other=0.0)
            second = tl.dot(b_x, b_w.T, second, input_precision="ieee")
    return acc, second


@triton.jit
def _affine(acc, bias, row_scale, column_scale, t, o, T, O, START):
    """row_scale ⊙ column_scale ⊙ acc + bias, of the columns that start at START."""
    if row_scale is not None:
        acc *= tl.load(row_scale + t, mask=t < T, other=0.0)[:, None]
    if column_scale is not None:
        acc *= tl.load(column_scale + START + o, mask=o < O, other=0.0)[None, :]
    if bias is not None:
        acc += tl.load(bias + START + o, mask=o < O, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def _halves(acc):
    """The left and the right half of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(acc, (acc.shape[0], 2, acc.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _epilogue(
    acc, second, bias, row_scale, column_scale, gate, residual, y, new_gate, squares, i_t, start, T, O, parts,
    BLOCK_T: tl.constexpr, WIDTH: tl.constexpr, ACTIVATION: tl.constexpr, GLU: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """All that follows the product, for WIDTH columns from `start` on, in registers, and the stores."""
    # the tile's corner in 64 bits, what lies in it in 32: offsets are half of the registers here
    corner = (i_t * BLOCK_T).to(tl.int64) * O + start
    at = tl.arange(0, BLOCK_T)[:, None] * O + tl.arange(0, WIDTH)[None, :]
    t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o = start + tl.arange(0, WIDTH)
    m = (t < T)[:, None] & (o < O)[None, :]
    acc = _affine(acc, bias, row_scale, column_scale, t, o, T, O, 0)
    if ACTIVATION is not None:
        if GLU:
            second = _affine(second, bias, row_scale, column_scale, t, o, T, O, O)
            # "_glu" gates with the first half, "_glu_last" with the second
            gated = acc if GLU == 1 else second
            g = _gate(gated, ACTIVATION, EXACT) * gated
            acc = g * (second if GLU == 1 else acc)
        else:
            g = _gate(acc, ACTIVATION, EXACT)
            acc *= g
        if new_gate.dtype.element_ty == tl.uint8:
            g = g * 255.0 + 0.5
        # read again in the VJP alone: it shall not push the stream out of the L2
        tl.store(new_gate + corner + at, g.to(new_gate.dtype.element_ty), mask=m, eviction_policy="evict_first")
    if gate is not None:
        g = tl.load(gate + corner + at, mask=m, other=0, eviction_policy="evict_first").to(tl.float32)
        acc *= g * (1 / 255) if gate.dtype.element_ty == tl.uint8 else g
    if residual is not None:
        acc += tl.load(residual + corner + at, mask=m, other=0.0).to(tl.float32)
    stored = acc.to(y.dtype.element_ty)
    tl.store(y + corner + at, stored, mask=m)
    if squares is not None:
        kept = tl.where(m, stored.to(tl.float32), 0.0)
        part = tl.arange(0, WIDTH // PART)
        sums = tl.where(part[None, :] == 0, tl.sum(kept * kept, 1)[:, None], 0.0)
        part += start // PART
        tl.store(
            squares + t.to(tl.int64)[:, None] * parts + part[None, :],
            sums,
            mask=(t < T)[:, None] & (part < parts)[None, :],
        )


@triton.jit
def _linear_kernel(
    x, w, x_desc, w_desc, bias, row_scale, column_scale, gate, residual, y, new_gate, squares,
    T, O, I, stride_x, stride_w, parts,
    ACTIVATION: tl.constexpr, GLU: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, GROUP: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PERSISTENT: tl.constexpr, EVEN_I: tl.constexpr,
):  # fmt: skip
    """The module's formula; one tile [BLOCK_T, BLOCK_O] a program, or every num_programs-th of them."""
    tiles_t, tiles_o = tl.cdiv(T, BLOCK_T), tl.cdiv(O, BLOCK_O)
    tiles = tiles_t * tiles_o
    stop = tiles if PERSISTENT else tl.program_id(0) + 1
    for tile in range(tl.program_id(0), stop, tl.num_programs(0)):
        # GROUP rows of tiles go together, so that tiles of W and x are found in the L2
        first = tile // (GROUP * tiles_o) * GROUP
        high = tl.minimum(tiles_t - first, GROUP)
        i_t = first + tile % (GROUP * tiles_o) % high
        i_o = tile % (GROUP * tiles_o) // high
        acc, second = _product(
            x, w, x_desc, w_desc, i_t, i_o, T, O, I, stride_x, stride_w,
            BLOCK_T, BLOCK_O, BLOCK_I, DESCRIPTORS, EVEN_I, GLU,
        )  # fmt: skip
        if BLOCK_O > PART:
            # one half after the other: what an epilogue holds beside the product fits the registers
            acc, right = _halves(acc)
            second, second_right = _halves(second)
            _epilogue(
                right, second_right, bias, row_scale, column_scale, gate, residual, y, new_gate, squares,
                i_t, i_o * BLOCK_O + BLOCK_O // 2, T, O, parts, BLOCK_T, BLOCK_O // 2, ACTIVATION, GLU, EXACT,
            )  # fmt: skip
        _epilogue(
            acc, second, bias, row_scale, column_scale, gate, residual, y, new_gate, squares,
            i_t, i_o * BLOCK_O, T, O, parts, BLOCK_T, acc.shape[1], ACTIVATION, GLU, EXACT,
        )  # fmt: skip


def _configuration(
    block_t: int,
    block_o: int,
    block_i: int,
    warps: int,
    stages: int,
    *,
    descriptors: bool,
    persistent: bool = False,
    registers: int | None = None,
) -> triton.Config:
    tiles = {"BLOCK_T": block_t, "BLOCK_O": block_o, "BLOCK_I": block_i, "GROUP": 8}
    how = {"DESCRIPTORS": descriptors, "PERSISTENT": persistent}
    return triton.Config(tiles | how, num_warps=warps, num_stages=stages, maxnreg=registers)


def configurations(arch: int, dtype: torch.dtype, *, glu: bool, descriptors: bool) -> list[triton.Config]:
    """The fixed configuration, then the other candidates.

    descriptors: whether the operands' rows start at multiples of 16 bytes, as TMA needs.

    128×128 tiles in three stages of 64 in-features take 96 KiB: on sm_90 two programs of 128 registers share a
    multiprocessor, and one's epilogue hides behind the other's product; e4m3 has 128 in-features and half of the
    warps, each with twice the registers. sm_80 has less shared memory: 32 in-features, four stages. On sm_100
    accumulators have a memory of their own. float32 has no tensor cores here: smaller tiles, for registers. A gated
    MLP has two accumulators, each half as wide.
    """
    if arch == 0:
        return [_configuration(64, 64, 32, 4, 1, descriptors=False)]
    if dtype == torch.float32:
        width = 32 if glu else 64
        return [_configuration(64, width, 32, warps, 2, descriptors=False) for warps in (8, 4)]
    tma = descriptors and arch >= 90
    width, two = 64 if glu else 128, 128 if arch < 100 else None
    deep, stages = (128 // dtype.itemsize, 3) if arch >= 90 else (64 // dtype.itemsize, 4)
    found = [
        _configuration(128, width, deep, 8, stages, descriptors=tma, registers=two),
        _configuration(128, width, deep, 4, stages, descriptors=tma),
        _configuration(64, width, deep, 4, 4, descriptors=tma),
    ]
    if dtype.itemsize == 1 and arch < 100:
        found[:2] = found[1::-1]
    if not glu:
        found.append(_configuration(128, 64, deep, 4, 4, descriptors=tma))
    if tma and not glu:
        found += [
            _configuration(128, 128, deep, 8, stages, descriptors=False, registers=two),
            _configuration(128, 128, deep, 8, 4, descriptors=True, persistent=True),
            _configuration(128, 256, deep, 8, 3, descriptors=True, persistent=True),
        ]
    return found


def pack_triton(matrix: Tensor) -> Tensor:
    """matrix (O, I) as it is, contiguous: both operands have their in-features side by side."""
    return matrix.contiguous()


def linear_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    row_scale: Tensor | None = None,
    activation: str | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    squares: bool = False,
    column_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """As `linear_ref`; float32, float16, bfloat16 and e4m3 operands, rows of x with any stride.

    column_scale: (O,) float32, multiplies the product's columns: the scale of eight-bit weights. dtype: of y, x's by
    default.
    """
    if not _launch.covered(x):
        epilogue = {"row_scale": row_scale, "activation": activation, "gate": gate, "residual": residual}
        return linear_ref(x, weight, bias, **epilogue, squares=squares)
    name, _, order = (activation or "").partition("_glu")
    glu = 0 if activation is None or "_glu" not in activation else 2 if order else 1
    x = x if x.stride(1) == 1 else x.contiguous()
    (T, I), O = x.shape, weight.shape[0] // (2 if glu else 1)
    y = torch.empty(T, O, dtype=dtype or x.dtype, device=x.device)
    new_gate = sums = None
    if activation is not None:
        new_gate = torch.empty_like(y, dtype=None if glu else EIGHT_BIT_GATES.get(x.dtype))
    if squares:
        sums = torch.empty(T, triton.cdiv(O, PART.value), dtype=torch.float32, device=x.device)
    aligned = all(t.stride(0) * t.itemsize % 16 == 0 and t.data_ptr() % 16 == 0 for t in (x, weight))

    def launch(configuration: Any) -> None:
        tile = configuration.kwargs
        x_desc = w_desc = None
        if tile["DESCRIPTORS"]:
            x_desc = TensorDescriptor.from_tensor(x, [tile["BLOCK_T"], tile["BLOCK_I"]])
            w_desc = TensorDescriptor.from_tensor(weight, [tile["BLOCK_O"], tile["BLOCK_I"]])
        tiles = triton.cdiv(T, tile["BLOCK_T"]) * triton.cdiv(O, tile["BLOCK_O"])
        grid = min(tiles, _launch.multiprocessors(x.device)) if tile["PERSISTENT"] else tiles
        _linear_kernel[(grid,)](
            *(x, weight, x_desc, w_desc, bias, row_scale, column_scale, gate, residual, y, new_gate, sums),
            *(T, O, I, x.stride(0), weight.stride(0), 0 if sums is None else sums.shape[1]),
            ACTIVATION=name or None,
            GLU=glu,
            EXACT=x.dtype == torch.float32,
            EVEN_I=I % tile["BLOCK_I"] == 0,
            **configuration.all_kwargs(),
        )

    found = configurations(_launch.architecture(x.device), x.dtype, glu=bool(glu), descriptors=aligned)
    epilogue = {
        "scale": row_scale,
        "gate": gate,
        "residual": residual,
        "squares": squares or None,
        "TMA": aligned or None,
    }
    named = [activation, *(name for name, value in epilogue.items() if value is not None)]
    dtype = str(x.dtype).removeprefix("torch.")
    _launch.run(f"linear {dtype} O={O} I={I} {' '.join(filter(None, named))}", T, x.device, found, launch)
    if squares:
        return y, sums
    return y if new_gate is None else (y, new_gate)
