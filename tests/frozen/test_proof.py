"""The affine replay: every family passes, and every function that is not frozen is found and named."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from dave_fast.errors import ModelError, NonFiniteError, NotFrozenError
from dave_fast.frozen import proof as replay
from dave_fast.frozen.proof import affine_replay, ensure_proved, prove_frozen
from tests.tolerances import EXACT
from tests.variants import ALL, ENGINE


@pytest.mark.parametrize("name", ALL)
def test_every_family_passes(name: str) -> None:
    report = prove_frozen(ALL[name].build(), ALL[name].images())
    assert report.culprit is None
    assert report.operators > 0
    assert len(report.errors) == 2
    assert max(report.errors) < EXACT


def test_the_tolerance_is_the_projects() -> None:
    assert replay.TOLERANCE <= EXACT


# Planted omissions


class HiddenSoftmax(torch.autograd.Function):
    """A softmax that no function mode can see into."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.softmax(x.detach(), -1)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return y * (g - (g * y).sum(-1, keepdim=True))


class WrongBackward(torch.autograd.Function):
    """A linear function with a wrong gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 3 * g


class Planted(nn.Module):
    """A module that replaces an identity or a LayerScale of a block."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _hidden_scale(x: Tensor) -> Tensor:
    """A gate hidden in a custom function."""
    return x * (1 + HiddenSoftmax.apply(x))


OMISSIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "square": lambda x: x * x,
    "bilinear": lambda x: x * x.roll(1, -1),
    "power": lambda x: x + x.pow(3),
    "sine-as-value": lambda x: x + torch.sin(x),
    "exponential-as-value": lambda x: x - torch.expm1(x),
    "sigmoid-as-value": lambda x: x + torch.sigmoid(x),
    "softmax-as-value": lambda x: x + torch.softmax(x, -1),
    "log-softmax": lambda x: torch.log_softmax(x, 1),
    "softplus": F.softplus,
    "product-of-sums": lambda x: x * x.mean(-1, keepdim=True),
    "hidden-softmax": HiddenSoftmax.apply,
    "hidden-scale": _hidden_scale,
    "cumulative-product": lambda x: x + x.cumprod(-1),
    "linear-of-a-gate": lambda x: x * F.linear(F.silu(x), torch.eye(x.shape[-1], dtype=x.dtype)),
    "detached-value": lambda x: x + x.detach(),
    "detached-data": lambda x: x + x.data,
    "no-grad": lambda x: x + torch.no_grad()(F.relu)(x),
    "wrong-backward": WrongBackward.apply,
    "in-place": lambda x: x.mul_(x.roll(1, -1)),
}


@pytest.mark.parametrize("omission", OMISSIONS)
@pytest.mark.parametrize("path", ["blocks.1.ls1", "patch_embed.norm"])
def test_an_omission_is_found_by_name(omission: str, path: str) -> None:
    model, images = ENGINE["deit3"].build(), ENGINE["deit3"].images()
    model.set_submodule(path, Planted(OMISSIONS[omission]))
    with pytest.raises(NotFrozenError, match=rf"module '{path}' \(Planted\): ") as caught:
        prove_frozen(model, images)
    assert "affine replay is off by" in str(caught.value)
    assert "Write that step with functions" in str(caught.value)


def test_an_omission_between_modules_names_the_one_around_it() -> None:
    class Bilinear(Block):
        def forward(self, x: Tensor, **_: object) -> Tensor:
            return self.mlp(self.norm2(x)) * self.attn(self.norm1(x))

    model, images = ENGINE["vit"].build(), ENGINE["vit"].images()
    model.blocks[1].__class__ = Bilinear
    with pytest.raises(NotFrozenError, match=r"module 'blocks.1' \(Bilinear\)"):
        prove_frozen(model, images)


def test_an_omission_in_the_outermost_forward() -> None:
    model = Planted(lambda x: (x * x).mean((2, 3)))
    with pytest.raises(NotFrozenError, match="the forward of Planted itself"):
        prove_frozen(model, torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0)))


def test_a_branch_without_gradient_is_found_by_name() -> None:
    model, images = ENGINE["vit"].build(), ENGINE["vit"].images()
    model.blocks[1].ls1 = Planted(lambda x: x.detach())
    with pytest.raises(NotFrozenError, match=r"'blocks.1.ls1' \(Planted\): its output changes .* no gradient"):
        prove_frozen(model, images)


def test_operators_that_look_nonlinear_are_not_accused() -> None:
    model, images = ENGINE["vit"].build(), ENGINE["vit"].images()
    # its output is no affine function of its input, and rightly so: only attention weights are made of it
    model.blocks[0].attn.q_norm = Planted(lambda x: x * x)
    assert prove_frozen(model, images).passed
    model.blocks[1].ls2 = Planted(lambda x: x * x)
    with pytest.raises(NotFrozenError, match=r"'blocks.1.ls2'"):
        prove_frozen(model, images)


def test_an_omission_is_found_at_a_thousandth_of_a_branch() -> None:
    model, images = ENGINE["vit"].build(), ENGINE["vit"].images()
    model.blocks[0].ls1 = Planted(lambda x: x + 1e-3 * torch.sin(x))
    with pytest.raises(NotFrozenError, match=r"'blocks.0.ls1'"):
        prove_frozen(model, images)


# Other ways to fail


def test_a_random_model_is_refused() -> None:
    model, images = ENGINE["vit"].build(), ENGINE["vit"].images()
    model.blocks[0].ls1 = Planted(lambda x: F.dropout(x, 0.2))
    with pytest.raises(ModelError, match="is random: two passes over one image differ"):
        prove_frozen(model, images)


