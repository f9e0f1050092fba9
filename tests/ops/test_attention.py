"""Test attention and its frozen VJP, with P stored and recomputed: every backend against float64 and PyTorch."""

import itertools

import pytest
import torch

from dave_fast.ops import _ext, _registry, attention
from tests.conftest import chosen_backend
from tests.tolerances import EXACT, LOW_PRECISION_RATIO

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
# the longest sequence whose P the forward stores, by the name of what the tests check with it
KEPT = {"kept": 400, "recomputed": 0}
# rows, queries, tokens, heads, head dimension
SHAPES = [
    (1, 1, 1, 1, 8),
    (2, 7, 7, 3, 16),
    (2, 1, 197, 2, 64),
    (1, 197, 197, 2, 64),
    (1, 65, 65, 4, 36),
    (2, 2, 50, 1, 80),
    (1, 49, 33, 2, 9),
]


def heads(shape, dtype, seed=0, scale=1.0):
    """Return q, k, v (R, tokens, heads, head_dim), strided views of a packed projection, and the output's cotangent."""
    rows, queries, tokens, count, dim = shape
    generator = torch.Generator().manual_seed(seed)
    longest = max(queries, tokens)
    packed = scale * torch.randn(rows, longest, 3, count, dim, generator=generator, dtype=torch.float64)
    d_out = torch.randn(rows, queries, count, dim, generator=generator, dtype=torch.float64)
    packed = packed.to(dtype)
    return packed[:, :queries, 0], packed[:, :tokens, 1], packed[:, :tokens, 2], d_out.to(dtype)


def by_formula(q, k, v, d_out, scale, bias=None):
    q, k, v, d_out = (t.double().transpose(1, 2) for t in (q, k, v, d_out))
    scores = scale * q @ k.transpose(-1, -2)
    p = (scores if bias is None else scores + bias.double()).softmax(-1)
    return (p @ v).transpose(1, 2), (p.transpose(-1, -2) @ d_out).transpose(1, 2)


def run(backend, q, k, v, d_out, scale, *bias):
    out, saved = _registry.load("attention", backend)(q, k, v, scale, *bias)
    return out, _registry.load("attention_vjp", backend)(saved, d_out)


def error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


def bound(dtype, plain, truth):
    """Return the largest error allowed beside plain PyTorch's result in the same precision."""
    return EXACT if dtype == torch.float64 else LOW_PRECISION_RATIO * max(error(plain, truth), torch.finfo(dtype).eps)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_formula(backend, shape, monkeypatch):
    for dtype in DTYPES:
        case = heads(shape, dtype)
        expected = by_formula(*case, 0.3)
        monkeypatch.setattr(attention, "KEEP_PROBABILITIES", KEPT["kept"])
        plain = run("torch", *case, 0.3)
        for name, longest in KEPT.items():
            monkeypatch.setattr(attention, "KEEP_PROBABILITIES", longest)
            found = run(backend, *case, 0.3)
            for result, got, want, reference in zip(("out", "d_v"), found, expected, plain, strict=True):
                assert got.shape == want.shape and got.dtype == dtype and got.is_contiguous(), (dtype, name, result)
                assert error(got, want) <= bound(dtype, reference, want), (dtype, name, result)


