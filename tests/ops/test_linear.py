"""Test linear and its epilogues: every backend against float64 and against plain PyTorch in the same precision."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from dave_fast.errors import BackendError
from dave_fast.ops import _ext, _registry
from dave_fast.ops.activation import GATES, activate_native, activate_ref
from dave_fast.ops.linear import OPERANDS, NativeWeight, _scale_native, _scale_ref, pack_panels
from tests.conftest import ISAS, chosen_backend
from tests.tolerances import LOW_PRECISION_RATIO

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
# what C++ multiplies
OPERAND = {torch.float32: "fp32", torch.bfloat16: "bf16"}
NARROW_OR_SINGLE = list(OPERAND)
SHAPES = [(1, 37, 65), (7, 33, 16), (197, 48, 130)]
ACTIVATIONS = [*GATES, "silu_glu", "gelu_glu_last"]


@pytest.fixture(params=["torch", "onednn", *ISAS])
def linear_backend(request):
    """Yield each form of linear in turn: those of `backend`, and oneDNN through PyTorch."""
    if request.param == "onednn":
        if (reason := _registry.why_not("linear", "onednn", "cpu")) is not None:
            pytest.skip(str(reason))
        yield "onednn"
    else:
        yield from chosen_backend(request.param)


def numbers(*shape, dtype, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def case(shape, dtype):
    rows, inputs, outputs = shape
    x, matrix = numbers(rows, inputs, dtype=dtype, seed=0), numbers(outputs, inputs, dtype=dtype, seed=1)
    bias = numbers(outputs, dtype=dtype, seed=2)
    scale = numbers(rows, dtype=torch.float64, seed=3).abs()
    return x, matrix, bias, scale if dtype == torch.float64 else scale.float()


def run(backend, x, matrix, *args, **epilogue):
    pack = _registry.load("pack_weight", backend)
    return _registry.load("linear", backend)(x, pack(matrix), *args, **epilogue)


def error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


def assert_as_good(found, plain, expected, where=None):
    """Fail, saying where, unless the error against float64 is within the bound beside plain PyTorch's."""
    assert found.shape == expected.shape and found.dtype == plain.dtype, where
    floor = torch.finfo(found.dtype).eps
    assert error(found, expected) <= LOW_PRECISION_RATIO * max(error(plain, expected), floor), where


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_product_with_scale_and_bias(linear_backend, dtype):
    for shape in SHAPES:
        x, matrix, bias, scale = case(shape, dtype)
        expected = scale.double()[:, None] * (x.double() @ matrix.double().T) + bias.double()
        found = run(linear_backend, x, matrix, bias, row_scale=scale)
        assert_as_good(found, F.linear((x * scale[:, None]).to(dtype), matrix, bias), expected, shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_residual_and_gate(linear_backend, dtype):
    for shape in SHAPES:
        x, matrix, _, _ = case(shape, dtype)
        other = numbers(shape[0], shape[2], dtype=dtype, seed=4)
        kept = other.clone()
        product = x.double() @ matrix.double().T
        plain = F.linear(x, matrix)
        found = run(linear_backend, x, matrix, residual=other)
        assert_as_good(found, plain + other, product + other.double(), (shape, "residual"))
        found = run(linear_backend, x, matrix, gate=other)
        assert_as_good(found, plain * other, product * other.double(), (shape, "gate"))
        assert torch.equal(other, kept), shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gates_in_eight_bits_and_sums_of_squares(linear_backend, dtype):
    backend = linear_backend
    x, matrix, _, _ = case((33, 40, 54), dtype)
    eight = torch.arange(33 * 54).view(33, 54).remainder(256).to(torch.uint8)
    gate, product = eight.double() / 255, x.double() @ matrix.double().T
    assert_as_good(run(backend, x, matrix, gate=eight), F.linear(x, matrix) * gate.to(dtype), product * gate)
    other = numbers(33, 54, dtype=dtype, seed=4)
    found, squares = run(backend, x, matrix, residual=other, squares=True)
    assert torch.equal(found, run(backend, x, matrix, residual=other))
    assert squares.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(squares.double().sum(1), found.double().square().sum(1), rtol=1e-5, atol=0)
    row_rstd = _registry.load("row_rstd", "torch" if backend == "onednn" else backend)
    expected = row_rstd(found, 1e-6, centred=True)
    halves = found.to(squares.dtype).square().unflatten(1, (2, -1)).sum(2)
    for sums in (squares, halves):
        torch.testing.assert_close(row_rstd(found, 1e-6, centred=True, squares=sums), expected, rtol=1e-5, atol=0)
    assert torch.equal(row_rstd(found, 1e-6, centred=False, squares=squares), row_rstd(found, 1e-6, centred=False))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activation_and_its_gate(linear_backend, dtype):
    x, matrix, bias, _ = case((33, 40, 54), dtype)
    exact, rounded = F.linear(x.double(), matrix.double(), bias.double()), F.linear(x, matrix, bias)
    for activation in ACTIVATIONS:
        found = run(linear_backend, x, matrix, bias, activation=activation)
        truth, plain = activate_ref(exact, activation), activate_ref(rounded, activation)
        for name, *results in zip(("value", "gate"), found, plain, truth, strict=True):
            assert_as_good(*results, (activation, name))


@pytest.mark.parametrize("activation", list(GATES))
def test_gates_are_the_activation_over_its_argument(activation):
    u = torch.tensor([-30.0, -4.0, -1.3, -0.5, -1e-20, 1e-20, 0.5, 1.3, 4.0, 30.0], dtype=torch.float64)
    value, gate = activate_ref(u, activation)
    by_torch = {
        "gelu": F.gelu(u),
        "gelu_tanh": F.gelu(u, approximate="tanh"),
        "silu": F.silu(u),
        "relu": F.relu(u),
        "quick_gelu": u * torch.sigmoid(1.702 * u),
    }[activation]
    assert torch.allclose(value, by_torch, rtol=1e-12, atol=1e-15)
    assert torch.allclose(gate * u, by_torch, rtol=1e-12, atol=1e-15)


def test_gates_at_zero_and_far_from_it(linear_backend):
    u = torch.tensor([[0.0, -0.0, 200.0, -200.0, 1e4, -1e4, 88.5, -88.5]])
    for activation in GATES:
        _, gate = run(linear_backend, u, torch.eye(8), activation=activation)
        at_zero = 0.0 if activation == "relu" else 0.5
        assert gate[0].tolist() == pytest.approx([at_zero, at_zero, 1, 0, 1, 0, 1, 0], abs=1e-30), activation


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_rstd(backend, dtype):
    for centred in (True, False):
        x = numbers(9, 203, dtype=dtype, seed=5) + (0 if centred else 100)
        wide = x.double()
        variance = wide.square().mean(1) if centred else wide.var(1, correction=0)
        found = _registry.load("row_rstd", backend)(x, 1e-6, centred=centred)
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32), centred
        assert torch.allclose(found.double(), (variance + 1e-6).rsqrt(), rtol=1e-6 if centred else 1e-4), centred


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_and_infinity_propagate_through_an_activation(backend, dtype):
    """NaN and infinity propagate from a whole vector, from a last shorter one, and from either half of a gated MLP."""
    u = numbers(6, 2 * 21, dtype=dtype, seed=6)
    for row, (column, value) in enumerate([(0, torch.nan), (20, torch.nan), (41, torch.nan), (21, -torch.inf)]):
        u[row, column] = value
    u[4, 5], u[4, 25], u[5, 17] = torch.inf, torch.inf, -torch.inf
    for activation in ACTIVATIONS:
        expected = activate_ref(u.double(), activation)
        found = (activate_ref if backend == "torch" else activate_native)(u.clone(), activation)
        for got, want in zip(found, expected, strict=True):
            assert torch.equal(got.isnan(), want.isnan()), activation
            assert torch.equal(got.isinf(), want.isinf()), activation
        assert found[0][:3].isnan().any(1).all(), activation


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_and_infinity_propagate_through_a_norm(backend, dtype):
    for value, centred in itertools.product((torch.nan, torch.inf, -torch.inf), (True, False)):
        x = numbers(3, 37, dtype=dtype, seed=7)
        x[1, 36] = value
        found = _registry.load("row_rstd", backend)(x, 1e-6, centred=centred)
        assert found.isfinite().tolist() == [True, centred and not math.isnan(value), True], (value, centred)
        scale = torch.tensor([1.0, 2.0, torch.nan])
        found = (_scale_ref if backend == "torch" else _scale_native)(x, scale)
        assert torch.equal(found.isnan(), (x * scale[:, None]).isnan()), value
        assert torch.equal(found[1].isinf(), x[1].isinf()), value


