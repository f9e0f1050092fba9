"""Every rule against a slope that can be worked out by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.tolerances import EXACT
from tests.toys import frozen_vjp, normal, relative, slope


def test_a_linear_model_is_its_weight() -> None:
    weight = normal(3, 5)
    gradient = slope(lambda x: x @ weight.T, normal(2, 5), torch.tensor([0.0, 1.0, 0.0]))
    assert torch.equal(gradient, weight[1].expand(2, 5))


GATES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "relu": (F.relu, lambda u: (u > 0).double()),
    "relu-method": (lambda u: u.relu(), lambda u: (u > 0).double()),
    "relu-in-place": (lambda u: F.relu(u * 1, inplace=True), lambda u: (u > 0).double()),
    "relu-module-in-place": (lambda u: nn.ReLU(inplace=True)(u + 0), lambda u: (u > 0).double()),
    "relu-mask": (lambda u: u * (u > 0), lambda u: (u > 0).double()),
    "relu-where": (lambda u: torch.where(u > 0, u, 0.0), lambda u: (u > 0).double()),
    "relu-clamp": (lambda u: u.clamp(min=0), lambda u: (u > 0).double()),
    "relu-maximum": (lambda u: torch.maximum(u, torch.zeros_like(u)), lambda u: (u > 0).double()),
    "leaky-relu": (lambda u: F.leaky_relu(u, 0.2), lambda u: torch.where(u > 0, torch.ones_like(u), 0.2)),
    "gelu": (F.gelu, lambda u: torch.special.ndtr(u)),
    "gelu-by-hand": (lambda u: 0.5 * u * (1 + torch.erf(u / 2**0.5)), lambda u: torch.special.ndtr(u)),
    "gelu-aten": (torch.ops.aten.gelu.default, lambda u: torch.special.ndtr(u)),
    "gelu-tanh": (
        lambda u: F.gelu(u, approximate="tanh"),
        lambda u: 0.5 * (1 + torch.tanh(0.7978845608028654 * (u + 0.044715 * u**3))),
    ),
    "gelu-tanh-by-hand": (
        lambda u: 0.5 * u * (1.0 + torch.tanh(0.7978845608028654 * (u + 0.044715 * torch.pow(u, 3)))),
        lambda u: 0.5 * (1 + torch.tanh(0.7978845608028654 * (u + 0.044715 * u**3))),
    ),
    "silu": (F.silu, torch.sigmoid),
    "silu-in-place": (lambda u: F.silu(u + 0, inplace=True), torch.sigmoid),
    "silu-by-hand": (lambda u: u * torch.sigmoid(u), torch.sigmoid),
    "silu-by-hand-in-place": (lambda u: (u + 0).mul_(u.sigmoid()), torch.sigmoid),
    "silu-exponential": (lambda u: u / (1 + torch.exp(-u)), torch.sigmoid),
    "quick-gelu": (lambda u: u * torch.sigmoid(1.702 * u), lambda u: torch.sigmoid(1.702 * u)),
    "mish": (F.mish, lambda u: torch.tanh(F.softplus(u))),
    "mish-by-hand": (lambda u: u * torch.tanh(F.softplus(u)), lambda u: torch.tanh(F.softplus(u))),
    "hardswish": (F.hardswish, lambda u: F.relu6(u + 3) / 6),
    "hardswish-by-hand": (lambda u: u * F.hardsigmoid(u), lambda u: F.relu6(u + 3) / 6),
    "relu6": (lambda u: F.relu6(9 * u), lambda u: F.relu6(9 * u) / u),
    "elu": (F.elu, lambda u: F.elu(u) / u),
    "tanh": (torch.tanh, lambda u: torch.tanh(u) / u),
    "softsign": (F.softsign, lambda u: 1 / (1 + u.abs())),
    "squared-relu": (lambda u: F.relu(u) ** 2, F.relu),
    "glu": (
        lambda u: F.glu(torch.cat([u, 3 * u], -1)),
        lambda u: torch.sigmoid(3 * u),
    ),
    "identity-power": (lambda u: u**1, torch.ones_like),
}


@pytest.mark.parametrize("name", GATES)
def test_gates(name: str) -> None:
    function, gate = GATES[name]
    x, cotangent = normal(4, 33), normal(4, 33, seed=1)
    assert relative(slope(function, x, cotangent), gate(x) * cotangent) < EXACT


@pytest.mark.parametrize(
    ("function", "limit"),
    [(F.gelu, 0.5), (F.silu, 0.5), (F.relu, 0.0), (F.mish, 0.6), (F.hardswish, 0.5), (torch.tanh, 1.0)],
)
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_a_gate_at_zero_is_its_limit(function: Callable[[Tensor], Tensor], limit: float, zero: float) -> None:
    gradient = slope(function, torch.full((1, 3), zero, dtype=torch.float64), torch.ones(1, 3))
    assert torch.allclose(gradient, torch.full((1, 3), limit, dtype=torch.float64), atol=1e-15)


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "multiply": lambda a, b: F.silu(a) * b,
    "other-way-round": lambda a, b: b * F.silu(a),
    "torch.mul": lambda a, b: torch.mul(F.silu(a), other=b),
    "in-place": lambda a, b: F.silu(a).mul_(b),
    "in-place-value": lambda a, b: (b + 0).mul_(F.silu(a)),
    "augmented": lambda a, b: _augmented(F.silu(a), b),
    "expanded-as-the-value": lambda a, b: b * F.silu(a).expand_as(b),
    "in-the-form-of-the-value": lambda a, b: F.silu(a).type_as(b).reshape_as(b).view_as(b) * b,
    "reshaped": lambda a, b: (F.silu(a).view(-1, 1, 6) * b[:, None]).squeeze(1),
    "dropped-out-and-scaled": lambda a, b: 2 * F.dropout(F.silu(a), 0.5, training=False) * (b / 2),
    "einsum": lambda a, b: torch.einsum("bi,bi->bi", F.silu(a), b),
    "addcmul": lambda a, b: torch.addcmul(torch.zeros_like(b), F.silu(a), b),
}


def _augmented(gate: Tensor, value: Tensor) -> Tensor:
    gate *= value
    return gate


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_gated_product_passes_to_the_value_alone(name: str) -> None:
    x, cotangent = normal(3, 12), normal(3, 6, seed=1)
    a, b = x.chunk(2, dim=1)
    gradient = slope(lambda x: PRODUCTS[name](*x.chunk(2, dim=1)), x, cotangent)
    assert torch.equal(gradient[:, :6], torch.zeros(3, 6, dtype=torch.float64)), b.shape
    assert relative(gradient[:, 6:], F.silu(a) * cotangent) < EXACT


def test_a_sigmoid_gate_freezes_even_beside_an_activation() -> None:
    x, cotangent = normal(3, 12), normal(3, 6, seed=1)
    a, b = x.chunk(2, dim=1)
    gradient = slope(lambda x: F.gelu(x[:, :6]) * torch.sigmoid(x[:, 6:]), x, cotangent)
    expected = torch.special.ndtr(a) * torch.sigmoid(b) * cotangent
    assert relative(gradient[:, :6], expected) < EXACT and not gradient[:, 6:].any()


def test_a_channel_gate_that_takes_the_shape_of_its_value_freezes() -> None:
    x, cotangent = normal(2, 3, 4, 4), normal(2, 3, 4, 4, seed=1)
    gate = torch.sigmoid(x.mean((2, 3), keepdim=True))
    gradient = slope(lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)).expand_as(x), x, cotangent)
    assert relative(gradient, gate * cotangent) < EXACT


def _scale(x: Tensor, eps: float, centre: bool) -> Tensor:
    x = x - x.mean(-1, keepdim=True) if centre else x
    return 1 / (x.square().mean(-1, keepdim=True) + eps).sqrt()


_WEIGHT, _BIAS = normal(6, seed=2), normal(6, seed=3)


class HandNorm(nn.Module):
    """Layer norm from mean, var and pow."""

    def forward(self, x: Tensor) -> Tensor:
        y = (x - x.mean(-1, keepdim=True)) * (x.var(-1, unbiased=False, keepdim=True) + 1e-5).pow(-0.5)
        return y * _WEIGHT + _BIAS


NORMS: dict[str, tuple[Callable[[Tensor], Tensor], bool, float]] = {
    "layer-norm": (lambda x: F.layer_norm(x, (6,), _WEIGHT, _BIAS), True, 1e-5),
    "layer-norm-native": (lambda x: torch.native_layer_norm(x, (6,), _WEIGHT, _BIAS, 1e-5)[0], True, 1e-5),
    "layer-norm-torch": (lambda x: torch.layer_norm(x, (6,), _WEIGHT, _BIAS, 1e-3), True, 1e-3),
    "layer-norm-by-hand": (HandNorm(), True, 1e-5),
    "rms-norm": (lambda x: F.rms_norm(x, (6,), _WEIGHT, 1e-3), False, 1e-3),
    "rms-norm-eps-of-the-dtype": (
        lambda x: F.rms_norm(x, (6,), _WEIGHT),
        False,
        torch.finfo(torch.float64).eps,
    ),
    "rms-norm-by-hand": (
        lambda x: _WEIGHT * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3)),
        False,
        1e-3,
    ),
    "rms-norm-division": (
        lambda x: _WEIGHT * (x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-3)),
        False,
        1e-3,
    ),
    "rms-norm-of-a-norm": (lambda x: _WEIGHT * x / (x.norm(dim=-1, keepdim=True) * 6**-0.5), False, 0.0),
    "normalize": (lambda x: F.normalize(x, dim=-1) * 6**0.5 * _WEIGHT, False, 0.0),
    "vector-norm": (
        lambda x: x * (torch.linalg.vector_norm(x, dim=-1, keepdim=True) ** -1) * 6**0.5 * _WEIGHT,
        False,
        0.0,
    ),
    "group-norm": (
        lambda x: F.group_norm(x.view(-1, 1, 6), 1).view(-1, 6) * _WEIGHT,
        True,
        1e-5,
    ),
    "instance-norm": (
        lambda x: F.instance_norm(x.view(1, -1, 6)).view(-1, 6) * _WEIGHT,
        True,
        1e-5,
    ),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms_keep_their_scale(name: str) -> None:
    function, centre, eps = NORMS[name]
    x, cotangent = normal(4, 6), normal(4, 6, seed=1)
    expected = _scale(x, eps, centre) * (cotangent * _WEIGHT)
    if centre:
        expected = expected - expected.mean(-1, keepdim=True)
    assert relative(slope(function, x, cotangent), expected) < EXACT


def test_group_norm_with_weights() -> None:
    norm = nn.GroupNorm(2, 6).double().eval()
    nn.init.normal_(norm.weight)
    x, cotangent = normal(2, 6, 3, 3), normal(2, 6, 3, 3, seed=1)
    output, _ = frozen_vjp(norm, x, lambda y: y.flatten(1).sum(1))
    assert relative(output, norm(x)) < EXACT
    weighted = (cotangent * norm.weight.detach().view(1, 6, 1, 1)).reshape(2, 2, -1)
    centred = weighted - weighted.mean(-1, keepdim=True)
    r = (x.reshape(2, 2, -1).var(-1, unbiased=False, keepdim=True) + 1e-5).rsqrt()
    assert relative(slope(norm, x, cotangent), (r * centred).view_as(x)) < EXACT


def test_batch_norm_is_linear_for_every_layout_of_the_cotangent() -> None:
    norm = nn.BatchNorm2d(3).double().eval()
    nn.init.normal_(norm.weight)
    weight, x = normal(3, 16, seed=2), normal(2, 3, 4, 4)
    gradient = slope(lambda x: (norm(x).flatten(2).transpose(1, 2) * weight.T).sum(1), x, torch.ones(2, 3))
    factor = (norm.weight * (norm.running_var + norm.eps).rsqrt()).detach()
    assert relative(gradient, (factor[:, None] * weight).view(1, 3, 4, 4).expand_as(x)) < EXACT


def _explicit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1) @ v


def _exponentials(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * q.shape[-1] ** -0.5
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return torch.einsum("bhqk,bhkd->bhqd", weights / weights.sum(-1, keepdim=True), v)


def _baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v3 = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    scores = torch.baddbmm(torch.zeros(1, 5, 5).to(q), q, k.mT, alpha=q.shape[-1] ** -0.5)
    return torch.bmm(torch.softmax(scores, -1, dtype=torch.float64), v3).view_as(v)


ATTENTIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "fused": F.scaled_dot_product_attention,
    "fused-by-keyword": lambda q, k, v: F.scaled_dot_product_attention(
        query=q, key=k, value=v, attn_mask=None, dropout_p=0.0
    ),
    "explicit": _explicit,
    "exponentials": _exponentials,
    "baddbmm": _baddbmm,
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_passes_through_v_alone(name: str) -> None:
    x, cotangent = normal(2, 3, 2, 5, 4), normal(2, 2, 5, 4, seed=1)
    gradient = slope(lambda x: ATTENTIONS[name](*x.unbind(1)), x, cotangent)
    q, k, _ = x.unbind(1)
    p = torch.softmax(q @ k.mT / 2, -1)
    assert not gradient[:, :2].any()
    assert relative(gradient[:, 2], p.mT @ cotangent) < EXACT


def test_attention_with_mask_scale_groups_and_causality() -> None:
    x, cotangent = normal(2, 3, 2, 5, 4), normal(2, 2, 5, 4, seed=1)
    bias = normal(5, 5, seed=2)
    cases: list[tuple[dict[str, object], Tensor]] = [
        ({"attn_mask": bias}, bias),
        ({"attn_mask": bias > 0}, torch.where(bias > 0, 0.0, -torch.inf)),
        ({"is_causal": True}, torch.full((5, 5), -torch.inf).triu(1).double()),
    ]
    q, k, _ = x.unbind(1)
    for settings, added in cases:
        gradient = slope(
            lambda x, s=settings: F.scaled_dot_product_attention(*x.unbind(1), scale=0.3, **s), x, cotangent
        )
        p = torch.softmax(q @ k.mT * 0.3 + added, -1)
        assert not gradient[:, :2].any() and relative(gradient[:, 2], p.mT @ cotangent) < EXACT


def test_attention_groups_and_a_mask_from_the_input() -> None:
    x, cotangent = normal(2, 4, 5, 4), normal(2, 4, 5, 4, seed=1)
    gradient = slope(
        lambda x: F.scaled_dot_product_attention(x, x[:, :2], x[:, :2], attn_mask=x @ x.mT, enable_gqa=True),
        x,
        cotangent,
    )
    keys = x[:, :2].repeat_interleave(2, 1)
    pulled = torch.softmax(x @ keys.mT / 2 + x @ x.mT, -1).mT @ cotangent
    expected = torch.cat([pulled.view(2, 2, 2, 5, 4).sum(2), torch.zeros(2, 2, 5, 4)], 1)
    assert relative(gradient, expected) < EXACT


def test_linear_attention_and_token_pooling_by_softmax() -> None:
    x, cotangent = normal(2, 5, 4), normal(2, 4, seed=1)
    pool = normal(4, seed=2)
    gradient = slope(lambda x: ((x @ pool).softmax(1)[..., None] * x).sum(1), x, cotangent)
    assert relative(gradient, (x @ pool).softmax(1)[..., None] * cotangent[:, None]) < EXACT
    cotangent = normal(2, 5, 4, seed=1)
    features = F.elu(x) + 1
    gradient = slope(lambda x: (F.elu(x) + 1) @ ((F.elu(x) + 1).mT @ x) / ((F.elu(x) + 1).sum(1).sum()), x, cotangent)
    expected = features @ (features.mT @ cotangent) / features.sum()
    assert relative(gradient, expected) < EXACT


SELECTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "amax": lambda x: x.amax(1),
    "max": lambda x: x.max(1).values,
    "max-keyword": lambda x: torch.max(x, dim=1, keepdim=True)[0].squeeze(1),
    "topk": lambda x: x.topk(1, dim=1).values[:, 0],
    "sort": lambda x: x.sort(dim=1, descending=True).values[:, 0],
    "argmax": lambda x: x.gather(1, x.argmax(1, keepdim=True))[:, 0],
    "pool": lambda x: F.max_pool2d(x[:, None], (4, 1))[:, 0, 0],
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_selections_pass_to_the_winners(name: str) -> None:
    x, cotangent = normal(2, 4, 5), normal(2, 5, seed=1)
    gradient = slope(SELECTIONS[name], x, cotangent)
    expected = (x == x.amax(1, keepdim=True)) * cotangent[:, None]
    assert torch.equal(gradient, expected)


def test_a_bcos_unit_is_linear_in_its_scaled_weight() -> None:
    x, weight, cotangent = normal(3, 6), F.normalize(normal(4, 6, seed=2), dim=1), normal(3, 4, seed=1)

    def unit(x: Tensor) -> Tensor:
        out = F.linear(x, weight)
        return out * (out / (torch.linalg.vector_norm(x, dim=-1, keepdim=True) + 1e-12)).abs()

    cos = (x @ weight.T) / x.norm(dim=1, keepdim=True)
    assert relative(slope(unit, x, cotangent), (cotangent * cos.abs()) @ weight) < EXACT