def test_a_choice_by_the_input_is_an_operator_when_torch_sees_it() -> None:
    model, images = ENGINE["vit"].build(), ENGINE["vit"].images()
    model.blocks[0].ls1 = Planted(lambda x: x if (x.sum() > -1e9) & (x.mean() < 1e9) else F.gelu(x))
    assert prove_frozen(model, images).passed


def test_a_choice_in_python_is_refused() -> None:
    model, images = ENGINE["vit"].build(), ENGINE["vit"].images()
    seen: list[float] = []

    def takes_turns(x: Tensor) -> Tensor:
        seen.append(x.sum().item())
        return x if seen[-1] == seen[0] else F.gelu(x)

    model.blocks[1].ls2 = Planted(takes_turns)
    with pytest.raises(NotFrozenError, match=r"a path that its input chooses.*in module 'blocks.1.ls2' \(Planted\)"):
        prove_frozen(model, images)


def test_a_model_that_overflows_is_refused() -> None:
    model, images = ENGINE["vit"].build(), ENGINE["vit"].images()
    model.norm.weight.data.fill_(torch.inf)
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        prove_frozen(model, images)


def test_a_constant_model_is_refused() -> None:
    model, images = ENGINE["vit"].build(), ENGINE["vit"].images()
    nn.init.zeros_(model.head.weight)
    with pytest.raises(ModelError, match="does not change with its input"):
        prove_frozen(model, images)


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    class Single(nn.Identity):
        def __deepcopy__(self, memo: object) -> Single:
            raise TypeError("there is one")

    model, images = ENGINE["vit"].build(), ENGINE["vit"].images()
    model.norm = Single()
    with pytest.raises(ModelError, match=r"cannot be copied.*TypeError: there is one.*Give a model that"):
        prove_frozen(model, images)


# Around the proof


class Careful(nn.LayerNorm):
    """A norm that computes in float32 and returns the dtype of its input, as models for half precision have it."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = (y - y.mean(-1, keepdim=True)) * torch.rsqrt(y.to(torch.float32).var(-1, keepdim=True) + self.eps)
        weights = torch.softmax(x, -1, dtype=torch.float32).to(torch.bfloat16)
        return (y * self.weight + self.bias + weights * x).to(torch.bfloat16).type_as(x)


def test_casts_to_lower_precision_are_lifted() -> None:
    model, images = ENGINE["vit"].build(), ENGINE["vit"].images()
    for block in model.blocks:
        norm = Careful(32).eval()
        norm.load_state_dict(block.norm1.state_dict())
        block.norm1 = norm
    assert prove_frozen(model, images).passed


def test_constants_that_are_made_in_lower_precision_are_lifted() -> None:
    model, images = ENGINE["vit"].build(), ENGINE["vit"].images()
    model.blocks[0].ls1 = Planted(lambda x: torch.full((17, 17), 0.1, dtype=torch.float32) @ x.float())
    assert prove_frozen(model, images).passed


def test_models_in_any_precision_and_in_training_mode_are_proved_in_evaluation() -> None:
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        model = ENGINE["vit"].build(dtype).train()
        assert prove_frozen(model, ENGINE["vit"].images(dtype=dtype)).passed
        assert model.training


def test_the_users_model_and_the_global_generator_are_untouched() -> None:
    model, images = ENGINE["vit"].build(), ENGINE["vit"].images()
    calls: list[int] = []
    model.norm.forward = _counted(model.norm, calls)
    before, generator = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with torch.no_grad():
        prove_frozen(model, images)
    assert torch.equal(generator, torch.get_rng_state())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.dtype == torch.float32 and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def _counted(norm: nn.Module, calls: list[int]) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        calls.append(1)
        return F.layer_norm(x, (32,), norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)

    return forward


def test_the_proof_is_given_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = ENGINE["vit"].build(), ENGINE["vit"].images()
    proofs: list[nn.Module] = []
    true_proof = replay.prove_frozen
    monkeypatch.setattr(replay, "prove_frozen", lambda m, x: (proofs.append(m), true_proof(m, x))[1])
    assert ensure_proved(model, images) is ensure_proved(model, images[:1])
    assert len(proofs) == 1
    with torch.no_grad():
        model.head.weight.mul_(2)
    ensure_proved(model, images)
    assert len(proofs) == 2
    model.blocks[0].ls1 = Planted(torch.sin)
    for _ in range(2):
        with pytest.raises(NotFrozenError):
            ensure_proved(model, images)
    assert len(proofs) == 4


def _set_forward(model: Any) -> None:
    own = model.forward
    model.forward = lambda x: own(x)


def _set_parents(model: Any) -> None:
    model.blocks[0].parents = [model]


@pytest.mark.parametrize("refer", [_set_forward, _set_parents])
def test_a_proved_model_that_refers_to_itself_is_freed(refer: Callable[[Any], None]) -> None:
    model = ENGINE["vit"].build()
    refer(model)
    ensure_proved(model, ENGINE["vit"].images())
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_reports_of_many_sizes_are_dropped() -> None:
    model = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 3)).double()
    sizes = range(4, 4 + replay._MOST_REPORTS + 2)
    reports = [ensure_proved(model, torch.ones(1, 3, side, side, dtype=torch.float64)) for side in sizes]
    assert list(replay._proved[model][1].values()) == reports[2:]


def test_attention_is_noticed() -> None:
    assert affine_replay(ENGINE["vit"].build(), ENGINE["vit"].images()).has_attention
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten()).eval()
    assert not affine_replay(network, ENGINE["vit"].images()).has_attention


def test_attention_by_weights_that_are_summed_is_noticed() -> None:
    pool = Planted(lambda x: (x * torch.softmax(x.sum(1, keepdim=True).flatten(2), -1).view(-1, 1, 32, 32)).sum((2, 3)))
    assert affine_replay(pool.eval(), ENGINE["vit"].images()).has_attention
