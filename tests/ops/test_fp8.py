"""Test e4m3 operands: the codes of numbers, and the GEMM of codes against float64."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dave_fast.ops.fp8 import E4M3, LARGEST, TokenScales, coded, dequantise, encode, linear_fp8_ref, pack_fp8, quantise

SHAPES = [(1, 37, 65), (7, 33, 16), (197, 48, 130)]


def numbers(*shape, seed, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e-20, 1.0, 1e20])
def test_numbers_are_off_by_at_most_a_sixteenth_of_themselves(dtype, size):
    x = (numbers(5, 257, seed=0) * size).to(dtype)
    codes, scale = quantise(x)
    assert codes.shape == x.shape and codes.dtype == E4M3
    assert scale.shape == (5,) and scale.dtype == torch.float32
    assert torch.equal(codes.float().abs().amax(-1), torch.full((5,), LARGEST))
    # below 2⁻⁶ of the unit, steps are of one size
    limit = (x.float().abs() / 16).clamp(min=float(scale.max()) * 2**-10) * 1.0001
    assert ((dequantise(codes, scale) - x.float()).abs() <= limit).all()


def test_codes_of_a_row_do_not_depend_on_other_rows():
    x = numbers(4, 33, seed=0)
    louder = x.clone()
    louder[1:] *= 1e6
    assert torch.equal(quantise(x)[0][0].float(), quantise(louder)[0][0].float())


def test_scales_are_divided_by_a_tensor():
    """PyTorch on a GPU multiplies by the reciprocal of a Python number, which rounds differently from the kernel."""
    divisors = []

    class Divisions(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket == torch.ops.aten.div:
                divisors.append(args[1])
            return func(*args, **(kwargs or {}))

    with Divisions():
        quantise(numbers(3, 8, seed=0))
    assert divisors and all(isinstance(divisor, torch.Tensor) for divisor in divisors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_codes_of_one_scale_are_off_by_a_sixteenth_or_half_a_step(dtype):
    x = numbers(9, 33, seed=0, dtype=dtype)
    scales = TokenScales(2.0**-5, 2.0**-3, 3, 1)
    of_rows = scales.rows(x.double())
    assert of_rows.flatten().tolist() == [2.0**-5, 2.0**-3, 2.0**-3] * 3
    codes = encode(x, scales).double() * of_rows
    limit = (x.double().abs() / 16).clamp(min=2.0**-10 * of_rows)
    assert ((codes - x.double()).abs() <= limit * 1.0001).all()


def test_numbers_beyond_the_range_are_nan_and_the_largest_are_kept():
    x = torch.tensor([448.0, -448.0, 449.0, -1e9, torch.inf, torch.nan])
    assert encode(x[:, None], TokenScales.uniform(1.0)).float()[:, 0].isnan().tolist() == [
        False,
        False,
        True,
        True,
        True,
        True,
    ]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_of_codes_equal_products_of_decoded_operands(shape):
    x, matrix, bias, scale = case(shape)
    codes, weight = coded(x, TokenScales(0.25, 0.0625, len(x), 1)), pack_fp8(matrix)
    half = TokenScales.uniform(0.5)
    found = linear_fp8_ref(codes, weight, bias, row_scale=scale, code_scale=half)
    stands_for = codes.values.double() * codes.scale.rows(x.double())
    exact = scale.double()[:, None] * (stands_for @ dequantise(*weight).double().T) + bias.double()
    assert found.dtype == found.wide.dtype == torch.bfloat16 and found.shape == exact.shape
    assert ((found.wide.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-4).all()
    assert ((found.values.double() * 0.5 - exact).abs() <= exact.abs() / 15 + 1e-3).all()
    assert linear_fp8_ref(codes, weight, code_scale=half, wide=False).wide is None


def test_zeros_stay_and_nan_propagates():
    x = torch.zeros(3, 8)
    x[1, 2], x[2, 3] = torch.nan, torch.inf
    found = dequantise(*quantise(x))
    assert not found[0].any() and found[1].isnan().any() and not found[2].isfinite().all()


def case(shape, dtype=torch.bfloat16):
    rows, inputs, outputs = shape
    x, matrix = numbers(rows, inputs, seed=0, dtype=dtype), numbers(outputs, inputs, seed=1, dtype=dtype)
    return x, matrix, numbers(outputs, seed=2, dtype=dtype), numbers(rows, seed=3).abs()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_product_is_that_of_the_quantised_operands(shape):
    x, matrix, bias, scale = case(shape)
    weight = pack_fp8(matrix)
    assert weight.codes.shape == matrix.shape and weight.scale.shape == matrix.shape[:1]
    found = linear_fp8_ref(x, weight, bias, row_scale=scale)
    exact = dequantise(*quantise(x)).double() @ dequantise(*weight).double().T
    expected = scale.double()[:, None] * exact + bias.double()
    assert found.dtype == torch.bfloat16 and found.shape == expected.shape
    # one rounding to bfloat16, and float32's in the sum
    assert ((found.double() - expected).abs() <= 2**-8 * expected.abs() + 1e-4).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_operands_noise_is_what_three_bits_of_mantissa_make(shape):
    x, matrix, _, _ = case(shape)
    exact = x.double() @ matrix.double().T
    error = (linear_fp8_ref(x, pack_fp8(matrix)).double() - exact).norm() / exact.norm()
    # 2.6 % rms an operand
    assert 0.015 < error < 0.06


def test_epilogues_are_those_of_linear():
    x, matrix, bias, _ = case((9, 40, 24))
    weight = pack_fp8(matrix)
    plain = linear_fp8_ref(x.float(), weight, bias)
    gate, residual = torch.rand(9, 24).bfloat16(), numbers(9, 24, seed=5, dtype=torch.bfloat16)
    hidden, kept = linear_fp8_ref(x, weight, bias, activation="gelu")
    assert torch.allclose(hidden.float(), torch.nn.functional.gelu(plain), rtol=1e-2, atol=1e-2)
    assert kept.dtype == torch.bfloat16 and torch.allclose(kept.float(), torch.special.ndtr(plain), atol=4e-3)
    gated = linear_fp8_ref(x, weight, bias, gate=gate)
    assert torch.allclose(gated.float(), plain * gate.float(), rtol=1e-2, atol=1e-2)
    added = linear_fp8_ref(x, weight, bias, residual=residual)
    assert torch.allclose(added.float(), plain + residual.float(), rtol=1e-2, atol=2e-2)
    same, squares = linear_fp8_ref(x, weight, bias, residual=residual, squares=True)
    assert torch.equal(same, added)
    assert squares.dtype == torch.float32 and torch.allclose(squares.sum(1), added.float().square().sum(1))
