"""Test linear: the Triton kernel against the formulas in float64, and plain PyTorch in the same precision."""

import pytest
import torch
from torch.nn import functional as F

from dave_fast.kernels import _launch
from dave_fast.kernels import linear as kernels
from dave_fast.kernels.linear import FEW, linear_triton
from dave_fast.kernels.norm import row_rstd_triton
from dave_fast.ops.activation import GATES, activate_ref
from dave_fast.ops.fp8 import TokenScales, encode
from dave_fast.ops.norm import RowSums
from tests.kernels.conftest import DTYPES, assert_as_good, error
from tests.tolerances import LOW_PRECISION_RATIO

# rows, in-features, out-features
SHAPES = [(1, 32, 64), (7, 37, 65), (197, 48, 32), (257, 64, 130)]
# of the first two of ten tokens, and of the others
SCALES = TokenScales(0.25, 2.0**-4, 10, 2)
ACTIVATIONS = [*GATES, "silu_glu", "gelu_glu_last"]


def steps(gate):
    """Return a gate rounded to 255 steps."""
    return (gate.double() * 255).round().to(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scale_bias_and_strided_rows(numbers, dtype, shape):
    rows, inputs, outputs = shape
    wide = numbers(rows, inputs + 5, dtype=dtype)
    x, matrix, bias = wide[:, :inputs], numbers(outputs, inputs, dtype=dtype, seed=1), numbers(outputs, dtype=dtype)
    scale = numbers(rows, dtype=torch.float32, seed=3).abs()
    expected = scale.double()[:, None] * (x.double() @ matrix.double().T) + bias.double()
    found = linear_triton(x, matrix, bias, row_scale=scale)
    assert_as_good(found, F.linear((x * scale[:, None]).to(dtype), matrix, bias), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gates_residual_and_squares(numbers, dtype, shape):
    rows, inputs, outputs = shape
    x, matrix = numbers(rows, inputs, dtype=dtype), numbers(outputs, inputs, dtype=dtype, seed=1)
    other = numbers(rows, outputs, dtype=dtype, seed=4)
    kept, product, plain = other.clone(), x.double() @ matrix.double().T, F.linear(x, matrix)
    assert_as_good(linear_triton(x, matrix, gate=other), plain * other, product * other.double())
    eight = steps(other.sigmoid())
    gate = eight.double() / 255
    assert_as_good(linear_triton(x, matrix, gate=eight), plain * gate.to(dtype), product * gate)
    found, squares = linear_triton(x, matrix, residual=other, squares=True)
    assert_as_good(found, plain + other, product + other.double())
    assert torch.equal(found, linear_triton(x, matrix, residual=other))
    assert squares.shape[0] == rows and squares.dtype == torch.float32
    torch.testing.assert_close(squares.double().sum(1), found.double().square().sum(1), rtol=1e-5, atol=1e-6)
    assert torch.equal(other, kept)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_and_its_gate(numbers, dtype, activation):
    x, matrix, bias = numbers(33, 40, dtype=dtype), numbers(54, 40, dtype=dtype, seed=1), numbers(54, dtype=dtype)
    x, matrix = x / 4, matrix / 2
    scale = numbers(33, dtype=torch.float32, seed=3).abs()
    u = scale.double()[:, None] * (x.double() @ matrix.double().T) + bias.double()
    expected, expected_gate = activate_ref(u, activation)
    plain, plain_gate = activate_ref(F.linear((x * scale[:, None]).to(dtype), matrix, bias), activation)
    found, gate = linear_triton(x, matrix, bias, row_scale=scale, activation=activation)
    assert_as_good(found, plain, expected)
    if gate.dtype == torch.uint8:
        assert (gate.double() / 255 - expected_gate).abs().max() <= 0.51 / 255
    else:
        assert_as_good(gate, plain_gate, expected_gate)


@pytest.mark.parametrize("activation", list(GATES))
def test_gates_in_eight_bits_are_within_half_a_step(numbers, activation, monkeypatch):
    monkeypatch.setitem(kernels.EIGHT_BIT_GATES, torch.float16, torch.uint8)
    x, matrix = numbers(65, 32, dtype=torch.float16), numbers(96, 32, dtype=torch.float16, seed=1)
    expected, expected_gate = activate_ref(x.double() @ matrix.double().T, activation)
    found, gate = linear_triton(x, matrix, activation=activation)
    assert gate.dtype == torch.uint8
    # half a step, and the error of the polynomial and of the product in low precision
    assert (gate.double() / 255 - expected_gate).abs().max() <= 0.5 / 255 + 2e-4
    # the forward walk multiplies with the gate itself, not with the stored one
    assert error(found, expected) <= LOW_PRECISION_RATIO * torch.finfo(torch.float16).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", list(GATES))
def test_gates_at_zero_and_far_from_it(device, dtype, activation):
    u = torch.tensor([[0.0, -0.0, 200.0, -200.0, 1e4, -1e4, 88.5, -88.5]], dtype=dtype, device=device)
    value, gate = linear_triton(u, torch.eye(8, dtype=dtype, device=device), activation=activation)
    at_zero = 0.0 if activation == "relu" else 0.5
    gate = gate / 255 if gate.dtype == torch.uint8 else gate
    assert gate[0].tolist() == pytest.approx(
        [at_zero, at_zero, 1, 0, 1, 0, 1, 0], abs=2e-3 if dtype.itemsize < 4 else 1e-38
    )
    assert value[0].tolist() == pytest.approx(u[0].clamp(min=0).tolist(), abs=1e-30)


def test_polynomial_of_phi_is_within_its_stated_error(numbers):
    u = torch.linspace(-8, 8, 4001, dtype=torch.float64).to(numbers(1).device)
    x = u.half()[:, None] * torch.eye(1, 32, dtype=torch.float16, device=u.device)
    # one in-feature is not zero, so the product is u itself
    _, gate = linear_triton(x, torch.eye(32, dtype=torch.float16, device=u.device), activation="gelu")
    expected = torch.special.ndtr(u.half().double())
    # half a float16 step, and the polynomial
    assert (gate[:, 0].double() - expected).abs().max() < 2.5e-4 + 7.4e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn], ids=str)
