"""What users do to models of other libraries than timm's: explained as they are, or refused, and the plan says why."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers.integrations import sdpa_attention
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface
from transformers.models.vit import modeling_vit

from dave_fast import DAVE
from dave_fast.models.adapter import Adapter
from dave_fast.plan.families import why_not
from tests.engine.cases import EXPLAINED, answer, expectation, explained, judged, off, outcome
from tests.libraries import LIBRARIES
from tests.tolerances import EXACT

SDPA, PRODUCT = sdpa_attention.sdpa_attention_forward, F.scaled_dot_product_attention


def sharper(module, query, *args, **kwargs):
    """Attention of another function: with queries of twice their length."""
    return SDPA(module, 2 * query, *args, **kwargs)


def first_alone(*args, **kwargs):
    """A mask that lets all tokens look at the first two alone."""
    return (torch.arange(kwargs["kv_length"]) < 2).expand(1, 1, kwargs["q_length"], -1)


def part(model: Any, path: str) -> Any:
    """Return a module of the library's model, which may be in an adapter."""
    return (model.model if isinstance(model, Adapter) else model).get_submodule(path)


def registered(undo: ExitStack, table: Any, name: str, function: Callable[..., Any]) -> None:
    undo.enter_context(patch.dict(table._global_mapping, {name: function}))


def another_attention(model: nn.Module, undo: ExitStack) -> None:
    registered(undo, AttentionInterface, "sharper", sharper)
    part(model, "").set_attn_implementation("sharper")


def another_sdpa(model: nn.Module, undo: ExitStack) -> None:
    registered(undo, AttentionInterface, "sdpa", sharper)


def another_mask(model: nn.Module, undo: ExitStack) -> None:
    registered(undo, AttentionMaskInterface, "sdpa", first_alone)


def called_by_sdpa(model: nn.Module, undo: ExitStack) -> None:
    undo.enter_context(patch.object(F, "scaled_dot_product_attention", lambda q, *a, **k: PRODUCT(2 * q, *a, **k)))


def causal_modules(model: nn.Module, undo: ExitStack) -> None:
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = True


def causal_configuration(model: nn.Module, undo: ExitStack) -> None:
    part(model, "").config.is_causal = True


