"""The kernel of `linear` (see `kernels/linear.py` for what it computes and how tiles are chosen).

Tiles of x and W are loaded by pointers, or by tensor descriptors (TMA) from sm_90 on; a program computes one tile, or
(persistent) every num_programs-th.
"""

import triton
import triton.language as tl


@triton.jit
def _phi(u):
    """Return Φ(u) to 7.3e-5 by an odd polynomial of degree 13, exactly 0 and 1 beyond ±3.8.

    It takes a third of erf's instructions.
    """
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
    """Return act(u)/u, and its limit at 0."""
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
    """Return Σ_i x[t, i] W[o, i] of one tile, and with GLU that of W's second half."""
    acc = tl.zeros((BLOCK_T, BLOCK_O), dtype=tl.float32)
    second = tl.zeros((BLOCK_T, BLOCK_O), dtype=tl.float32) if GLU else acc
    o_i = tl.arange(0, BLOCK_I)
    if not DESCRIPTORS:
        # Rows beyond the last wrap around, and are never stored, so that the loop needs no mask.
        o_t = ((i_t * BLOCK_T + tl.arange(0, BLOCK_T)) % T).to(tl.int64)
        o_o = ((i_o * BLOCK_O + tl.arange(0, BLOCK_O)) % O).to(tl.int64)
        p_x = x + o_t[:, None] * stride_x + o_i[None, :]
        p_w = w + o_o[:, None] * stride_w + o_i[None, :]
        p_second = p_w + tl.cast(O, tl.int64) * stride_w
    for i in range(0, I, BLOCK_I):
        m_i = None if EVEN_I else o_i[None, :] < I - i
        if DESCRIPTORS:
            b_x = x_desc.load([i_t * BLOCK_T, i])  # [BLOCK_T, BLOCK_I]
            b_w = w_desc.load([i_o * BLOCK_O, i])  # [BLOCK_O, BLOCK_I]
        else:
            b_x = tl.load(p_x + i, mask=m_i, other=None if EVEN_I else 0.0)
            b_w = tl.load(p_w + i, mask=m_i, other=None if EVEN_I else 0.0)
        acc = tl.dot(b_x, b_w.T, acc, input_precision="ieee")
        if GLU:
            if DESCRIPTORS:
                b_w = w_desc.load([O + i_o * BLOCK_O, i])
            else:
                b_w = tl.load(p_second + i, mask=m_i, other=None if EVEN_I else 0.0)
            second = tl.dot(b_x, b_w.T, second, input_precision="ieee")
    return acc, second


@triton.jit
def _row_scale(
    row_scale, row_sums, x_scales, start, T, row_parts, count, eps, BLOCK_T: tl.constexpr, ROW_PARTS: tl.constexpr
):
    """Return the factors of BLOCK_T rows, given or computed from partial sums of squares, or None."""
    t = start + tl.arange(0, BLOCK_T)
    if row_sums is not None:
        part = tl.arange(0, ROW_PARTS)
        m = (t < T)[:, None] & (part < row_parts)[None, :]
        b_sums = tl.load(row_sums + t.to(tl.int64)[:, None] * row_parts + part[None, :], mask=m, other=0.0)
        scale = tl.rsqrt(tl.sum(b_sums, 1) / count + eps)
    elif row_scale is not None:
        scale = tl.load(row_scale + t, mask=t < T, other=0.0)
    else:
        scale = None
    x_lead, x_rest, x_tokens, x_read = x_scales
    if x_lead is not None:
        own = tl.where(t % x_tokens < x_read, x_lead, x_rest)
        scale = own if scale is None else scale * own
    return scale