# rows, in-features, out-features: several sums of which the last is shorter, panels of which the last is narrower,
# more panels than go together, few rows whose panels the threads share, and many
LONG = [(3, 900, 77), (70, 257, 777), (300, 1031, 50), (1, 257, 23)]


@pytest.fixture(params=ISAS)
def native(request):
    """Yield the extension restricted to each instruction set of this machine."""
    for _ in chosen_backend(request.param):
        yield _ext.module()


@pytest.mark.parametrize("dtype", NARROW_OR_SINGLE, ids=str)
@pytest.mark.parametrize("shape", LONG, ids=str)
@pytest.mark.usefixtures("native")
def test_long_sums_and_every_epilogue_at_once(shape, dtype):
    x, matrix, bias, scale = case(shape, dtype)
    gate, residual = (numbers(shape[0], shape[2], dtype=dtype, seed=seed) for seed in (4, 5))
    expected = scale.double()[:, None] * (x.double() @ matrix.double().T) + bias.double()
    expected = expected * gate.double() + residual.double()
    plain = F.linear((x * scale[:, None]).to(dtype), matrix, bias) * gate + residual
    found = run("native", x, matrix, bias, row_scale=scale, gate=gate, residual=residual)
    assert_as_good(found, plain, expected)


@pytest.mark.parametrize("wide", NARROW_OR_SINGLE, ids=str)
@pytest.mark.parametrize("operand", NARROW_OR_SINGLE, ids=str)
@pytest.mark.usefixtures("native")
def test_operands_and_epilogues_may_differ_in_dtype(operand, wide):
    """x, bias, gate and residual in another dtype than the weights; the result has the residual's, or the weights'."""
    shape = rows, _, outs = 33, 401, 77
    x, matrix, bias, scale = case(shape, wide)
    matrix = matrix.to(operand)
    gate, residual = (numbers(rows, outs, dtype=wide, seed=seed) for seed in (4, 5))
    product = x.to(operand).double() @ matrix.double().T
    expected = scale.double()[:, None] * product + bias.double()
    plain = F.linear(x.to(operand), matrix).to(wide) * scale[:, None].to(wide) + bias
    found = run("native", x, matrix, bias, row_scale=scale, residual=residual)
    assert_as_good(found, plain + residual, expected + residual.double())
    written = residual.clone()
    weight = _registry.load("pack_weight", "native")(matrix)
    linear = _registry.load("linear", "native")
    again = linear(x, weight, bias, row_scale=scale, residual=written, overwrite=True)
    if not isinstance(weight, NativeWeight):
        return
    assert torch.equal(again, found) and again.data_ptr() == written.data_ptr()
    found = linear(x, weight, bias, row_scale=scale, gate=gate)
    assert_as_good(found, (plain * gate).to(operand), expected * gate.double())


