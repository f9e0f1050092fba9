"""attention forward and its frozen VJP: every backend against float64 and plain PyTorch, kept and recomputed P."""

import pytest
import torch

from dave_fast.ops import _ext, _registry, attention
from tests.tolerances import EXACT, LOW_PRECISION_RATIO

BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=str(reason)))
    for name in ("torch", "native")
    for reason in [_registry.why_not("attention", name, "cpu")]
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
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
    """q, k, v (R, tokens, heads, D) as strided views of a packed projection, and the cotangent of the output."""
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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "recomputed"])
def test_against_the_formula(backend, dtype, shape, kept, monkeypatch):
    case = heads(shape, dtype)
    expected = by_formula(*case, 0.3)
    # plain PyTorch keeps P
    plain = run("torch", *case, 0.3)
    monkeypatch.setattr(attention, "KEEP_PROBABILITIES", 400 if kept else 0)
    found = run(backend, *case, 0.3)
    for got, want, reference in zip(found, expected, plain, strict=True):
        assert got.shape == want.shape and got.dtype == dtype and got.is_contiguous()
        limit = (
            EXACT
            if dtype == torch.float64
            else LOW_PRECISION_RATIO * max(error(reference, want), torch.finfo(dtype).eps)
        )
        assert error(got, want) <= limit


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 2, 50, 3, 16), (1, 197, 197, 2, 64), (2, 49, 33, 2, 9)], ids=str)
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "recomputed"])
def test_a_bias_is_added_to_the_scores(backend, dtype, shape, kept, monkeypatch):
    case = heads(shape, dtype)
    _, queries, tokens, count, _ = shape
    bias = (2 * torch.randn(count, queries, tokens, generator=torch.Generator().manual_seed(5))).to(dtype)
    expected, plain = by_formula(*case, 0.3, bias), run("torch", *case, 0.3, bias)
    monkeypatch.setattr(attention, "KEEP_PROBABILITIES", 400 if kept else 0)
    found = run(backend, *case, 0.3, bias)
    unbiased = by_formula(*case, 0.3)
    for got, want, reference, without in zip(found, expected, plain, unbiased, strict=True):
        assert got.shape == want.shape and got.dtype == dtype
        ratio = LOW_PRECISION_RATIO * max(error(reference, want), torch.finfo(dtype).eps)
        assert error(got, want) <= (EXACT if dtype == torch.float64 else ratio) < error(without, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "recomputed"])
def test_large_scores_do_not_overflow(backend, dtype, kept, monkeypatch):
    monkeypatch.setattr(attention, "KEEP_PROBABILITIES", 400 if kept else 0)
    case = heads((1, 70, 70, 2, 16), dtype, scale=30.0)
    found = run(backend, *case, 1.0)
    expected = by_formula(*case, 1.0)
    for got, want in zip(found, expected, strict=True):
        assert got.isfinite().all()
        assert error(got, want) <= (0.1 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_vjp_is_autograds_with_the_probabilities_detached(backend):
    q, k, v, d_out = heads((2, 23, 23, 2, 16), torch.float64)
    v = v.clone().requires_grad_()
    p = (0.25 * q.transpose(1, 2) @ k.transpose(1, 2).transpose(-1, -2)).softmax(-1)
    out = (p.detach() @ v.transpose(1, 2)).transpose(1, 2)
    (expected,) = torch.autograd.grad(out, v, d_out)
    _, found = run(backend, q, k, v.detach(), d_out, 0.25)
    assert error(found, expected) < EXACT


@pytest.mark.parametrize("backend", BACKENDS)
def test_long_sequences_save_nothing_quadratic(backend):
    q, k, v, _ = heads((1, 600, 600, 1, 8), torch.float32)
    _, saved = _registry.load("attention", backend)(q, k, v, 0.3)
    kept = [t for t in vars(saved).values() if isinstance(t, torch.Tensor)]
    kept += [t for pair in vars(saved).values() if isinstance(pair, tuple) for t in pair if isinstance(t, torch.Tensor)]
    assert kept and sum(t.numel() for t in kept) < 600 * 600


# where a value that is no number is put: operand, row, token, head, component
SPOTS = [("q", 1, 3, 0, 2), ("k", 0, 20, 1, 15), ("k", 1, 0, 0, 0), ("v", 1, 18, 1, 7), ("v", 0, 0, 0, 0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "recomputed"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("spot", SPOTS, ids=str)
# an odd number of queries, and tokens that fill no vector
@pytest.mark.parametrize("shape", [(2, 21, 21, 2, 16), (2, 49, 33, 2, 16)], ids=str)
def test_what_is_no_number_is_seen(backend, dtype, kept, value, spot, shape, monkeypatch):
    """NaN where PyTorch's softmax attention has it and nowhere else; what is left is as good as ever."""
    monkeypatch.setattr(attention, "KEEP_PROBABILITIES", 400 if kept else 0)
    *operands, d_out = heads(shape, dtype)
    operand, *at = spot
    operands["qkv".index(operand)][tuple(at)] = value
    expected = by_formula(*operands, d_out, 0.3)
    out, saved = _registry.load("attention", backend)(*operands, 0.3)
    found = out, _registry.load("attention_vjp", backend)(saved, d_out)
    assert not all(want.isfinite().all() for want in expected)
    for name, got, want in zip(("out", "d_v"), found, expected, strict=True):
        finite = want.isfinite()
        assert torch.equal(got.isnan(), want.isnan()), name
        assert torch.equal(got.isposinf(), want.isposinf()) and torch.equal(got.isneginf(), want.isneginf()), name
        assert (got[finite].double() - want[finite]).abs().max() <= (0.1 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.skipif(_ext.unavailable() is not None, reason=str(_ext.unavailable()))
def test_memory_that_is_not_there_is_an_error_and_no_end():
    native, strides = _ext.module(), [8, 8, 8]
    shape = (0, 1, 2**50, 1, 8)
    with pytest.raises(MemoryError):
        native.attention(shape, 1.0, 0, 0, 0, strides, 0, strides, 0, strides, 0, 0, 0, 0, 2)
    with pytest.raises(MemoryError):
        native.attention_vjp(shape, 1.0, 0, 0, 0, strides, 0, strides, 0, 0, 0, 0, strides, 0, 2)
    with pytest.raises(ValueError, match="scale must be positive"):
        native.attention((0, 1, 1, 1, 8), 0.0, 0, 0, 0, strides, 0, strides, 0, strides, 0, 0, 0, 0, 2)