@triton.jit
def encode_e4m3(values, scale, INTERPRETED: tl.constexpr):
    """Return values/scale in e4m3, with NaN beyond its range, where the conversion alone would clip."""
    u = values * (1 / scale)
    u = tl.where(tl.abs(u) <= 448.0, u, float("nan"))
    if INTERPRETED:
        # The interpreter's conversion has no NaN.
        code = tl.where(u == u, nearest_e4m3(u).to(tl.float8e4nv).to(tl.uint8, bitcast=True), 127).to(tl.uint8)
        code = code.to(tl.float8e4nv, bitcast=True)
    else:
        code = u.to(tl.float8e4nv)
    return code


@triton.jit
def nearest_e4m3(u):
    """Return u rounded to e4m3, to nearest even, in float32: the interpreter's conversion drops a mantissa's carry."""
    bits = u.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    # Below 2⁻⁶ e4m3 has steps of 2⁻⁹; adding 1.5·2¹⁴ rounds to them.
    return tl.where(tl.abs(u) < 0.015625, (u + 24576.0) - 24576.0, normal)


@triton.jit
def _affine(acc, bias, scale, column_scale, t, o, T, O, START):
    """Return scale ⊙ column_scale ⊙ acc + bias, of the columns that start at START."""
    if scale is not None:
        acc *= scale[:, None]
    if column_scale is not None:
        acc *= tl.load(column_scale + START + o, mask=o < O, other=0.0)[None, :]
    if bias is not None:
        acc += tl.load(bias + START + o, mask=o < O, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def _halves(acc):
    """Return the left and the right half of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(acc, (acc.shape[0], 2, acc.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _epilogue(
    acc, second, scale, memory, i_t, start, BLOCK_T: tl.constexpr, ACTIVATION: tl.constexpr, GLU: tl.constexpr,
    EXACT: tl.constexpr, PART: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Compute and store the epilogue of acc's columns, from `start` on; `memory` as the kernel makes it."""
    bias, column_scale, gate, residual, y, codes, code_scales, new_gate, squares, T, O, parts = memory
    WIDTH: tl.constexpr = acc.shape[1]
    # 64 bits for the tile's corner, 32 for offsets in it, which take half of the registers here.
    corner = (i_t * BLOCK_T).to(tl.int64) * O + start
    at = tl.arange(0, BLOCK_T)[:, None] * O + tl.arange(0, WIDTH)[None, :]
    t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o = start + tl.arange(0, WIDTH)
    m = (t < T)[:, None] & (o < O)[None, :]
    acc = _affine(acc, bias, scale, column_scale, t, o, T, O, 0)
    if ACTIVATION is not None:
        if GLU:
            second = _affine(second, bias, scale, column_scale, t, o, T, O, O)
            # "_glu" gates with the first half, "_glu_last" with the second.
            gated = acc if GLU == 1 else second
            g = _gate(gated, ACTIVATION, EXACT) * gated
            acc = g * (second if GLU == 1 else acc)
        else:
            g = _gate(acc, ACTIVATION, EXACT)
            acc *= g
        if new_gate.dtype.element_ty == tl.uint8:
            g = g * 255.0 + 0.5
        # The gate is read only in the VJP: the stream should stay in the L2 instead.
        tl.store(new_gate + corner + at, g.to(new_gate.dtype.element_ty), mask=m, eviction_policy="evict_first")
    if gate is not None:
        g = tl.load(gate + corner + at, mask=m, other=0, eviction_policy="evict_first").to(tl.float32)
        acc *= g * (1 / 255) if gate.dtype.element_ty == tl.uint8 else g
    if residual is not None:
        acc += tl.load(residual + corner + at, mask=m, other=0.0).to(tl.float32)
    if codes is not None:
        code_lead, code_rest, code_tokens, code_read = code_scales
        own = tl.where(t % code_tokens < code_read, code_lead, code_rest)[:, None]
        tl.store(codes + corner + at, encode_e4m3(acc, own, INTERPRETED), mask=m)
    if y is not None:
        stored = acc.to(y.dtype.element_ty)
        tl.store(y + corner + at, stored, mask=m)
    if squares is not None:
        kept = tl.where(m, stored.to(tl.float32), 0.0)
        part = tl.arange(0, WIDTH // PART)
        sums = tl.where(part[None, :] == 0, tl.sum(kept * kept, 1)[:, None], 0.0)
        part += start // PART
        p_squares = squares + t.to(tl.int64)[:, None] * parts + part[None, :]
        tl.store(p_squares, sums, mask=(t < T)[:, None] & (part < parts)[None, :])


@triton.jit
def _epilogues(
    acc, second, scale, memory, i_t, start, BLOCK_T: tl.constexpr, ACTIVATION: tl.constexpr, GLU: tl.constexpr,
    EXACT: tl.constexpr, PART: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Compute the epilogue of one half of the columns after the other, so that its operands fit the registers."""
    if acc.shape[1] > (32 if ACTIVATION is not None else PART):
        acc, right = _halves(acc)
        second, second_right = _halves(second)
        _epilogue(
            right, second_right, scale, memory, i_t, start + right.shape[1], BLOCK_T,
            ACTIVATION, GLU, EXACT, PART, INTERPRETED,
        )  # fmt: skip
    _epilogue(acc, second, scale, memory, i_t, start, BLOCK_T, ACTIVATION, GLU, EXACT, PART, INTERPRETED)


@triton.jit
def _linear_kernel(
    x, w, x_desc, w_desc, bias, row_scale, row_sums, column_scale, gate, residual, y, codes, new_gate, squares,
    T, O, I, stride_x, stride_w, parts, row_parts, count, eps, x_lead, x_rest, x_tokens, x_read,
    code_lead, code_rest, code_tokens, code_read,
    ACTIVATION: tl.constexpr, GLU: tl.constexpr, EXACT: tl.constexpr, PART: tl.constexpr, ROW_PARTS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, GROUP: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PERSISTENT: tl.constexpr, EVEN_I: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Compute the module's formula: one tile [BLOCK_T, BLOCK_O] a program, or every num_programs-th of them."""
    tiles_t, tiles_o = tl.cdiv(T, BLOCK_T), tl.cdiv(O, BLOCK_O)
    tiles = tiles_t * tiles_o
    stop = tiles if PERSISTENT else tl.program_id(0) + 1
    for tile in range(tl.program_id(0), stop, tl.num_programs(0)):
        # GROUP rows of tiles run together, so that tiles of W and x are found in the L2.
        first = tile // (GROUP * tiles_o) * GROUP
        high = tl.minimum(tiles_t - first, GROUP)
        i_t = first + tile % (GROUP * tiles_o) % high
        i_o = tile % (GROUP * tiles_o) // high
        # Loaded ahead of the product, which hides the latency.
        x_scales = (x_lead, x_rest, x_tokens, x_read)
        scale = _row_scale(row_scale, row_sums, x_scales, i_t * BLOCK_T, T, row_parts, count, eps, BLOCK_T, ROW_PARTS)
        acc, second = _product(
            x, w, x_desc, w_desc, i_t, i_o, T, O, I, stride_x, stride_w,
            BLOCK_T, BLOCK_O, BLOCK_I, DESCRIPTORS, EVEN_I, GLU,
        )  # fmt: skip
        start = i_o * BLOCK_O
        code_scales = (code_lead, code_rest, code_tokens, code_read)
        memory = (bias, column_scale, gate, residual, y, codes, code_scales, new_gate, squares, T, O, parts)
        if ACTIVATION is not None and BLOCK_O > PART:
            acc, right = _halves(acc)
            second, second_right = _halves(second)
            _epilogues(
                right, second_right, scale, memory, i_t, start + BLOCK_O // 2, BLOCK_T,
                ACTIVATION, GLU, EXACT, PART, INTERPRETED,
            )  # fmt: skip
        _epilogues(acc, second, scale, memory, i_t, start, BLOCK_T, ACTIVATION, GLU, EXACT, PART, INTERPRETED)