@pytest.mark.parametrize("dtype", NARROW_OR_SINGLE, ids=str)
@pytest.mark.parametrize("shape", LONG, ids=str)
@pytest.mark.usefixtures("native")
def test_bits_depend_neither_on_other_rows_nor_on_threads(shape, dtype):
    x, matrix, bias, scale = case(shape, dtype)
    weight, linear = pack_panels(matrix, OPERAND[dtype]), _registry.load("linear", "native")
    whole, gates = linear(x, weight, bias, row_scale=scale, activation="gelu")
    order = torch.randperm(shape[0], generator=torch.Generator().manual_seed(6))
    for rows in (slice(0, 1), slice(1, 6), slice(2, None), order):
        some, some_gates = linear(x[rows], weight, bias, row_scale=scale[rows], activation="gelu")
        assert torch.equal(some, whole[rows]) and torch.equal(some_gates, gates[rows])
    wide = torch.cat([x, x], dim=1)
    assert torch.equal(linear(wide[:, : shape[1]], weight, bias, row_scale=scale, activation="gelu")[0], whole)
    for threads in (2, 3, 4, 8):
        torch.set_num_threads(threads)
        try:
            assert torch.equal(linear(x, weight, bias, row_scale=scale, activation="gelu")[0], whole)
        finally:
            torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", NARROW_OR_SINGLE, ids=str)
