"""The kernels of `attention` (see `kernels/attention.py` for what they compute and how tiles are chosen).

R rows · Q queries · N tokens · H heads · D head_dim, in blocks of D_BLOCK ≥ D.
"""

import triton
import triton.language as tl

from dave_fast.kernels._linear import encode_e4m3


@triton.jit
def _place(tokens, H, BLOCK: tl.constexpr):
    """Return this program's block of tokens, row · H + head, row, and head.

    The grid has one axis, since CUDA's other axes end at 65,535 programs.
    """
    blocks = tl.cdiv(tokens, BLOCK)
    i_flat = (tl.program_id(0) // blocks).to(tl.int64)
    return tl.program_id(0) % blocks, i_flat, i_flat // H, i_flat % H


@triton.jit
def _load(base, o, limit, stride, D: tl.constexpr, D_BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Load tokens o of one head: [BLOCK, D_BLOCK], zeros beyond `limit` where MASKED, and beyond D."""
    d = tl.arange(0, D_BLOCK)
    p = base + o.to(tl.int64)[:, None] * stride + d[None, :]
    if MASKED:
        return tl.load(p, mask=(o < limit)[:, None] & (d < D)[None, :], other=0.0)
    if D == D_BLOCK:
        return tl.load(p)
    return tl.load(p, mask=(d < D)[None, :], other=0.0)


@triton.jit
def _store(
    out, values, i_row, i_head, o, limit, H, code_lead, code_rest, code_read,
    D: tl.constexpr, D_BLOCK: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Store values of one head's tokens o < limit in out's dtype, or in e4m3 where scales are given."""
    d = tl.arange(0, D_BLOCK)
    p = out + ((i_row * limit + o)[:, None] * H + i_head) * D + d[None, :]
    if code_lead is not None:
        values = encode_e4m3(values, tl.where(o < code_read, code_lead, code_rest)[:, None], INTERPRETED)
    tl.store(p, values.to(p.dtype.element_ty), mask=(o < limit)[:, None] & (d < D)[None, :])


@triton.jit
def _scores(
    b_still, still, o_still, limit_still, stride_still, passing, o_passing, limit_passing, stride_passing,
    D: tl.constexpr, D_BLOCK: tl.constexpr, D_STEP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return still · passingᵀ of two blocks of tokens, D_STEP components at a time; in one step `still` is b_still.

    Where MASKED, the scores beyond the last passing token repeat those of the last.
    """
    if MASKED:
        o_passing = tl.minimum(o_passing, limit_passing - 1)
    if D_STEP == D_BLOCK:
        b_passing = _load(passing, o_passing, limit_passing, stride_passing, D, D_BLOCK, False)
        s = tl.dot(b_still, b_passing.T, input_precision="ieee")
    else:
        s = tl.zeros((o_still.shape[0], o_passing.shape[0]), dtype=tl.float32)
        for d in tl.static_range(0, D_BLOCK, D_STEP):
            b_still = _load(still + d, o_still, limit_still, stride_still, D - d, D_STEP, True)
            b_passing = _load(passing + d, o_passing, limit_passing, stride_passing, D - d, D_STEP, False)
            s = tl.dot(b_still, b_passing.T, s, input_precision="ieee")
    return s


@triton.jit
def _add_bias(s, bias, over_scale, o_q, o_n, Q, N):
    """Return s + bias/scale for bias (Q, N) of one head, at queries o_q and tokens o_n that broadcast as s."""
    p = bias + o_q.to(tl.int64) * N + o_n
    return s + tl.load(p, mask=(o_q < Q) & (o_n < N), other=0.0).to(tl.float32) * over_scale


@triton.jit
def _forward_block(
    head, start, acc, top, total,
    D: tl.constexpr, D_BLOCK: tl.constexpr, D_STEP: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add a block of keys to the online softmax: its maximum score `top`, sum `total` and product `acc`."""
    b_q, q, o_q, Q, stride_q, k, v, N, stride_k, stride_v, factor, bias, over_scale = head
    o_n = start + tl.arange(0, BLOCK_N)
    s = _scores(b_q, q, o_q, Q, stride_q, k, o_n, N, stride_k, D, D_BLOCK, D_STEP, MASKED)  # [BLOCK_Q, BLOCK_N]
    if bias is not None:
        s = _add_bias(s, bias, over_scale, o_q[:, None], o_n[None, :], Q, N)
    if MASKED:
        s = tl.where((o_n < N)[None, :], s, float("-inf"))
    higher = tl.maximum(top, tl.max(s, 1))
    p = tl.exp2(s * factor - (higher * factor)[:, None])
    shrink = tl.exp2((top - higher) * factor)
    total = total * shrink + tl.sum(p, 1)
    b_v = _load(v, o_n, N, stride_v, D, D_BLOCK, MASKED)  # [BLOCK_N, D_BLOCK]
    acc = tl.dot(p.to(b_v.dtype), b_v, acc * shrink[:, None], input_precision="ieee")
    return acc, higher, total


@triton.jit
def _attention_kernel(
    q, k, v, out, peak, share, Q, N, H, factor,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head, bias, over_scale, code_lead, code_rest,
    code_read, D: tl.constexpr, D_BLOCK: tl.constexpr, INTERPRETED: tl.constexpr, D_STEP: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, PEELED: tl.constexpr,
):  # fmt: skip
    """Compute out of one head's block of queries; PEELED: only the last block of keys is masked, in separate code."""
    i_q, i_flat, i_row, i_head = _place(Q, H, BLOCK_Q)
    q += i_row * q_row + i_head * q_head
    k += i_row * k_row + i_head * k_head
    v += i_row * v_row + i_head * v_head
    if bias is not None:
        bias += i_head * Q * N
    o_q = i_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    b_q = _load(q, o_q, Q, q_token, D, D_BLOCK, True)  # [BLOCK_Q, D_BLOCK]
    acc = tl.zeros((BLOCK_Q, D_BLOCK), dtype=tl.float32)
    top = tl.full((BLOCK_Q,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_Q,), dtype=tl.float32)
    last = (N - 1) // BLOCK_N * BLOCK_N
    head = (b_q, q, o_q, Q, q_token, k, v, N, k_token, v_token, factor, bias, over_scale)
    for start in range(0, last if PEELED else N, BLOCK_N):
        acc, top, total = _forward_block(head, start, acc, top, total, D, D_BLOCK, D_STEP, BLOCK_N, not PEELED)
    if PEELED:
        acc, top, total = _forward_block(head, last, acc, top, total, D, D_BLOCK, D_STEP, BLOCK_N, True)
    acc *= (1 / total)[:, None]
    _store(out, acc, i_row, i_head, o_q, Q, H, code_lead, code_rest, code_read, D, D_BLOCK, INTERPRETED)
    m_q = o_q < Q
    o_kept = i_flat * Q + o_q
    if share is not None:
        tl.store(peak + o_kept, top * factor, mask=m_q)
        tl.store(share + o_kept, 1 / total, mask=m_q)
    else:
        tl.store(peak + o_kept, top * factor + tl.log2(total), mask=m_q)


@triton.jit
def _vjp_block(
    head, start, acc,
    D: tl.constexpr, D_BLOCK: tl.constexpr, D_STEP: tl.constexpr, BLOCK_Q: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return acc + Pᵀ d_out of one block of queries."""
    b_k, k, o_n, N, stride_k, q, d_out, peak, share, Q, stride_q, stride_o, factor, bias, over_scale = head
    o_q = start + tl.arange(0, BLOCK_Q)
    # An infinite peak makes every p beyond the last query zero.
    b_peak = tl.load(peak + o_q, mask=o_q < Q, other=float("inf")) if MASKED else tl.load(peak + o_q)
    s = _scores(b_k, k, o_n, N, stride_k, q, o_q, Q, stride_q, D, D_BLOCK, D_STEP, MASKED)  # [BLOCK_N, BLOCK_Q]
    if bias is not None:
        s = _add_bias(s, bias, over_scale, o_q[None, :], o_n[:, None], Q, N)
    p = tl.exp2(s * factor - b_peak[None, :])
    if share is not None:
        p *= (tl.load(share + o_q, mask=o_q < Q, other=0.0) if MASKED else tl.load(share + o_q))[None, :]
    b_o = _load(d_out, o_q, Q, stride_o, D, D_BLOCK, MASKED)  # [BLOCK_Q, D_BLOCK]
    return tl.dot(p.to(b_o.dtype), b_o, acc, input_precision="ieee")


@triton.jit
def _attention_vjp_kernel(
    q, k, peak, share, d_out, d_v, Q, N, H, factor,
    q_row, q_token, q_head, k_row, k_token, k_head, o_row, o_token, o_head, bias, over_scale, code_lead, code_rest,
    code_read, D: tl.constexpr, D_BLOCK: tl.constexpr, INTERPRETED: tl.constexpr, D_STEP: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, PEELED: tl.constexpr,
):  # fmt: skip
    """Compute dv of a block of keys of one head; PEELED: only the last block of queries is masked, in separate code."""
    i_n, i_flat, i_row, i_head = _place(N, H, BLOCK_N)
    q += i_row * q_row + i_head * q_head
    k += i_row * k_row + i_head * k_head
    d_out += i_row * o_row + i_head * o_head
    peak += i_flat * Q
    if share is not None:
        share += i_flat * Q
    if bias is not None:
        bias += i_head * Q * N
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    b_k = _load(k, o_n, N, k_token, D, D_BLOCK, True)  # [BLOCK_N, D_BLOCK]
    acc = tl.zeros((BLOCK_N, D_BLOCK), dtype=tl.float32)
    last = (Q - 1) // BLOCK_Q * BLOCK_Q
    head = (b_k, k, o_n, N, k_token, q, d_out, peak, share, Q, q_token, o_token, factor, bias, over_scale)
    for start in range(0, last if PEELED else Q, BLOCK_Q):
        acc = _vjp_block(head, start, acc, D, D_BLOCK, D_STEP, BLOCK_Q, not PEELED)
    if PEELED:
        acc = _vjp_block(head, last, acc, D, D_BLOCK, D_STEP, BLOCK_Q, True)
    _store(d_v, acc, i_row, i_head, o_n, N, H, code_lead, code_rest, code_read, D, D_BLOCK, INTERPRETED)
