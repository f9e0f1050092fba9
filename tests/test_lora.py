"""Tests of models with adapters of peft: LoRA is read as its merged weight, for the adapters that are active."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DataParallel
from torchvision.transforms import Normalize

from dave_fast import DAVE, effective_gradient
from dave_fast.given.wrappers import Normalised, unwrapped
from dave_fast.models.catalog import load_model
from dave_fast.models.labels import labels_of
from tests.tiny import random_vit
from tests.tolerances import EXACT
from tests.toys import relative
from tests.variants import ENGINE, randomise
from tests.wrapped import IMAGES, MEAN, STD, assert_routes_agree, lora

ADAPTERS = {
    "plain": {},
    "all layers": {"target_modules": ["qkv", "attn.proj", "fc1", "fc2"]},
    "rank-stabilised": {"use_rslora": True, "lora_alpha": 3},
    "dropout": {"lora_dropout": 0.5},
    "bias": {"lora_bias": True},
    "head": {"target_modules": ["qkv", "head"]},
    "saved head": {"modules_to_save": ["head"]},
    "saved head and norm": {"modules_to_save": ["head", "fc_norm"]},
    "ranks": {"rank_pattern": {"fc1": 5}, "alpha_pattern": {"qkv": 7}},
    "initialised": {"init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_lora_is_read_as_its_merged_weight(kind):
    from peft import PeftModel

    model = lora(random_vit(), **ADAPTERS[kind])
    assert isinstance(model, PeftModel)
    assert_routes_agree(model)


@pytest.mark.parametrize(
    "name",
    [
        *("vit-parallel", "dinov3", "relative-position"),
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("vit-parallel-things", "vit-swiglu", "vit-post-norm", "rope")
        ),
    ],
)
def test_lora_in_other_families_is_read_as_its_merged_weight(name):
    variant = ENGINE[name]
    model = variant.build(torch.float64)
    layers = [name for name, module in model.named_modules() if type(module) is nn.Linear and name.startswith("blocks")]
    assert_routes_agree(lora(model, target_modules=layers), variant.images(dtype=torch.float64))


def several():
    from peft import LoraConfig

    model = lora(random_vit(), lora_dropout=0.1)
    model.add_adapter("second", LoraConfig(r=3, target_modules=["fc1", "fc2"]))
    torch.manual_seed(4)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "second" in name:
                weight.normal_(0, 0.3)
    return model.eval()


def second(model):
    model.set_adapter("second")


def both(model):
    model.base_model.set_adapter(["default", "second"])


def disabled(model):
    model.base_model.disable_adapter_layers()


def merged(model):
    model.merge_adapter()


def scaled(model):
    for module in model.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(0.3)


@pytest.mark.parametrize("change", [second, both, disabled, merged, scaled])
def test_the_adapters_that_are_active_are_explained(change):
    model = several()
    before = effective_gradient(model, IMAGES, 1, route="engine")
    change(model)
    assert_routes_agree(model)
    after = effective_gradient(model, IMAGES, 1, route="engine")
    assert (relative(after, before) < 1e-6) == (change is merged)


def test_injected_adapters_are_read_as_merged_weights():
    from peft import LoraConfig, inject_adapter_in_model

    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["qkv"]), random_vit())
    randomise(model)
    assert_routes_agree(model.eval())


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("vit", {"use_dora": True}, "none of the plain form"),
        ("vit", {"target_modules": ["patch_embed.proj"]}, "patch embedding has a Conv2d of another form"),
        ("eva02", {"target_modules": ["qkv"]}, "separate biases"),
        ("beit", {"target_modules": ["qkv"]}, "separate biases"),
    ],
)
def test_adapters_without_a_merged_weight_take_the_frozen_route(name, settings, reason):
    variant = ENGINE[name]
    explainer = DAVE(lora(variant.build(), **settings), precision="fp64", noise_alpha=0.1)
    with pytest.warns(UserWarning, match=f"frozen.*{reason}"):
        explainer.effective_gradient(variant.images(dtype=torch.float64), 1)


def test_adapters_that_would_be_unmerged_by_a_call_are_not_read():
    model = several()
    merged(model)
    disabled(model)
    from dave_fast.plan.families import why_not

    assert "merged and disabled" in why_not(unwrapped(model))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_lora_of_a_transformers_model_is_adapted():
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, image_size=32, patch_size=8
    )
    inner = ViTForImageClassification(config).eval()
    names = [name for name, module in inner.named_modules() if type(module) is nn.Linear and "classifier" not in name]
    model = lora(inner, target_modules=names, modules_to_save=["classifier"])
    found, name = load_model(DataParallel(model))
    assert name == "ViTForImageClassification" and found.kind == "classifier"
    assert torch.equal(found(IMAGES.float()), model(IMAGES.float()).logits)
    found, _ = load_model(nn.Sequential(Normalize(MEAN, STD), model).eval())
    assert isinstance(found, Normalised) and found.kind == "classifier" and labels_of(found).count == 2
    assert torch.equal(found(IMAGES.float()), model(Normalize(MEAN, STD)(IMAGES.float())).logits)


@pytest.mark.parametrize("change", [second, both, disabled, merged, scaled])
@pytest.mark.filterwarnings("ignore:Already unmerged")
def test_adapters_that_change_later_are_explained_by_the_next_call(change):
    model = several()
    explainer = DAVE(model, precision="fp64", noise_alpha=0.1)
    explainer.predict(IMAGES)
    for each in (change, second, both):
        each(model)
        expected = effective_gradient(model, IMAGES, 1)
        assert relative(explainer.effective_gradient(IMAGES, 1), expected) < EXACT
        if change is disabled:
            model.base_model.enable_adapter_layers()
        elif each is merged:
            model.unmerge_adapter()
