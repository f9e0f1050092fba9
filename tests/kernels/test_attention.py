"""Test attention and its frozen VJP: the Triton kernels against the formula in float64, and plain PyTorch."""

import pytest
import torch

from dave_fast.kernels import _launch, attention
from dave_fast.kernels.attention import attention_triton, attention_vjp_triton
from dave_fast.ops.attention import attention_ref, attention_vjp_ref
from dave_fast.ops.fp8 import TokenScales
from tests.kernels.conftest import DTYPES, assert_as_good, error

# rows, queries, tokens, heads, head dimension
SHAPES = [
    (1, 1, 1, 1, 8),
    (4, 1, 197, 3, 64),
    (1, 197, 197, 1, 64),
    (1, 257, 257, 1, 16),
    (1, 64, 64, 2, 32),
    (2, 2, 50, 1, 80),
    (1, 49, 33, 2, 9),
    (1, 17, 20, 1, 128),
]


@pytest.fixture(params=[False, True], ids=["masked", "peeled"])
def _form(request, monkeypatch):
    """Select each form of the kernels: every block masked, or only the last one, in separate code."""
    fixed = attention.configurations

    def configurations(*arguments, **settings):
        configuration = fixed(*arguments, **settings)[0]
        configuration.kwargs["PEELED"] = request.param
        return [configuration]

    monkeypatch.setattr(attention, "configurations", configurations)


both_forms = pytest.mark.usefixtures("_form")


def heads(shape, dtype, device, scale=1.0):
    """Return q, k, v (R, tokens, heads, D), strided views of a packed projection, and the output's cotangent."""
    rows, queries, tokens, count, dim = shape
    generator = torch.Generator().manual_seed(0)
    longest = max(queries, tokens)
    packed = scale * torch.randn(rows, longest, 3, count, dim, generator=generator, dtype=torch.float64)
    d_out = torch.randn(rows, queries, count, dim, generator=generator, dtype=torch.float64)
    packed = packed.to(dtype).to(device)
    return packed[:, :queries, 0], packed[:, :tokens, 1], packed[:, :tokens, 2], d_out.to(dtype).to(device)


def by_formula(q, k, v, d_out, scale, bias=None):
    q, k, v, d_out = (t.double().transpose(1, 2) for t in (q, k, v, d_out))
    scores = scale * q @ k.transpose(-1, -2)
    p = (scores if bias is None else scores + bias.double()).softmax(-1)
    return (p @ v).transpose(1, 2), (p.transpose(-1, -2) @ d_out).transpose(1, 2)


def run(q, k, v, d_out, scale, *bias):
    out, saved = attention_triton(q, k, v, scale, *bias)
    return out, attention_vjp_triton(saved, d_out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_formula(shape, dtype, device):
    case, scale = heads(shape, dtype, device), shape[-1] ** -0.5
    # plain PyTorch keeps P
    out, saved = attention_ref(*case[:3], scale)
    plain = out, attention_vjp_ref(saved, case[3])
    for got, want, reference in zip(run(*case, scale), by_formula(*case, scale), plain, strict=True):
        assert got.is_contiguous()
        assert_as_good(got, reference, want)


@both_forms
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 1, 50, 3, 16), (1, 70, 70, 2, 16), (1, 49, 33, 2, 9)], ids=str)
def test_a_bias_is_added_to_the_scores(shape, dtype, device):
    case, scale = heads(shape, dtype, device), shape[-1] ** -0.5
    generator = torch.Generator().manual_seed(5)
    bias = (2 * torch.randn(shape[3], *shape[1:3], generator=generator)).to(dtype).to(device)
    out, saved = attention_ref(*case[:3], scale, bias)
    plain = out, attention_vjp_ref(saved, case[3])
    for got, want, reference in zip(run(*case, scale, bias), by_formula(*case, scale, bias), plain, strict=True):
        assert_as_good(got, reference, want)


