"""The frozen route against a second implementation, against hand-computed slopes, and its promise to touch nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

from dave_fast.errors import InputError, ModelError
from dave_fast.frozen import freeze, frozen_forward, frozen_vjp
from tests.oracle import oracle_vjp
from tests.tolerances import EXACT
from tests.variants import ENGINE, FROZEN_ONLY


class Calls(nn.Module):
    """A model that is one function of its input, so that a test can hold its slope in hand."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def relative(a: Tensor, b: Tensor) -> float:
    return float(((a - b).norm() / b.norm()).detach())


def second_score(output: Tensor) -> Tensor:
    return output[:, 1]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slope(function: Callable[[Tensor], Tensor], x: Tensor, cotangent: Tensor) -> Tensor:
    """The frozen gradient of ⟨cotangent, function(x)⟩."""
    model = Calls(function).eval()
    return frozen_vjp(model, x, lambda y: (y * cotangent).flatten(1).sum(1))[1]


# Against the oracle


@pytest.mark.parametrize("name", ENGINE)
def test_agrees_with_the_oracle(name: str) -> None:
    model, images = ENGINE[name].build(torch.float64), ENGINE[name].images(dtype=torch.float64)
    expected_output, expected = oracle_vjp(model, images, second_score)
    output, gradient = frozen_vjp(model, images, second_score)
    assert gradient.shape == images.shape and gradient.dtype == images.dtype
    assert not output.requires_grad and not gradient.requires_grad
    assert relative(output, expected_output) < EXACT
    assert relative(gradient, expected) < EXACT


def test_drops_the_operator_variation() -> None:
    model, images = ENGINE["vit"].build(torch.float64), ENGINE["vit"].images(dtype=torch.float64)
    leaf = images.clone().requires_grad_()
    (full,) = torch.autograd.grad(second_score(model(leaf)).sum(), leaf)
    _, gradient = frozen_vjp(model, images, second_score)
    assert relative(gradient, full) > 0.1


@pytest.mark.parametrize("name", ["vit", "siglip", "dinov2-giant-swiglu"])
def test_fused_and_explicit_attention_agree(name: str) -> None:
    model, images = ENGINE[name].build(torch.float64), ENGINE[name].images(dtype=torch.float64)
    _, fused = frozen_vjp(model, images, second_score)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    _, explicit = frozen_vjp(model, images, second_score)
    assert relative(explicit, fused) < EXACT


@pytest.mark.parametrize("name", ["vit", "eva02", "swin", "torchvision"])
def test_rows_of_a_batch_are_independent(name: str) -> None:
    variant = {**ENGINE, **FROZEN_ONLY}[name]
    model, images = variant.build(torch.float64), variant.images(3, torch.float64)
    _, together = frozen_vjp(model, images, second_score)
    alone = torch.cat([frozen_vjp(model, image[None], second_score)[1] for image in images])
    assert relative(together, alone) < EXACT


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("name", ["vit", "vit-rms-norm", "siglip", "eva02", "torchvision", "hand-written"])
def test_lower_precision(name: str, dtype: torch.dtype, tolerance: float) -> None:
    variant = {**ENGINE, **FROZEN_ONLY}[name]
    _, truth = frozen_vjp(variant.build(torch.float64), variant.images(dtype=torch.float64), second_score)
    output, gradient = frozen_vjp(variant.build(dtype), variant.images(dtype=dtype), second_score)
    assert gradient.dtype == dtype and output.dtype == dtype
    assert relative(gradient.double(), truth) < tolerance


# Slopes that can be worked out by hand


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
    "reshaped": lambda a, b: (F.silu(a).view(-1, 1, 6) * b[:, None]).squeeze(1),
    "dropped-out-and-scaled": lambda a, b: 2 * F.dropout(F.silu(a), 0.5, training=False) * (b / 2),
    "einsum": lambda a, b: torch.einsum("bi,bi->bi", F.silu(a), b),
    "by-hand": lambda a, b: a * torch.sigmoid(a) * b / 1.0,
    "addcmul": lambda a, b: torch.addcmul(torch.zeros_like(b), F.silu(a), b),
}


def _augmented(gate: Tensor, value: Tensor) -> Tensor:
    gate *= value
    return gate


@pytest.mark.parametrize("name", [name for name in PRODUCTS if name != "by-hand"])
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


# Nothing is touched


