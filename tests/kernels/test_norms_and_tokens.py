"""Test the Triton kernels of row_rstd, normalize, assemble and rotate against the references in float64."""

import pytest
import torch

from dave_fast.kernels.norm import normalize_triton, normalize_vjp_triton, row_rstd_triton
from dave_fast.kernels.rotary import rotate_triton
from dave_fast.kernels.tokens import assemble_triton
from dave_fast.ops.norm import normalize_ref, normalize_vjp_ref
from dave_fast.ops.rotary import rotate_ref
from dave_fast.ops.tokens import assemble_ref
from tests.kernels.conftest import DTYPES, assert_as_good


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (9, 203), (197, 768)], ids=str)
@pytest.mark.parametrize("centred", [True, False])
def test_row_rstd(numbers, dtype, shape, centred):
    x = numbers(*shape, dtype=dtype, seed=5) + (0 if centred else 100)
    variance = x.double().square().mean(1) if centred else x.double().var(1, correction=0)
    found = row_rstd_triton(x, 1e-6, centred=centred)
    assert found.dtype == torch.float32 and found.shape == shape[:1]
    torch.testing.assert_close(found.double(), (variance + 1e-6).rsqrt(), rtol=1e-6 if centred else 1e-4, atol=0)
    squares = x.double().square().float().unflatten(1, (-1, shape[1])).sum(2).repeat(1, 3) / 3
    again = row_rstd_triton(x, 1e-6, centred=centred, squares=squares)
    torch.testing.assert_close(again, found, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("centres", [False, True])
def test_a_norm_and_its_frozen_vjp(numbers, dtype, centres, centred):
    x, g = numbers(33, 70, dtype=dtype) + 3, numbers(33, 70, dtype=dtype, seed=3)
    weight, bias = numbers(70, dtype=torch.float32, seed=1), numbers(70, dtype=torch.float32, seed=2)
    how = {"centres": centres, "centred": centred}
    expected, exact_rstd = normalize_ref(x.double(), weight.double(), bias.double(), 1e-6, **how)
    plain, _ = normalize_ref(x, weight, bias, 1e-6, **how)
    found, rstd = normalize_triton(x, weight, bias, 1e-6, **how)
    assert_as_good(found, plain, expected)
    torch.testing.assert_close(rstd.double(), exact_rstd, rtol=1e-5, atol=0)
    expected = normalize_vjp_ref(g.double(), weight.double(), exact_rstd, **how)
    plain = normalize_vjp_ref(g, weight, rstd, **how)
    assert_as_good(normalize_vjp_triton(g, weight, rstd, **how), plain, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heads_of_any_strides(numbers, dtype):
    packed, weight, bias = numbers(2, 19, 3, 4, 20, dtype=dtype), numbers(20).float(), numbers(20, seed=1).float()
    for heads in (packed[:, :, 0], packed[:, :1, 1]):
        expected, _ = normalize_ref(heads.double(), weight.double(), bias.double(), 1e-6, centres=True)
        plain, _ = normalize_ref(heads, weight, bias, 1e-6, centres=True)
        found, rstd = normalize_triton(heads, weight, bias, 1e-6, centres=True)
        assert found.is_contiguous() and rstd.shape == heads.shape[:3]
        assert_as_good(found, plain, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_the_stream_and_its_squares(numbers, dtype, prefix):
    patches, position = numbers(3, 65, 48, dtype=dtype), numbers(65, 48, dtype=dtype, seed=1)
    tokens = numbers(prefix, 48, dtype=dtype, seed=2)
    expected = assemble_ref(patches.double(), tokens.double(), position.double())
    x, squares = assemble_triton(patches, tokens, position, squares=True)
    assert_as_good(x, assemble_ref(patches, tokens, position), expected)
    assert torch.equal(assemble_triton(patches, tokens, position), x)
    torch.testing.assert_close(squares.double().sum(1), x.double().square().sum(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 9, 3, 20), (2, 50, 2, 64)], ids=str)
@pytest.mark.parametrize("shared", [True, False])
def test_rotated_heads(numbers, dtype, shape, shared):
    rows, tokens, count, dim = shape
    # a view of a packed projection
    heads = numbers(rows, tokens, 3, count, dim, dtype=dtype)[:, :, 1]
    angles = numbers(tokens, 1 if shared else count, dim // 2, seed=1)
    cos, sin = angles.cos().float(), angles.sin().float()
    expected = rotate_ref(heads.double(), cos.double(), sin.double())
    assert_as_good(rotate_triton(heads, cos, sin), rotate_ref(heads, cos, sin), expected)