def test_scales_of_columns_and_operands_in_eight_bits(numbers, dtype):
    x, matrix = numbers(65, 64, dtype=dtype), numbers(40, 64, dtype=dtype, seed=1)
    scale, rows = numbers(40, dtype=torch.float32, seed=2).abs(), numbers(65, dtype=torch.float32, seed=3).abs()
    bias = numbers(40, dtype=torch.float16, seed=4)
    product = x.double() @ matrix.double().T * scale.double() * rows.double()[:, None]
    found = linear_triton(x, matrix, bias, row_scale=rows, column_scale=scale, dtype=torch.float16)
    assert found.dtype == torch.float16
    # operands are exact, so what is left is the rounding of the result
    assert error(found, product + bias.double()) <= torch.finfo(torch.float16).eps


def test_gated_mlps_keep_the_operands_dtype_for_their_gates(numbers, monkeypatch):
    monkeypatch.setitem(kernels.EIGHT_BIT_GATES, torch.float16, torch.uint8)
    x, matrix = numbers(5, 32, dtype=torch.float16), numbers(64, 32, dtype=torch.float16)
    assert linear_triton(x, matrix, activation="silu")[1].dtype == torch.uint8
    assert linear_triton(x, matrix, activation="silu_glu")[1].dtype == torch.float16


@pytest.mark.parametrize("variant", ["descriptors", "persistent", "plain"])
@pytest.mark.parametrize("glu", [False, True])
def test_every_tile_loading_and_order(numbers, variant, glu, monkeypatch):
    way = kernels._configuration((32, 64, 32), 4, 1, tma=variant != "plain", persistent=variant == "persistent")
    monkeypatch.setattr(kernels, "configurations", lambda *_, **__: [way])
    x, matrix = numbers(150, 40, dtype=torch.float16), numbers(2 * 70, 40, dtype=torch.float16, seed=1)
    activation = "silu_glu" if glu else "silu"
    expected = activate_ref(x.double() @ matrix.double().T, activation)
    plain = activate_ref(F.linear(x, matrix), activation)
    for got, low, want in zip(linear_triton(x, matrix, activation=activation), plain, expected, strict=True):
        assert_as_good(got, low, want)


def test_nan_and_infinity_propagate(numbers):
    x, matrix = numbers(3, 32, dtype=torch.float16), numbers(40, 32, dtype=torch.float16, seed=1)
    x[1, 3] = torch.nan
    y, gate = linear_triton(x, matrix, activation="gelu")
    assert y.isnan().any(1).tolist() == [False, True, False]
    assert gate[[0, 2]].isfinite().all()
    y, squares = linear_triton(x, matrix, residual=y, squares=True)
    assert squares.isnan().any(1).tolist() == [False, True, False]
    assert row_rstd_triton(y, 1e-6, centred=True, squares=squares).isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parts", [1, 3, 12])
@pytest.mark.parametrize("activation", [None, "gelu", "silu_glu"])
def test_rows_scaled_by_their_sums_of_squares(numbers, dtype, parts, activation):
    x, matrix = numbers(70, 40, dtype=dtype), numbers(54, 40, dtype=dtype, seed=1) / 8
    sums = RowSums(numbers(70, parts, dtype=torch.float32, seed=2).square(), 40, 1e-3)
    scale = sums.rstd()
    expected = linear_triton(x, matrix, row_scale=scale, activation=activation)
    found = linear_triton(x, matrix, row_scale=sums, activation=activation)
    for got, want in zip(*((t if isinstance(t, tuple) else (t,)) for t in (found, expected)), strict=True):
        # scales differ by the order of a sum
        assert error(got, want.double()) <= LOW_PRECISION_RATIO * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_result_in_the_residuals_memory_is_the_same(numbers, dtype):
    x, matrix = numbers(130, 40, dtype=dtype), numbers(96, 40, dtype=dtype, seed=1)
    residual = numbers(130, 96, dtype=dtype, seed=2)
    expected = linear_triton(x, matrix, residual=residual)
    found = linear_triton(x, matrix, residual=residual, overwrite=True)
    assert found.data_ptr() == residual.data_ptr() and torch.equal(found, expected)


