"""Test properties of the ops for inputs by Hypothesis, in every backend: adjoints, symmetries, bounds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dave_fast.ops import _registry
from dave_fast.ops.patches import patchify
from dave_fast.ops.perturb import perturb
from dave_fast.ops.pull_back import pull_back
from dave_fast.ops.robust_mean import robust_mean
from dave_fast.ops.smooth import smooth
from dave_fast.sampling import draw
from tests.ops.test_perturb import WIDE, silent

# the same examples in every run; the instruction set stays what the fixture chose, whatever the example
some = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
seeds = st.integers(0, 2**31 - 1)
sizes = st.integers(1, 4)


def numbers(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@st.composite
def whole_numbers(draw_, odd: bool = False) -> torch.Tensor:
    """Draw (1, S, pixels) small whole numbers: their sums are exact in any order, and no distance is near the limit.

    The limit is 3.7065·mad + 2.5e-8; below a mad of 2000, 3.7065·mad is no whole number, so that neither the
    rounding nor the 2.5e-8 decides what is kept.
    """
    samples, pixels = draw_(st.integers(0, 12)) * (2 if odd else 1) + 1, draw_(st.integers(1, 40))
    limit = draw_(st.sampled_from([1, 5, 100]))
    generator = torch.Generator().manual_seed(draw_(seeds))
    return torch.randint(-limit, limit + 1, (1, samples, pixels), generator=generator).float()


@some
@given(sizes, sizes, st.tuples(st.integers(1, 9), st.integers(1, 9)), st.integers(1, 3), seeds, st.booleans())
def test_pull_back_is_the_adjoint_of_perturb(pixel_backend, rows, columns, patch, channels, seed, wide):
    height, width = rows * patch[0], columns * patch[1]
    images = numbers(2, channels, height, width, seed=seed, dtype=torch.float64)
    sampling = {"sampling": WIDE} if wide else {}
    draws = silent(draw(2, height=height, width=width, seed=seed, image_keys=[1, 2], **sampling))
    y = patchify(numbers(len(draws), channels, height, width, seed=seed + 1, dtype=torch.float64), patch)
    there = perturb(images, draws, patch, dtype=torch.float64, backend=pixel_backend) * y
    back = pull_back(y, torch.ones_like(images), draws, patch, backend=pixel_backend) * images[draws.image_index]
    assert float(there.sum() - back.sum()) == pytest.approx(0, abs=1e-12 * float(there.abs().sum() + 1))


@some
@given(whole_numbers(), seeds)
def test_the_order_of_samples_does_not_matter(pixel_backend, values, seed):
    order = torch.randperm(values.shape[1], generator=torch.Generator().manual_seed(seed))
    assert torch.equal(robust_mean(values[:, order], backend=pixel_backend), robust_mean(values, backend=pixel_backend))


@some
@given(whole_numbers(), st.integers(-8, 8))
def test_robust_mean_commutes_with_powers_of_two(pixel_backend, values, power):
    factor = 2.0**power
    whole = robust_mean(values, backend=pixel_backend)
    assert torch.equal(robust_mean(factor * values, backend=pixel_backend), factor * whole)


@some
@given(whole_numbers(odd=True))
def test_robust_mean_commutes_with_the_sign(pixel_backend, values):
    """The mean changes its sign with odd S; with even S the sign would swap the lower and the upper median."""
    assert torch.equal(robust_mean(-values, backend=pixel_backend), -robust_mean(values, backend=pixel_backend))


@some
@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=25))
def test_robust_mean_is_between_the_values(pixel_backend, values):
    contributions = torch.tensor(values)
    raw = float(robust_mean(contributions.view(1, -1, 1), backend=pixel_backend))
    assert float(contributions.min()) <= raw <= float(contributions.max())


@some
@given(st.integers(1, 3), st.integers(1, 12), st.integers(1, 20), seeds, st.sampled_from([1e-4, 0.1, 50.0]))
def test_maps_are_shares_of_their_peak(pixel_backend, channels, height, width, seed, scale):
    raw = scale * numbers(2, channels, height, width, seed=seed)
    maps = smooth(raw, backend=pixel_backend)
    assert float(maps.min()) >= 0
    for image, found in zip(raw, maps, strict=True):
        assert float(found.max()) == (1 if bool((image.sum(0) > 0).any()) else 0)
        # a map depends neither on the other images nor on negative values
        assert torch.equal(smooth(image[None], backend=pixel_backend)[0], found)
    whole = raw.sum(1, keepdim=True)
    assert torch.equal(smooth(whole.clamp(min=0), backend=pixel_backend), smooth(whole, backend=pixel_backend))


@some
@given(st.integers(1, 12), st.integers(1, 20), seeds)
def test_smooth_commutes_with_reflections(pixel_backend, height, width, seed):
    raw = 0.1 * numbers(1, 1, height, width, seed=seed, dtype=torch.float64)
    maps = smooth(raw, backend=pixel_backend)
    for turned, expected in ((raw.mT, maps.mT), (raw.flip(-1), maps.flip(-1)), (raw.flip(-2), maps.flip(-2))):
        torch.testing.assert_close(smooth(turned.contiguous(), backend=pixel_backend), expected, rtol=0, atol=1e-11)


@st.composite
def attentions(draw_) -> dict[str, torch.Tensor]:
    """Draw q, k, v and two cotangents in float32: scores from flat to one-hot, token counts with P stored and not."""
    rows, queries, heads = draw_(st.integers(1, 2)), draw_(st.integers(1, 60)), draw_(st.integers(1, 3))
    tokens, dim = draw_(st.one_of(st.integers(1, 70), st.integers(399, 403))), draw_(st.integers(1, 40))
    seed, scale = draw_(seeds), draw_(st.sampled_from([0.1, 1.0, 10.0]))
    by_queries, by_tokens = (rows, queries, heads, dim), (rows, tokens, heads, dim)
    shapes = {"q": by_queries, "k": by_tokens, "v": by_tokens, "d_out": by_queries, "other": by_queries}
    case = {name: numbers(*shape, seed=seed + i) for i, (name, shape) in enumerate(shapes.items())}
    return case | {"q": scale * case["q"]}


@some
@given(attentions())
def test_attention_weights_sum_to_one(backend, case):
    """Rows of P sum to one: the output of a constant v is v, and the sum of dv is that of the cotangent."""
    forward, vjp = _registry.load("attention", backend), _registry.load("attention_vjp", backend)
    constant = case["v"][:, :1].expand_as(case["v"])
    out, saved = forward(case["q"], case["k"], constant, 0.3)
    torch.testing.assert_close(out, constant[:, :1].expand_as(out), rtol=1e-4, atol=1e-4)
    d_v = vjp(saved, case["d_out"])
    torch.testing.assert_close(d_v.sum(1), case["d_out"].sum(1), rtol=1e-4, atol=1e-3)


@some
@given(attentions(), st.floats(-4, 4))
def test_attention_vjp_is_linear_and_the_adjoint(backend, case, factor):
    forward, vjp = _registry.load("attention", backend), _registry.load("attention_vjp", backend)
    out, saved = forward(case["q"], case["k"], case["v"], 0.3)
    first, second = vjp(saved, case["d_out"]), vjp(saved, case["other"])
    together = vjp(saved, factor * case["d_out"] + case["other"])
    torch.testing.assert_close(together, factor * first + second, rtol=1e-4, atol=1e-3)
    there, back = out.double() * case["d_out"], case["v"].double() * first
    assert float(there.sum() - back.sum()) == pytest.approx(0, abs=1e-4 * float(there.abs().sum() + 1))


@some
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), seeds)
def test_linear_is_linear(backend, rows, inputs, outputs, seed):
    x, other = numbers(rows, inputs, seed=seed), numbers(rows, inputs, seed=seed + 1)
    scale, residual = numbers(rows, seed=seed + 2), numbers(rows, outputs, seed=seed + 3)
    weight = _registry.load("pack_weight", backend)(numbers(outputs, inputs, seed=seed + 4))
    linear = _registry.load("linear", backend)
    y = linear(x, weight)
    torch.testing.assert_close(linear(x + other, weight), y + linear(other, weight), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(linear(x, weight, row_scale=scale), scale[:, None] * y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(linear(x, weight, residual=residual), y + residual, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(linear(x, weight, gate=residual), y * residual, rtol=1e-4, atol=1e-4)