@pytest.mark.parametrize("shape", LONG, ids=str)
def test_bits_are_those_of_every_other_x86_instruction_set_that_fuses(shape, dtype):
    """AVX512-BF16's instruction takes subnormal numbers as zero, which no other does: there are none here."""
    if (reason := _ext.unavailable()) is not None:
        pytest.skip(reason)
    x, matrix, bias, scale = case(shape, dtype)
    residual = numbers(shape[0], shape[2], dtype=dtype, seed=5)
    made = {}
    for isa in ("avx512bf16", "avx512vnni", "avx512", "avx2vnni", "avx2"):
        if isa not in _ext.module().usable_isas():
            continue
        for backend in chosen_backend(isa):
            weight, linear = pack_panels(matrix, OPERAND[dtype]), _registry.load("linear", backend)
            made[isa] = [
                linear(x, weight, bias, row_scale=scale, residual=residual),
                *(each for name in GATES for each in linear(x, weight, bias, activation=name)),
            ]
            for centred in (True, False):
                made[isa].append(_registry.load("row_rstd", backend)(x, 1e-6, centred=centred))
    for isa, results in made.items():
        for found, expected in zip(results, next(iter(made.values())), strict=True):
            assert torch.equal(found, expected), isa


@pytest.mark.parametrize("dtype", NARROW_OR_SINGLE, ids=str)
@pytest.mark.usefixtures("native")
def test_nan_and_infinity_propagate_through_a_product(dtype):
    x, matrix, bias, _ = case((9, 300, 50), dtype)
    x[0, 299], x[3, 0], x[4, 7], matrix[49, 1] = torch.nan, torch.inf, -torch.inf, torch.inf
    expected, found = F.linear(x, matrix, bias), run("native", x, matrix, bias)
    assert torch.equal(found.isnan(), expected.isnan()) and expected.isnan().any()
    assert torch.equal(found.isposinf(), expected.isposinf()) and torch.equal(found.isneginf(), expected.isneginf())


@pytest.mark.usefixtures("native")
def test_operands_of_any_strides():
    x, matrix, bias, _ = case((40, 300, 50), torch.float32)
    weight = _registry.load("pack_weight", "native")(matrix.T.contiguous().T)
    linear = _registry.load("linear", "native")
    wide = numbers(40, 100, dtype=torch.float32, seed=4)
    plain = linear(x, weight, bias, residual=wide[:, ::2].contiguous())
    assert torch.equal(linear(x.T.contiguous().T, weight, bias, residual=wide[:, ::2]), plain)
    row = bias.expand(40, 50)
    assert torch.equal(linear(x, weight, gate=row), linear(x, weight, gate=row.contiguous()))


@pytest.mark.parametrize(
    ("operand", "wrong"),
    [
        ("x", torch.ones(4, 30, dtype=torch.float64)),
        ("x", torch.ones(4, 29)),
        ("bias", torch.ones(29)),
        ("row_scale", torch.ones(4, 1)),
        ("gate", torch.ones(4, 30, dtype=torch.float16)),
        ("gate", torch.ones(4, 31)),
        ("residual", torch.ones(30)),
        ("residual", torch.ones(4, 30, dtype=torch.float64)),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.dtype}{list(value.shape)}",
)
@pytest.mark.usefixtures("native")
def test_operands_that_would_be_read_past_are_refused(operand, wrong):
    weight = _registry.load("pack_weight", "native")(torch.eye(30))
    given = {"x": torch.ones(4, 30), operand: wrong}
    with pytest.raises(BackendError, match=f"linear's {operand} is {wrong.dtype}"):
        _registry.load("linear", "native")(given.pop("x"), weight, **given)


@pytest.mark.parametrize("operand", OPERANDS)
def test_weights_of_another_instruction_set_are_refused(native, operand):
    """Where its panels have another width; those of one width may be exchanged, since their products are the same."""
    weight, panel = pack_panels(torch.eye(30), operand), native.linear_panel()
    others = [isa for isa in native.usable_isas() if (native.use_isa(isa), native.linear_panel())[1] != panel]
    if not others:
        pytest.skip("every instruction set of this machine has panels of this width")
    native.use_isa(others[0])
    with pytest.raises(ValueError, match="packed for another instruction set"):
        _registry.load("linear", "native")(torch.eye(30), weight)


@pytest.mark.parametrize("name", ["sine", "gelu_glu_first", "_glu", ""])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.usefixtures("native")
def test_unknown_activation_is_refused_by_name(dtype, name):
    weight = _registry.load("pack_weight", "native")(torch.eye(4, dtype=dtype))
    with pytest.raises(BackendError, match=f"no activation '{name}'; known are gelu, "):
        _registry.load("linear", "native")(torch.ones(2, 4, dtype=dtype), weight, activation=name)
