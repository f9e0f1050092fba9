"""Test products of eight-bit integers: the reference against the definition, C++ against the reference bit for bit."""

import itertools
import math
from fractions import Fraction

import pytest
import torch

from dave_fast.errors import BackendError
from dave_fast.ops import _ext, _registry
from dave_fast.ops.activation import GATES, activate_ref
from dave_fast.ops.int8 import GROUP, fused, linear_int8_ref, pack_int8_ref, quantise
from dave_fast.ops.linear import linear_native, pack_panels
from tests.conftest import ISAS, chosen_backend

DTYPES = [torch.float32, torch.bfloat16]
# rows, in-features, out-features: one of each; no whole word, group or panel; several groups; many rows
# absolute error of Φ for results in bfloat16 (csrc/gates.h)
COARSE = 6e-5
SHAPES = [(1, 1, 1), (3, 5, 7), (1, GROUP, 1), (7, GROUP - 1, 65), (9, GROUP + 1, 130), (33, 1537, 77), (300, 130, 50)]


@pytest.fixture(params=ISAS)
def isa(request):
    """Take each instruction set of this machine in turn."""
    for _ in chosen_backend(request.param):
        yield request.param


def numbers(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def case(shape, dtype):
    """Return x with a row of zeros, NaN, infinity, subnormal and huge values among others, and a matrix."""
    rows, ins, outs = shape
    x, matrix = numbers(rows, ins, dtype=dtype), numbers(outs, ins, seed=1)
    if rows > 6:
        x[1], x[2, -1], x[3, 0], x[4], x[5] = 0, torch.nan, torch.inf, x[4] * 1e-39, x[5] * 1e35
    matrix[outs // 2] = 0
    return x, matrix


def epilogues(shape, dtype):
    """Return every epilogue without an activation."""
    rows, _, outs = shape
    bias, scale = numbers(outs, dtype=dtype, seed=2), numbers(rows, seed=3).abs()
    gate, residual = (numbers(rows, outs, dtype=dtype, seed=seed) for seed in (4, 5))
    every = {"row_scale": scale, "bias": bias, "gate": gate, "residual": residual}
    return [dict(each) for n in range(5) for each in itertools.combinations(every.items(), n)]


def assert_same(found, expected, where=None):
    """Fail unless every bit is the same; a NaN is as good as another."""
    assert found.dtype == expected.dtype and torch.equal(found.isnan(), expected.isnan()), where
    integer = {2: torch.int16, 4: torch.int32}[found.itemsize]
    different = (found.view(integer) != expected.view(integer)) & ~found.isnan()
    assert not different.any(), where


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_reference_is_the_definition(dtype):
    for shape in SHAPES:
        x, matrix, (rows, _, outs) = numbers(*shape[:2], dtype=dtype), numbers(*shape[:0:-1], seed=1), shape
        weight = pack_int8_ref(matrix)
        step = matrix.double().abs().amax(1, keepdim=True) / 127
        assert weight.codes.dtype == torch.int8 and ((weight.codes - matrix / step).abs() <= 0.5 + 1e-4).all(), shape
        expected = torch.zeros(rows, outs, dtype=torch.float64)
        for part, codes in zip(x.double().split(GROUP, 1), weight.codes.double().split(GROUP, 1), strict=True):
            scale = part.abs().amax(1, keepdim=True) / 127
            integers = quantise(part.float())[0]
            assert ((integers - part / scale).abs() <= 0.5 + 1e-4).all(), shape
            expected += scale * (integers.double() @ codes.T)
        found = linear_int8_ref(x, weight, residual=torch.zeros(rows, outs))
        torch.testing.assert_close(found.double(), expected * step.T, rtol=1e-5, atol=1e-5)


def test_quantised_values_are_off_by_half_a_step():
    x = torch.cat([numbers(50, 384), numbers(50, 384, seed=1) * 1e30, numbers(50, 384, seed=2) * 1e-29])
    codes, scale = quantise(x)
    assert codes.abs().amax(1).eq(127).all() and codes.eq(codes.round()).all()
    off = (codes.double() * scale.double()[:, None] - x.double()).abs()
    assert (off <= 0.500001 * scale.double()[:, None]).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_errors_are_those_of_eight_bits(dtype):
    """A uniform error of a step in each operand, of at most 1/127 of the largest of 384 normal deviates: about 1 %."""
    x, matrix = numbers(64, 768, dtype=dtype), numbers(64, 768, seed=1)
    exact = x.double() @ matrix.double().T
    found = linear_int8_ref(x, pack_int8_ref(matrix), residual=torch.zeros(64, 64))
    assert 0.005 < ((found.double() - exact).norm() / exact.norm()).item() < 0.015


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpp_has_the_bits_of_the_reference(isa, dtype):
    for shape in SHAPES:
        x, matrix = case(shape, dtype)
        weight, packed = pack_int8_ref(matrix), pack_panels(matrix, "int8")
        for settings in epilogues(shape, dtype):
            given, bias = dict(settings), settings.get("bias")
            given.pop("bias", None)
            expected = linear_int8_ref(x, weight, bias, **given)
            assert_same(linear_native(x, packed, bias, **given), expected, (shape, list(settings)))


def test_operands_of_the_epilogue_may_have_either_dtype(isa):
    rows, outs = 9, 37
    x, matrix = case((rows, 500, outs), torch.bfloat16)
    weight, packed = pack_int8_ref(matrix), pack_panels(matrix, "int8")
    for gate, residual in itertools.product((None, *DTYPES), repeat=2):
        given = {
            name: numbers(rows, outs, dtype=dtype, seed=seed)
            for seed, (name, dtype) in enumerate((("gate", gate), ("residual", residual)))
            if dtype is not None
        }
        expected = linear_int8_ref(x, weight, **given)
        assert expected.dtype == (residual or torch.bfloat16)
        assert_same(linear_native(x, packed, **given), expected, (gate, residual))
        if residual is not None:
            written = given["residual"].clone()
            found = linear_native(x, packed, **{**given, "residual": written}, overwrite=True)
            assert found.data_ptr() == written.data_ptr()
            assert_same(found, expected, (gate, residual))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations_are_within_bfloat16s_rounding(isa, dtype):
    x, matrix = numbers(33, 401, dtype=dtype), numbers(54, 401, seed=1) / 10
    bias = numbers(54, dtype=dtype, seed=2)
    weight, packed = pack_int8_ref(matrix), pack_panels(matrix, "int8")
    u = linear_int8_ref(x, weight, bias, residual=torch.zeros(33, 54)).double()
    eps = torch.finfo(torch.bfloat16).eps
    for activation in (*GATES, "silu_glu", "gelu_glu_last"):
        value, gate = linear_native(x, packed, bias, activation=activation)
        assert value.dtype == gate.dtype == torch.bfloat16, activation
        expected, expected_gate = activate_ref(u, activation)
        # GELU's gate is off by COARSE; a gated MLP's halves are rounded before they meet
        far, rounding = u.abs().amax(), (2 if "glu" in activation else 0.5) * eps
        limit = COARSE * far if "glu" in activation else COARSE
        assert ((gate - expected_gate).abs() <= limit + rounding * expected_gate.abs()).all(), activation
        assert ((value - expected).abs() <= limit * far + 1.01 * rounding * expected.abs()).all(), activation


def test_nan_and_infinity_make_nan_of_their_row_and_group_alone(isa):
    for dtype, value, at in itertools.product(DTYPES, (torch.nan, torch.inf, -torch.inf), (0, GROUP, 2 * GROUP + 4)):
        x, matrix = numbers(8, 2 * GROUP + 5, dtype=dtype), numbers(9, 2 * GROUP + 5, seed=1)
        x[3, at] = value
        found = linear_native(x, pack_panels(matrix, "int8"))
        assert found[3].isnan().all() and found.isnan().any(1).tolist() == [i == 3 for i in range(8)], (value, at)
        matrix[4, at] = value
        found = linear_native(x[:3], pack_panels(matrix, "int8"))
        assert found.isnan().all(0).tolist() == found.isnan().any(0).tolist() == [i == 4 for i in range(9)], (value, at)


def test_zeros_and_what_is_below_the_smallest_are_zero(isa):
    matrix = numbers(9, 50, seed=1)
    for x in (torch.zeros(3, 50), torch.full((3, 50), 2.0**-101), torch.full((3, 50), 1e-42)):
        assert not linear_native(x, pack_panels(matrix, "int8")).any()
        assert not linear_int8_ref(x, pack_int8_ref(matrix)).any()
        assert not linear_native(matrix, pack_panels(x, "int8")).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_of_a_row_depend_neither_on_the_batch_nor_on_threads(isa, dtype):
    for shape in [(40, 2 * GROUP + 3, 77), (200, 40, 300)]:
        x, matrix = case(shape, dtype)
        packed, scale = pack_panels(matrix, "int8"), numbers(shape[0], seed=3).abs()
        settings = {"bias": numbers(shape[2], seed=2), "activation": "gelu"}
        whole = linear_native(x, packed, row_scale=scale, **settings)
        order = torch.randperm(shape[0], generator=torch.Generator().manual_seed(6))
        for rows in (order, torch.tensor([7]), torch.arange(3, 20), order[:13]):
            some = linear_native(x[rows], packed, row_scale=scale[rows], **settings)
            for found, expected in zip(some, whole, strict=True):
                assert_same(found, expected[rows], shape)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            try:
                again = linear_native(x, packed, row_scale=scale, **settings)
            finally:
                torch.set_num_threads(1)
            for found, expected in zip(again, whole, strict=True):
                assert_same(found, expected, (shape, threads))


def test_activations_have_the_same_bits_wherever_products_are_fused():
    """All instruction sets but x86's baseline, which has no fused multiply-add."""
    x, matrix = case((33, 401, 54), torch.bfloat16)
    made = {}
    for name in ISAS:
        if name == "baseline" or name not in _ext.module().usable_isas():
            continue
        for _ in chosen_backend(name):
            packed = pack_panels(matrix, "int8")
            made[name] = [each for a in GATES for each in linear_native(x, packed, activation=a)]
    first, *others = made.values()
    for other, name in zip(others, list(made)[1:], strict=True):
        for found, expected in zip(other, first, strict=True):
            assert_same(found, expected, name)


@pytest.mark.parametrize(
    ("operand", "wrong"),
    [
        ("x", torch.ones(4, 30, dtype=torch.float64)),
        ("x", torch.ones(4, 29)),
        ("bias", torch.ones(29)),
        ("row_scale", torch.ones(4, 1)),
        ("row_scale", torch.ones(4, dtype=torch.bfloat16)),
        ("gate", torch.ones(4, 29)),
        ("gate", torch.ones(4, 30, dtype=torch.float16)),
        ("residual", torch.ones(30)),
        ("residual", torch.ones(4, 30, dtype=torch.float64)),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.dtype}{list(value.shape)}",
)
def test_operands_that_would_be_read_past_are_refused(operand, wrong):
    given = {"x": torch.ones(4, 30), operand: wrong}
    with pytest.raises(BackendError, match=f"linear's {operand} is {wrong.dtype}"):
        linear_native(given.pop("x"), pack_panels(torch.eye(30), "int8"), **given)


def test_weights_are_rounded_once_from_any_dtype():
    """A matrix in float64 is that of its float32 numbers; one in bfloat16 its own."""
    matrix = numbers(9, 50, dtype=torch.float64)
    for dtype in (torch.float64, torch.bfloat16):
        given = matrix.to(dtype)
        assert torch.equal(pack_panels(given, "int8").words, pack_panels(given.float(), "int8").words)
        assert torch.equal(pack_int8_ref(given).codes, pack_int8_ref(given.float()).codes)


def exact_float(value: Fraction) -> float:
    """Return the float32 number that is nearest to a rational one, ties to even."""
    if value == 0:
        return 0.0
    exponent = max(math.floor(math.log2(abs(value))) - 23, -149)
    # log2 may be off by one next to a power of two
    while abs(value) >= Fraction(2) ** (exponent + 24):
        exponent += 1
    while exponent > -149 and abs(value) < Fraction(2) ** (exponent + 23):
        exponent -= 1
    # Python rounds halves of fractions to even
    return float(round(value / Fraction(2) ** exponent) * Fraction(2) ** exponent)


def test_fused_is_exact_arithmetic_rounded_once():
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(3, 4000, generator=generator)).unbind()
    power = torch.randint(-30, 31, (4000,), generator=generator).float().exp2()
    # sums next to a tie of float32, decided by what float64 loses: a·b of 2⁻²⁴ of c, off by little
    whole = torch.randint(2**22, 2**23, (4000,), generator=generator).float()
    ones = torch.randint(-2, 3, (4000,), generator=generator).float()
    adversarial = (0.5 + ones * 2.0**-24, torch.ones(4000) + ones.flip(0) * 2.0**-23, whole)
    tiny = (torch.full((4000,), 2.0**-60), ones * 2.0**-60, 1 + torch.arange(4000) * 2.0**-23)
    cancelling = (a, b, -(a * b))
    for x, y, z in ((a, b, c), (a * power, b, c), adversarial, tiny, cancelling):
        expected = [
            exact_float(Fraction(i) * Fraction(j) + Fraction(k))
            for i, j, k in zip(x.tolist(), y.tolist(), z.tolist(), strict=True)
        ]
        assert torch.equal(fused(x, y, z), torch.tensor(expected, dtype=torch.float64).float())


def test_fused_keeps_nan_and_infinity():
    a = torch.tensor([torch.nan, torch.inf, 1.0, torch.inf, 3e38])
    c = torch.tensor([1.0, 1.0, torch.nan, -torch.inf, 3e38])
    found = fused(a, torch.ones(5), c)
    assert found.isnan().tolist() == [True, False, True, True, False] and found[1] == found[4] == torch.inf


def test_there_are_forms_for_cpus_alone():
    for op in ("linear_int8", "pack_weight_int8"):
        assert _registry.choose(op, "auto", "cpu") == "native" and set(_registry.IMPLEMENTATIONS[op]) == {
            "torch",
            "native",
        }