def replaced_method(owner: type, name: str = "forward") -> Callable[[nn.Module, ExitStack], None]:
    plain = getattr(owner, name)

    def change(model: nn.Module, undo: ExitStack) -> None:
        def method(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
            return plain(self, 0.5 * x if x.is_floating_point() else x, *args, **kwargs)

        undo.enter_context(patch.object(owner, name, method))

    return change


def replaced_mask_function(model: nn.Module, undo: ExitStack) -> None:
    undo.enter_context(patch.object(modeling_vit, "create_bidirectional_mask", first_mask))


def first_mask(config: Any, inputs_embeds: Any, attention_mask: Any) -> Any:
    return first_alone(kv_length=inputs_embeds.shape[1], q_length=inputs_embeds.shape[1])


def hook(path: str) -> Callable[[nn.Module, ExitStack], None]:
    return lambda model, undo: hooked(part(model, path), undo)


def hooked(model: nn.Module, undo: ExitStack) -> None:
    model.register_forward_hook(lambda module, x, y: 0.5 * y)


def own_forward(path: str) -> Callable[[nn.Module, ExitStack], None]:
    def change(model: nn.Module, undo: ExitStack) -> None:
        owner = part(model, path)
        plain = type(owner).forward
        owner.forward = lambda x, *args, **kwargs: plain(owner, 0.5 * x, *args, **kwargs)

    return change


def subclass(path: str) -> Callable[[nn.Module, ExitStack], None]:
    def change(model: nn.Module, undo: ExitStack) -> None:
        owner = part(model, path)
        owner.__class__ = type("Mine", (type(owner),), {})

    return change


def exchanged(path: str, make: Callable[[], nn.Module]) -> Callable[[nn.Module, ExitStack], None]:
    def change(model: nn.Module, undo: ExitStack) -> None:
        torch.manual_seed(1)
        owner, _, name = path.rpartition(".")
        setattr(part(model, owner), name, make().eval())

    return change


class Own(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * super().forward(x)


class Backwards(nn.Module):
    """Activation of another function behind a known name."""

    def __init__(self) -> None:
        super().__init__()
        self.act = F.silu

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(x)


class GELU(nn.Module):
    """Another function behind the name of a known one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x, approximate="tanh")


def another_function(model: nn.Module, undo: ExitStack) -> None:
    part(model, "vit.layers.1.mlp.activation_fn").act = F.silu


# a model, what is done to it, words of the reason against a plan
CHANGES: dict[str, tuple[str, Callable[[nn.Module, ExitStack], None], str]] = {
    "another attention": ("vit", another_attention, "vit.layers.0: its attention is computed by 'sharper'"),
    "another sdpa": ("vit", another_sdpa, "table of attention has another function as 'sdpa'"),
    "another mask": ("dinov2", another_mask, "table of attention has another function as 'sdpa'"),
    "what sdpa calls": ("clip", called_by_sdpa, "scaled_dot_product_attention"),
    "causal modules": ("siglip-classifier", causal_modules, "its attention is causal"),
    "causal configuration": ("dinov2", causal_configuration, "its configuration says that attention is causal"),
    "a method": ("vit", replaced_method(modeling_vit.ViTAttention), "ViTAttention.forward is not the one"),
    "a decorated method": ("vit", replaced_method(modeling_vit.ViTLayer), "ViTLayer.forward is not the one"),
    "a method of the model": ("vit", replaced_method(modeling_vit.ViTModel), "ViTModel.forward is not the one"),
    "a function of the file": ("vit", replaced_mask_function, "create_bidirectional_mask, which"),
    "an activation's method": (
        "vit", replaced_method(transformers.activations.GELUActivation), "GELUActivation.forward is not the one",
    ),
    "a method of torchvision": (
        "torchvision", replaced_method(torch.nn.MultiheadAttention), "MultiheadAttention.forward is not the one",
    ),
    "a hook": ("dinov2", hook("dinov2.encoder.layer.0"), "layer.0' carries hooks"),
    "a hook of the adapter": ("vit", hooked, "'Transformers' carries hooks"),
    "a hook of the tower": ("open-clip", hook("visual"), "visual' carries hooks"),
    "a forward": ("deit-teacher", own_forward("deit.layers.1.mlp"), "layers.1.mlp' has a forward of its own"),
    "a subclass": ("vit", subclass(""), "Mine is none of timm's classes"),
    "a body of a subclass": ("vit", subclass("vit"), "a Mine is not transformers' own ViTModel"),
    "a block of a subclass": ("beit", subclass("beit.layers.1"), "beit.layers.1: a Mine is not"),
    "an attention of a subclass": ("torchvision", subclass("encoder.layers.encoder_layer_1.self_attention"), "a Mine"),
    "a tower's block": ("open-clip", subclass("visual.transformer.resblocks.0"), "a Mine is not open_clip's"),
    "a bias of a subclass": ("beit", subclass("beit.layers.0.relative_position_bias"), "a Mine is not"),
    "a layer": ("vit", exchanged("vit.layers.0.attention.k_proj", lambda: Own(36, 36)), "layers.0: a Own stands where"),
    "a norm": ("dinov2", exchanged("dinov2.encoder.layer.1.norm1", lambda: nn.RMSNorm(36, eps=None)), "RMSNorm's eps"),
    "an activation": ("vit", exchanged("vit.layers.0.mlp.activation_fn", nn.Hardswish), "activation Hardswish"),
    "an activation's name": ("vit", exchanged("vit.layers.0.mlp.activation_fn", GELU), "GELU is none of PyTorch's"),
    "an activation's function": ("vit", another_function, "calls another function than its own"),
    "a dropout": ("vit", exchanged("vit.layers.1.dropout", lambda: Own(36, 36)), "a Own stands at"),
    "a patch embedding": (
        "vit", exchanged("vit.embeddings.patch_embeddings.projection", lambda: nn.Conv2d(3, 36, 10, 7)), "another form",
    ),
    "a stem": ("torchvision", exchanged("conv_proj", lambda: nn.Sequential(nn.Conv2d(3, 36, 8, 8))), "a Sequential of"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_model_is_explained_as_it_is(name: str):
    base, change, words = CHANGES[name]
    variant = LIBRARIES[base]
    with ExitStack() as undo:

        def build() -> nn.Module:
            model = variant.build()
            change(model, undo)
            return model

        reason = why_not(build())
        assert reason is not None and words in reason, reason
        if "causal" in name:
            # the truth has no rule for causal attention
            model, images = build(), variant.images()
            assert off(explained(model, images)[1], model(images).detach().double()) < 1e-6
            return
        assert outcome(build, variant.images()) == EXPLAINED


def head(model: nn.Module, undo: ExitStack) -> None:
    exchanged("classifier", lambda: nn.Sequential(nn.Linear(36, 9), nn.GELU(), nn.Linear(9, 7)))(model, undo)


def hidden_states(model: nn.Module, undo: ExitStack) -> None:
    """transformers keeps outputs by hooks on the blocks, which stay for good."""
    part(model, "")(LIBRARIES["vit"].images(), output_hidden_states=True)


def eager(model: nn.Module, undo: ExitStack) -> None:
    part(model, "").set_attn_implementation("eager")


def training(model: nn.Module, undo: ExitStack) -> None:
    model.train()


def lora(model: nn.Module, undo: ExitStack) -> None:
    import peft

    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj", "fc1"]), part(model, ""))
    generator = torch.Generator().manual_seed(1)
    for parameter_name, parameter in model.named_parameters():
        if "lora_" in parameter_name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)


def checkpoints(model: nn.Module, undo: ExitStack) -> None:
    part(model, "").activation_checkpointing_enable()


# what leaves a plan, which is still the model's
KEPT: dict[str, tuple[str, Callable[[nn.Module, ExitStack], None]]] = {
    "a head": ("vit", head),
    "hooks for hidden states": ("vit", hidden_states),
    "eager attention": ("dinov2", eager),
    "checkpoints": ("vit", checkpoints),
    "training": ("dinov2", training),
    "LoRA": ("vit", lora),
    "LoRA of a tower": ("siglip-classifier", lora),
}


@pytest.mark.parametrize("name", KEPT)
def test_a_plan_follows_what_it_knows(name: str):
    base, change = KEPT[name]
    variant = LIBRARIES[base]
    with ExitStack() as undo:

        def build() -> nn.Module:
            model = variant.build()
            change(model, undo)
            return model

        assert why_not(build()) is None
        assert outcome(build, variant.images(), route="engine") == EXPLAINED


def more_registers(model: nn.Module, undo: ExitStack) -> None:
    part(model, "").config.num_register_tokens = 1


def scaled(model: nn.Module, undo: ExitStack) -> None:
    part(model, "dinov2_with_registers.encoder.layer.0.attention").scaling *= 2


def weights(model: nn.Module, undo: ExitStack) -> None:
    with torch.no_grad():
        part(model, "dinov2_with_registers.encoder.layer.1.layer_scale1").lambda1.mul_(2)


@pytest.mark.parametrize("route", ["auto", "frozen"])
@pytest.mark.parametrize(
    "change",
    [
        another_attention,
        another_sdpa,
        another_mask,
        called_by_sdpa,
        more_registers,
        scaled,
        weights,
    ],
)
def test_what_changes_between_two_calls_is_noticed(change: Callable[[nn.Module, ExitStack], None], route: str):
    variant = LIBRARIES["dinov2-registers"]
    model, images = variant.build(), variant.images()
    explainer = DAVE(model, precision="fp64", noise_alpha=0.0, route=route)
    before, _ = answer(explainer, images)
    with ExitStack() as undo:

        def build() -> nn.Module:
            made = variant.build()
            change(made, undo)
            return made

        expected = expectation(build, images)
        change(model, undo)
        assert judged(expected, lambda: answer(explainer, images)) == EXPLAINED
        after, _ = answer(explainer, images)
        assert (after - before).norm() > 1e-3 * before.norm()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_model_with_an_adapter_of_peft_and_a_head_of_its_own_has_a_plan():
    import peft

    variant = LIBRARIES["dinov2"]
    plain = variant.build()
    config = peft.LoraConfig(r=2, target_modules=["v_proj"], modules_to_save=["classifier"])
    given = peft.get_peft_model(variant.build().model, config).eval()
    with torch.no_grad():
        for name, parameter in given.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    images = variant.images()
    explainer = DAVE(given, precision="fp64", noise_alpha=0.0, route="engine")
    expected = given(images).logits.detach()
    assert off(explainer.predict(images), expected.double()) < 1e-6
    assert off(expected, plain(images).detach().double()) > 1e-2
    found = explainer.effective_gradient(images, 3)
    frozen = DAVE(given, precision="fp64", noise_alpha=0.0, route="frozen").effective_gradient(images, 3)
    assert off(found, frozen) < EXACT
