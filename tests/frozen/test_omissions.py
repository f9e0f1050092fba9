"""Four omissions that would make maps wrong without an error, planted in ViTs: the proof finds and names each.

An operator is left unfrozen where PyTorch's functions cannot be seen (a fused kernel in a custom autograd function),
where a rule is missing, or where there is none (a bilinear product of two values). Logits stay right in all of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dave_fast
from dave_fast.errors import NotFrozenError
from dave_fast.frozen import mode as frozen
from dave_fast.frozen.proof import prove_frozen
from dave_fast.frozen.rules import RULES
from tests.toys import frozen_vjp, second_score
from tests.variants import ENGINE, FROZEN_ONLY, TORCHVISION, randomise


def fused(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return the function as one custom kernel, with its true gradient, which no function mode can look into."""

    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return function(x.detach())

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            with torch.enable_grad():
                x = ctx.saved_tensors[0].detach().requires_grad_()
                return torch.autograd.grad(function(x), x, g)[0]

    return Kernel.apply


class SigmoidGate(nn.Module):
    """x ⊙ σ(Wx), the gate in a fused kernel."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x * fused(torch.sigmoid)(self.gate(x))


class SecondSoftmax(nn.Module):
    """Attention whose weights go through another softmax, in a fused kernel."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)

    def forward(self, x: Tensor, **_: object) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        return fused(lambda p: torch.softmax(5 * p, -1))(weights + 0 * q.sum()) @ v + weights @ v


class CustomNorm(nn.Module):
    """An RMS norm in a fused kernel, as Apex and its like have it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * fused(lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))(x)


class BilinearPooling(nn.Module):
    """Second-order features, every channel times its neighbour over the tokens, which no rule can freeze."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.project = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.project(x).mean(-1, keepdim=True)


def timm_vit() -> nn.Module:
    return ENGINE["deit3"].build()


def torchvision_vit() -> nn.Module:
    return TORCHVISION.build()


@dataclass(frozen=True)
class Plant:
    """An omission and its place in a model."""

    model: Callable[[], nn.Module]
    path: str


KINDS = (SigmoidGate, SecondSoftmax, CustomNorm, BilinearPooling)
PLACES: dict[str, dict[type[nn.Module], Plant]] = {
    "timm": {
        SigmoidGate: Plant(timm_vit, "blocks.1.ls2"),
        SecondSoftmax: Plant(timm_vit, "blocks.0.attn"),
        CustomNorm: Plant(timm_vit, "blocks.1.norm1"),
        BilinearPooling: Plant(timm_vit, "fc_norm"),
    },
    "torchvision": {
        SigmoidGate: Plant(torchvision_vit, "encoder.layers.encoder_layer_1.mlp.2"),
        SecondSoftmax: Plant(torchvision_vit, "encoder.dropout"),
        CustomNorm: Plant(torchvision_vit, "encoder.layers.encoder_layer_0.ln_2"),
        BilinearPooling: Plant(torchvision_vit, "encoder.ln"),
    },
    "toy": {kind: Plant(lambda: nn.Sequential(FROZEN_ONLY["hand-written"].build()), "0.up") for kind in KINDS},
}


def planted(place: Plant, kind: type[nn.Module]) -> nn.Module:
    """Return the model with the omission in it and random weights."""
    model = place.model()
    width = 64 if place.path.endswith("mlp.2") else 32
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        part = kind(width)
        randomise(part)
    if place.path == "0.up":
        part = nn.Sequential(part, model.get_submodule(place.path))
    model.set_submodule(place.path, part)
    return model.eval()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("where", PLACES)
def test_an_omission_is_refused_by_name(where: str, kind: type[nn.Module]) -> None:
    place = PLACES[where][kind]
    model = planted(place, kind)
    path = place.path + ".0" if where == "toy" else place.path
    with pytest.raises(NotFrozenError, match=re.escape(f"module {path!r} ({kind.__name__})")):
        prove_frozen(model, ENGINE["vit"].images())


def test_the_front_end_refuses_before_it_explains() -> None:
    model = planted(PLACES["timm"][SigmoidGate], SigmoidGate)
    explainer = dave_fast.DAVE(model, device="cpu", precision="fp32", noise_alpha=0.5)
    with pytest.raises(NotFrozenError, match=r"'blocks.1.ls2' \(SigmoidGate\)"):
        explainer.explain(ENGINE["vit"].images(), 0, n_samples=2)


def test_logits_prove_nothing() -> None:
    model = planted(PLACES["timm"][SigmoidGate], SigmoidGate).double()
    images = ENGINE["vit"].images(dtype=torch.float64)
    assert torch.allclose(frozen_vjp(model, images, second_score)[0], model(images), rtol=0, atol=1e-12)


# A rule that is taken away, in the family that needs it


MISSING: dict[str, tuple[str, str, str]] = {
    "a sigmoid gate": ("sigmoid", "vit-gate", r"module 'blocks\.\d\.mlp\.act' \(GateOfASigmoid\)"),
    "a softmax": ("softmax", "cait", r"module 'blocks\.0\.attn' \(TalkingHeadAttn\)"),
    "a norm": ("layer_norm", "swin", r"module 'patch_embed\.norm' \(LayerNorm\)"),
    "exponentials": ("exp", "hand-written", r"the forward of HandWritten itself"),
    "a product of matrices": ("matmul", "xcit", r"module 'blocks\.0\.attn' \(XCA\)"),
    "attention": ("scaled_dot_product_attention", "eva02", r"module 'blocks\.0\.attn' \(EvaAttention\)"),
    "SwiGLU's product": ("mul", "eva02", r"module 'blocks\.0\.mlp' \(GluMlp\)"),
}


class GateOfASigmoid(nn.Module):
    """Quick GELU."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


@pytest.mark.parametrize("omission", MISSING)
def test_a_missing_rule_is_found(omission: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rule, family, culprit = MISSING[omission]
    variant = (ENGINE | FROZEN_ONLY)["vit" if family == "vit-gate" else family]
    model = variant.build()
    if family == "vit-gate":
        for block in model.blocks:
            block.mlp.act = GateOfASigmoid()
    assert prove_frozen(model, variant.images()).passed
    monkeypatch.setattr(frozen, "RULES", {name: r for name, r in RULES.items() if name != rule})
    with pytest.raises(NotFrozenError, match=culprit):
        prove_frozen(model, variant.images())