@pytest.mark.parametrize("shape", [(2, 2, 50, 3, 16), (1, 197, 197, 2, 64), (2, 49, 33, 2, 9)], ids=str)
def test_bias_is_added_to_the_scores(backend, shape, monkeypatch):
    _, queries, tokens, count, _ = shape
    for dtype in DTYPES:
        case = heads(shape, dtype)
        bias = (2 * torch.randn(count, queries, tokens, generator=torch.Generator().manual_seed(5))).to(dtype)
        expected, unbiased = by_formula(*case, 0.3, bias), by_formula(*case, 0.3)
        plain = run("torch", *case, 0.3, bias)
        for name, longest in KEPT.items():
            monkeypatch.setattr(attention, "KEEP_PROBABILITIES", longest)
            found = run(backend, *case, 0.3, bias)
            for got, want, reference, without in zip(found, expected, plain, unbiased, strict=True):
                assert got.shape == want.shape and got.dtype == dtype, (dtype, name)
                assert error(got, want) <= bound(dtype, reference, want) < error(without, want), (dtype, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores_do_not_overflow(backend, dtype, monkeypatch):
    case = heads((1, 70, 70, 2, 16), dtype, scale=30.0)
    expected = by_formula(*case, 1.0)
    for name, longest in KEPT.items():
        monkeypatch.setattr(attention, "KEEP_PROBABILITIES", longest)
        for got, want in zip(run(backend, *case, 1.0), expected, strict=True):
            assert got.isfinite().all(), name
            assert error(got, want) <= (0.1 if dtype == torch.bfloat16 else 1e-3), name


def test_vjp_is_that_of_autograd_with_detached_probabilities(backend):
    q, k, v, d_out = heads((2, 23, 23, 2, 16), torch.float64)
    v = v.clone().requires_grad_()
    p = (0.25 * q.transpose(1, 2) @ k.transpose(1, 2).transpose(-1, -2)).softmax(-1)
    out = (p.detach() @ v.transpose(1, 2)).transpose(1, 2)
    (expected,) = torch.autograd.grad(out, v, d_out)
    _, found = run(backend, q, k, v.detach(), d_out, 0.25)
    assert error(found, expected) < EXACT


def test_long_sequences_save_nothing_quadratic(backend):
    q, k, v, _ = heads((1, 600, 600, 1, 8), torch.float32)
    _, saved = _registry.load("attention", backend)(q, k, v, 0.3)
    kept = [t for t in vars(saved).values() if isinstance(t, torch.Tensor)]
    kept += [t for pair in vars(saved).values() if isinstance(pair, tuple) for t in pair if isinstance(t, torch.Tensor)]
    assert kept and sum(t.numel() for t in kept) < 600 * 600


# where NaN or an infinity is put: operand, row, token, head, component
SPOTS = [("q", 1, 3, 0, 2), ("k", 0, 20, 1, 15), ("k", 1, 0, 0, 0), ("v", 1, 18, 1, 7), ("v", 0, 0, 0, 0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
# an odd number of queries, and tokens that fill no vector
@pytest.mark.parametrize("shape", [(2, 21, 21, 2, 16), (2, 49, 33, 2, 16)], ids=str)
def test_nan_and_infinity_propagate_as_in_pytorch(backend, dtype, shape, monkeypatch):
    """NaN appears exactly where PyTorch's softmax attention has it; all other values are within the usual bound."""
    for (operand, *at), value in itertools.product(SPOTS, (torch.nan, torch.inf, -torch.inf)):
        *operands, d_out = heads(shape, dtype)
        operands["qkv".index(operand)][tuple(at)] = value
        expected = by_formula(*operands, d_out, 0.3)
        assert not all(want.isfinite().all() for want in expected)
        for kept, longest in KEPT.items():
            monkeypatch.setattr(attention, "KEEP_PROBABILITIES", longest)
            found = run(backend, *operands, d_out, 0.3)
            for result, got, want in zip(("out", "d_v"), found, expected, strict=True):
                where = f"{value} in {operand}{at}, {kept}, {result}"
                finite = want.isfinite()
                assert torch.equal(got.isnan(), want.isnan()), where
                assert torch.equal(got.isposinf(), want.isposinf()), where
                assert torch.equal(got.isneginf(), want.isneginf()), where
                limit = 0.1 if dtype == torch.bfloat16 else 1e-5
                assert (got[finite].double() - want[finite]).abs().max() <= limit, where


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kept", KEPT)
def test_bits_depend_neither_on_the_batch_nor_on_threads_nor_on_instructions_that_fuse(dtype, kept, monkeypatch):
    if (reason := _ext.unavailable()) is not None:
        pytest.skip(reason)
    monkeypatch.setattr(attention, "KEEP_PROBABILITIES", KEPT[kept])
    *operands, d_out = heads((5, 57, 57, 3, 36), dtype)
    bias = torch.randn(3, 57, 57, generator=torch.Generator().manual_seed(5)).to(dtype)
    made = {}
    for isa in ("avx512bf16", "avx512", "avx2", "neonbf16", "dotprod"):
        if isa not in _ext.module().usable_isas():
            continue
        for backend in chosen_backend(isa):
            made[isa] = run(backend, *operands, d_out, 0.3, bias)
            for rows in (slice(0, 1), slice(3, 5)):
                some = run(backend, *(t[rows] for t in (*operands, d_out)), 0.3, bias)
                assert all(torch.equal(a, b[rows]) for a, b in zip(some, made[isa], strict=True)), (isa, rows)
            for threads in (2, 3):
                torch.set_num_threads(threads)
                try:
                    again = run(backend, *operands, d_out, 0.3, bias)
                finally:
                    torch.set_num_threads(1)
                assert all(map(torch.equal, again, made[isa])), (isa, threads)
    # Arm's instruction for bfloat16 rounds otherwise
    first, *others = (found for isa, found in made.items() if isa != "neonbf16" or dtype == torch.float32)
    assert all(torch.equal(a, b) for other in others for a, b in zip(other, first, strict=True))


def test_bfloat16_is_in_cpp_on_every_instruction_set(backend):
    *operands, _ = heads((1, 5, 5, 2, 8), torch.bfloat16)
    _, saved = _registry.load("attention", backend)(*operands, 0.3)
    assert isinstance(saved, attention.SavedAttention if backend == "torch" else attention.SavedNative)


@pytest.mark.skipif(_ext.unavailable() is not None, reason=str(_ext.unavailable()))
def test_memory_that_cannot_be_had_raises_memory_error():
    native, strides, none, words = _ext.module(), [8, 8, 8], (0, 0, 0), (0, 0, 5)
    operands = none, strides, none, strides
    shape = (0, 1, 2**44, 1, 8)
    with pytest.raises(MemoryError):
        native.attention(shape, 1.0, None, *operands, none, strides, none, none, words, 2)
    with pytest.raises(MemoryError):
        native.attention_vjp(shape, 1.0, None, *operands, none, words, none, strides, none, 2)
    with pytest.raises(ValueError, match="scale must be positive"):
        native.attention((0, 1, 1, 1, 8), 0.0, None, *operands, none, strides, none, none, words, 2)