@pytest.mark.parametrize("rows", [1, FEW, FEW + 1])
def test_parts_of_squares_for_few_and_many_rows(numbers, rows):
    x, matrix = numbers(rows, 32, dtype=torch.float16), numbers(200, 32, dtype=torch.float16, seed=1)
    y, squares = linear_triton(x, matrix, residual=numbers(rows, 200, dtype=torch.float16, seed=2), squares=True)
    assert squares.shape == (rows, 7 if rows <= FEW else 4)
    torch.testing.assert_close(squares.double().sum(1), y.double().square().sum(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("activation", [None, "gelu", "silu_glu"])
def test_results_in_eight_bits(numbers, wide, activation):
    x, matrix = numbers(70, 40, dtype=torch.float16), numbers(54, 40, dtype=torch.float16, seed=1)
    given = {"activation": activation}
    expected = linear_triton(x, matrix, **given, dtype=torch.float32)
    found = linear_triton(x, matrix, **given, dtype=torch.float32, code_scale=SCALES, wide=wide)
    if activation:
        assert torch.equal(found[1], expected[1])
        found, expected = found[0], expected[0]
    assert found.scale == SCALES and (found.wide is not None) == wide
    torch.testing.assert_close(found.values.float(), encode(expected, SCALES).float(), rtol=0, atol=0, equal_nan=True)
    assert found.wide is None or torch.equal(found.wide, expected)


def test_results_beyond_the_range_of_eight_bits_are_nan(numbers):
    x = torch.tensor([[447.0], [449.0], [-1e4], [torch.nan], [0.0]], dtype=torch.float16, device=numbers(1).device)
    found = linear_triton(
        x, torch.ones(32, 1, dtype=x.dtype, device=x.device), code_scale=TokenScales.uniform(1.0)
    ).values.float()
    assert found.isnan().all(1).tolist() == [False, True, True, True, False]
    assert found[0].eq(448).all() and found[4].eq(0).all()


@pytest.mark.parametrize("rows", [4, FEW + 6])
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("squares", [False, True])
@pytest.mark.parametrize("given", [(), ("bias",), ("row_scale",), ("bias", "row_scale")], ids=str)
def test_pytorchs_product_is_the_kernels_whatever_the_epilogue(numbers, monkeypatch, rows, overwrite, squares, given):
    """PyTorch's product is a candidate only of the products that it computes, and then gives the kernel's result."""
    operands = {"bias": numbers(64, dtype=torch.float16), "row_scale": numbers(rows, dtype=torch.float32, seed=3).abs()}
    settings = {name: operands[name] for name in given} | {"squares": squares, "overwrite": overwrite}
    x, matrix = numbers(rows, 32, dtype=torch.float16), numbers(64, 32, dtype=torch.float16, seed=1)
    residual, offered = numbers(rows, 64, dtype=torch.float16, seed=2), []

    def last(problem, count, device, candidates, launch, trial=None):
        offered.append(candidates[-1] is kernels.LIBRARY)
        return launch(candidates[-1])

    expected = linear_triton(x, matrix, residual=residual.clone(), **settings)
    monkeypatch.setattr(_launch, "run", last)
    found = linear_triton(x, matrix, residual=residual.clone(), **settings)
    assert offered == [rows <= FEW or not (given or squares)]
    pair = zip(*((t if isinstance(t, tuple) else (t,)) for t in (found, expected)), strict=True)
    (got, want), *sums = pair
    assert error(got, want.double()) <= LOW_PRECISION_RATIO * torch.finfo(torch.float16).eps
    for got, want in sums:
        torch.testing.assert_close(got.sum(1), want.sum(1), rtol=5e-3, atol=0)


@pytest.mark.parametrize("overwrite", [False, True])
def test_gates_and_residuals_of_any_strides(numbers, overwrite):
    x, matrix = numbers(30, 32, dtype=torch.float16), numbers(48, 32, dtype=torch.float16, seed=1)
    other = numbers(48, 30, dtype=torch.float16, seed=2).T
    expected = linear_triton(x, matrix, residual=other.contiguous(), gate=other.contiguous())
    assert torch.equal(linear_triton(x, matrix, residual=other, gate=other, overwrite=overwrite), expected)