@both_forms
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores_do_not_overflow(dtype, device):
    case = heads((1, 70, 70, 2, 16), dtype, device, scale=30.0)
    for got, want in zip(run(*case, 1.0), by_formula(*case, 1.0), strict=True):
        assert got.isfinite().all()
        assert error(got, want) <= (1e-3 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("shape", [(4, 1, 197, 3, 64), (2, 70, 70, 2, 80)], ids=str)
def test_pytorchs_flash_attention_feeds_the_vjp(shape, dtype, device, monkeypatch):
    if device == "cpu":
        on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_flash_attention", on_cpu)
    forward, scale = _launch.run, shape[-1] ** -0.5

    def run_flash(problem, rows, device, candidates, launch):
        flash = problem.startswith("attention ")
        return launch(attention.FLASH) if flash else forward(problem, rows, device, candidates, launch)

    monkeypatch.setattr(_launch, "run", run_flash)
    case = heads(shape, dtype, device)
    out, saved = attention_ref(*case[:3], scale)
    plain = out, attention_vjp_ref(saved, case[3])
    for got, want, reference in zip(run(*case, scale), by_formula(*case, scale), plain, strict=True):
        assert got.is_contiguous()
        assert_as_good(got, reference, want)


def test_cotangents_of_any_strides(device):
    q, k, v, d_out = heads((2, 19, 19, 2, 16), torch.float32, device)
    _, saved = attention_triton(q, k, v, 0.25)
    strided = d_out.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(attention_vjp_triton(saved, strided), attention_vjp_triton(saved, d_out))
    spread = d_out.repeat_interleave(2, dim=-1)[..., ::2]
    assert torch.equal(attention_vjp_triton(saved, spread), attention_vjp_triton(saved, d_out))


def test_nothing_quadratic_is_saved(device):
    q, k, v, _ = heads((1, 300, 300, 1, 8), torch.float32, device)
    _, saved = attention_triton(q, k, v, 0.3)
    kept = [t for t in vars(saved).values() if isinstance(t, torch.Tensor)]
    assert sum(t.numel() for t in kept) == 300 * (8 + 8 + 2)


# the infinite key ends with scores of either sign, of -∞ alone, and of +∞ alone
@both_forms
@pytest.mark.parametrize("queries", [33, 1])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "spot", [("q", 0, 0, 0, 2), ("k", 0, 20, 0, 7), ("k", 0, 32, 0, 7), ("v", 0, 32, 0, 0)], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_nan_and_infinity_propagate(spot, value, queries, dtype, device):
    """NaN appears exactly where the formula has it: in one query's row, one key's head or one component."""
    case = heads((1, queries, 33, 2, 16), dtype, device)
    dict(zip("qkv", case, strict=False))[spot[0]][spot[1:]] = value
    for got, want in zip(run(*case, 0.3), by_formula(*case, 0.3), strict=True):
        assert torch.equal(got.isnan(), want.isnan())


def test_unsupported_inputs_go_to_pytorch(device):
    for dtype, dim, scale in [(torch.float64, 16, 0.3), (torch.float32, 144, 0.3), (torch.float32, 16, -0.3)]:
        case = heads((1, 9, 9, 1, dim), dtype, device)
        for got, want in zip(run(*case, scale), by_formula(*case, scale), strict=True):
            assert error(got, want) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 19, 33, 2, 16), (3, 1, 40, 2, 20)], ids=str)
def test_results_in_eight_bits(shape, dtype, device):
    q, k, v, d_out = heads(shape, dtype, device)
    expected, saved = attention_triton(q, k, v, 0.25)
    expected_vjp = attention_vjp_triton(saved, d_out)
    scales = [TokenScales(0.125, 2.0**-5, tokens, 1) for tokens in (q.shape[1], k.shape[1])]
    found, saved = attention_triton(q, k, v, 0.25, code_scale=scales[0])
    pairs = ((found, expected), (attention_vjp_triton(saved, d_out, code_scale=scales[1]), expected_vjp))
    for scale, (got, want) in zip(scales, pairs, strict=True):
        assert got.scale == scale and got.dtype == dtype and got.wide is None and got.values.shape == want.shape
        # codes come of the sum in float32, the other result was rounded to its dtype first
        values = got.values.double().flatten(0, 1).flatten(1)
        assert error(values * scale.rows(values), want.double().flatten(0, 1).flatten(1)) <= 2**-4
    tiny = TokenScales.uniform(2.0**-20)
    assert attention_triton(q, k, v, 0.25, code_scale=tiny)[0].values.float().isnan().any()