def state(model: nn.Module) -> dict[str, object]:
    """Everything about a model that a caller could see changing."""
    return {
        "weights": {k: v.clone() for k, v in model.state_dict().items()},
        "parameters": [(k, id(p), p.requires_grad, p.grad) for k, p in model.named_parameters()],
        "modes": [(k, m.training, m.forward.__func__) for k, m in model.named_modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "attributes": [sorted(m.__dict__) for m in model.modules()],
    }


def assert_same(before: dict[str, object], after: dict[str, object]) -> None:
    old, new = before.pop("weights"), after.pop("weights")
    assert isinstance(old, dict) and isinstance(new, dict)
    assert before == after and old.keys() == new.keys()
    assert all(torch.equal(old[k], new[k]) for k in old)


@pytest.mark.parametrize("name", ["vit", "vit-swiglu", "torchvision", "xcit"])
def test_the_model_is_untouched(name: str) -> None:
    variant = {**ENGINE, **FROZEN_ONLY}[name]
    model, images = variant.build(), variant.images()
    first = next(iter(model.parameters()))
    first.grad = torch.ones_like(first)
    before, given = state(model), images.clone()
    frozen_vjp(model, images, second_score)
    assert_same(before, state(model))
    assert torch.equal(images, given) and not images.requires_grad and images.grad is None


def test_the_model_is_untouched_after_an_error() -> None:
    model, images = ENGINE["vit"].build(), ENGINE["vit"].images()

    def fails(module: nn.Module, args: object, output: Tensor) -> None:
        raise RuntimeError("in the middle")

    handle = model.blocks[1].mlp.act.register_forward_hook(fails)
    before = state(model)
    with pytest.raises(RuntimeError, match="in the middle"):
        frozen_vjp(model, images, second_score)
    assert_same(before, state(model))
    assert not _get_current_function_mode_stack()
    handle.remove()
    leaf = images.clone().requires_grad_()
    (full,) = torch.autograd.grad(second_score(model(leaf)).sum(), leaf)
    assert relative(frozen_vjp(model, images, second_score)[1], full) > 0.1


def test_parameters_may_be_frozen_and_get_no_gradient() -> None:
    model, images = ENGINE["vit"].build(torch.float64), ENGINE["vit"].images(dtype=torch.float64)
    _, expected = frozen_vjp(model, images, second_score)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    model.requires_grad_(False)
    _, gradient = frozen_vjp(model, images, second_score)
    assert torch.equal(gradient, expected)


def test_an_input_changed_in_place_by_the_model_stays_the_callers() -> None:
    images = normal(2, 3)
    gradient = slope(lambda x: x.mul_(2).relu_(), images, torch.ones(2, 3))
    assert torch.equal(images, normal(2, 3))
    assert torch.equal(gradient, 2.0 * (images > 0))


# Around the call


def test_works_under_no_grad_and_inference_mode() -> None:
    model, images = ENGINE["vit"].build(torch.float64), ENGINE["vit"].images(dtype=torch.float64)
    _, expected = frozen_vjp(model, images, second_score)
    with torch.no_grad():
        assert torch.equal(frozen_vjp(model, images, second_score)[1], expected)
    with torch.inference_mode():
        gradient = frozen_vjp(model, images * 1, second_score)[1]
    assert torch.equal(gradient, expected)


def test_the_context_and_the_forward() -> None:
    model, images = ENGINE["vit"].build(torch.float64), ENGINE["vit"].images(dtype=torch.float64)
    expected_output, expected = frozen_vjp(model, images, second_score)
    leaf = images.clone().requires_grad_()
    with freeze():
        output = model(leaf)
    assert torch.equal(output, expected_output)
    assert torch.equal(torch.autograd.grad(second_score(output).sum(), leaf)[0], expected)
    output = frozen_forward(model, leaf)
    assert torch.equal(torch.autograd.grad(second_score(output).sum(), leaf)[0], expected)


def test_activation_checkpointing_is_frozen_too() -> None:
    model, images = ENGINE["vit"].build(torch.float64), ENGINE["vit"].images(dtype=torch.float64)
    _, expected = frozen_vjp(model, images, second_score)
    model.set_grad_checkpointing(True)
    _, gradient = frozen_vjp(model, images, second_score)
    assert relative(gradient, expected) < EXACT


def test_threads_do_not_meet() -> None:
    model, images = ENGINE["vit"].build(torch.float64), ENGINE["vit"].images(4, torch.float64)
    _, expected = frozen_vjp(model, images, second_score)
    rows: dict[int, Tensor] = {}

    def explain(i: int) -> None:
        rows[i] = frozen_vjp(model, images[i : i + 1], second_score)[1]

    threads = [threading.Thread(target=explain, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert relative(torch.cat([rows[i] for i in range(4)]), expected) < EXACT


class Output:
    """What transformers' models return: an object with logits."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


def test_an_output_with_logits_is_read() -> None:
    weight = normal(3, 5)

    class Wrapped(nn.Module):
        def forward(self, x: Tensor) -> Output:
            return Output(x @ weight.T)

    output, gradient = frozen_vjp(Wrapped().eval(), normal(2, 5), second_score)
    assert output.shape == (2, 3) and torch.equal(gradient, weight[1].expand(2, 5))


def test_plain_errors() -> None:
    model, images = ENGINE["vit"].build(), ENGINE["vit"].images()
    with pytest.raises(ModelError, match="training mode: call model"):
        frozen_vjp(model.train(), images, second_score)
    model.eval().head_drop.train()
    with pytest.raises(ModelError, match="'head_drop' \\(Dropout\\) is in training mode"):
        frozen_vjp(model, images, second_score)
    model.eval()
    with pytest.raises(InputError, match=r"shape \(2, 7\); expected one score per image"):
        frozen_vjp(model, images, lambda output: output)
    with pytest.raises(InputError, match="carry no gradient"):
        frozen_vjp(model, images, lambda output: output[:, 0].detach())
    with pytest.raises(ModelError, match="returned tuple; expected a tensor"):
        frozen_vjp(Calls(lambda x: (x, x)).eval(), images, second_score)  # type: ignore[arg-type,return-value]
    with pytest.raises(ModelError, match="does not depend on its input"):
        frozen_vjp(Calls(torch.no_grad()(lambda x: x.mean((2, 3)))).eval(), images, second_score)
