"""Tests of folders that peft wrote: the base model with its adapter is explained, or the folder is refused."""

from __future__ import annotations

import os
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from dave_fast import DAVE
from dave_fast.errors import InputError, MissingPackageError, ModelError, UnknownModelError
from dave_fast.images import preprocessing
from dave_fast.models.catalog import load_model
from dave_fast.models.labels import labels_of
from dave_fast.models.spec import ModelSpec
from tests.models.test_huggingface import DINOV2, SWIN, TEXT, VIT, K, images, made
from tests.models.test_huggingface_folders import Evil, refused, rewrite

peft = pytest.importorskip("peft")
# of transformers, about a name that peft uses
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # of peft, about the layers that its own LN tuning is for
    pytest.mark.filterwarnings("ignore:Unsupported layer type .*LayerNorm:UserWarning"),
]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Q = dict(target_modules=["q_proj"])
ADAPTERS = {
    "LoRA": ("LoraConfig", Q | dict(r=2)),
    "LoRA of two projections and the MLP": ("LoraConfig", dict(target_modules=["q_proj", "v_proj", "fc1"], r=3)),
    "LoRA by a pattern": ("LoraConfig", dict(target_modules=r".*layers\.\d+\.attention\.(k|o)_proj", r=2)),
    "LoRA of all linear layers": ("LoraConfig", dict(target_modules="all-linear", r=2)),
    "LoRA of the patches": ("LoraConfig", dict(target_modules=["projection"], r=2)),
    "LoRA with a head": ("LoraConfig", Q | dict(r=2, modules_to_save=["classifier"])),
    "LoRA with biases": ("LoraConfig", Q | dict(r=2, bias="all")),
    "LoRA with ranks of its own": (
        "LoraConfig",
        Q | dict(r=2, rank_pattern={"q_proj": 4}, alpha_pattern={"q_proj": 16}),
    ),
    "LoRA with dropout": ("LoraConfig", Q | dict(r=2, lora_dropout=0.5)),
    "rsLoRA": ("LoraConfig", Q | dict(r=2, use_rslora=True)),
    "DoRA": ("LoraConfig", Q | dict(r=2, use_dora=True)),
    "AdaLoRA": ("AdaLoraConfig", Q | dict(total_step=10)),
    "LoHa": ("LoHaConfig", Q | dict(r=2)),
    "LoKr": ("LoKrConfig", Q | dict(r=2)),
    "IA3": ("IA3Config", dict(target_modules=["k_proj", "fc2"], feedforward_modules=["fc2"])),
    "OFT": ("OFTConfig", Q | dict(r=0, oft_block_size=8)),
    "norms": ("LNTuningConfig", dict(target_modules=["layernorm_before"])),
}


def classifier(**settings):
    return made("ViTForImageClassification", "ViTConfig", **VIT, **({"num_labels": K} | settings))


def adapted(base, folder, name="LoRA", model=None, **changes):
    """Save a model in a folder `base`, and a random adapter of it in another; return the whole."""
    kind, settings = ADAPTERS[name]
    model = classifier() if model is None else model
    if not base.exists():
        model.save_pretrained(base)
    model.name_or_path = model.config._name_or_path = str(base)
    whole = peft.get_peft_model(model, getattr(peft, kind)(**(settings | changes))).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in whole.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    whole.save_pretrained(folder)
    return whole


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter_is_explained_as_the_model_with_it(name, tmp_path):
    whole = adapted(tmp_path / "base", tmp_path / "adapter", name)
    model, called = load_model(f"hf:{tmp_path / 'adapter'}")
    expected = whole(images()).logits
    torch.testing.assert_close(model(images()), expected)
    assert called == f"hf:{tmp_path / 'adapter'}" and model.num_classes == K
    without = load_model(f"hf:{tmp_path / 'base'}")[0](images())
    assert (expected - without).norm() > 1e-4 * without.norm()
    assert not any("lora" in name for name, _ in model.named_modules())


@pytest.mark.parametrize("name", ["LoRA", "LoRA with a head", "IA3"])
def test_adapter_is_predicted_and_explained_by_its_folder(name, tmp_path):
    whole = adapted(tmp_path / "base", tmp_path / "adapter", name)
    explain = DAVE(f"hf:{tmp_path / 'adapter'}", noise_alpha=0.1, precision="fp32", route="frozen")
    torch.testing.assert_close(explain.predict(images()), whole(images()).logits.detach())
    other = DAVE(whole.merge_and_unload(), noise_alpha=0.1, precision="fp32", route="frozen")
    torch.testing.assert_close(explain.explain(images(), None, 2).raw, other.explain(images(), None, 2).raw)


BASES = [
    ("ViTModel", "ViTConfig", VIT, "ViTForImageClassification"),
    ("Dinov2Model", "Dinov2Config", DINOV2, "Dinov2ForImageClassification"),
    ("SwinModel", "SwinConfig", SWIN, "SwinForImageClassification"),
    ("DeiTModel", "DeiTConfig", VIT, "DeiTForImageClassificationWithTeacher"),
    ("ViTMAEModel", "ViTMAEConfig", VIT, None),
]


@pytest.mark.parametrize(("name", "config", "settings", "wanted"), BASES[:4], ids=[row[3] for row in BASES[:4]])
@pytest.mark.parametrize("labels", [1, 3])
def test_head_of_the_adapter_stands_on_a_base_without_one(name, config, settings, wanted, labels, tmp_path):
    import transformers

    base = made(name, config, **settings)
    base.save_pretrained(tmp_path / "base")
    kind = getattr(transformers, wanted)
    model = kind.from_pretrained(tmp_path / "base", num_labels=labels)
    heads = [each for each, _ in model.named_children() if "classifier" in each]
    targets = next(
        part
        for part in (["q_proj", "v_proj"], ["query", "value"])
        if any(each.endswith(part[0]) for each, _ in model.named_modules())
    )
    whole = adapted(tmp_path / "base", tmp_path / "adapter", model=model, target_modules=targets, modules_to_save=heads)
    loaded, _ = load_model(f"hf:{tmp_path / 'adapter'}")
    torch.testing.assert_close(loaded(images()), whole(images()).logits)
    assert type(loaded.model) is kind and loaded.num_classes == labels and labels_of(loaded).names is None


def test_head_of_another_number_of_classes_replaces_that_of_the_base(tmp_path):
    classifier(id2label={i: f"bird {i}" for i in range(K)}).save_pretrained(tmp_path / "base")
    kind = type(classifier())
    model = kind.from_pretrained(tmp_path / "base", num_labels=3, ignore_mismatched_sizes=True)
    whole = adapted(tmp_path / "base", tmp_path / "adapter", "LoRA with a head", model)
    loaded, _ = load_model(f"hf:{tmp_path / 'adapter'}")
    torch.testing.assert_close(loaded(images()), whole(images()).logits)
    assert labels_of(loaded).count == 3 and labels_of(loaded).names is None


@pytest.mark.parametrize("modules_to_save", [None, ["vit.layernorm"]])
def test_adapter_without_a_head_on_a_base_without_one_is_refused(modules_to_save, tmp_path):
    made("ViTModel", "ViTConfig", **VIT).save_pretrained(tmp_path / "base")
    adapted(tmp_path / "base", tmp_path / "adapter", modules_to_save=modules_to_save)
    message = refused(f"hf:{tmp_path / 'adapter'}", InputError, "are missing")
    assert "classifier" in message


NAMES = {i: f"bird {i}" for i in range(K)}


def test_names_and_image_processor_are_the_adapters_own_or_the_bases(tmp_path):
    base, folder = tmp_path / "base", tmp_path / "adapter"
    model = classifier(id2label=NAMES)
    adapted(base, folder, model=model)
    processor = {"image_processor_type": "ViTImageProcessor", "image_mean": [0.1] * 3, "image_std": [0.2] * 3}
    processor |= {"size": {"height": 32, "width": 32}}
    rewrite(base / "preprocessor_config.json", processor)
    loaded, _ = load_model(f"hf:{folder}")
    assert labels_of(loaded).name(2) == "bird 2" and preprocessing(loaded).mean == (0.1,) * 3
    rewrite(folder / "preprocessor_config.json", processor | {"image_mean": [0.3] * 3})
    classifier(id2label={i: f"fish {i}" for i in range(K)}).config.save_pretrained(folder)
    loaded, _ = load_model(f"hf:{folder}")
    assert labels_of(loaded).name(2) == "fish 2" and preprocessing(loaded).mean == (0.3,) * 3
    given, _ = load_model(ModelSpec(f"hf:{folder}", labels=[f"newt {i}" for i in range(K)]))
    assert labels_of(given).name(2) == "newt 2"


def test_adapter_for_images_of_another_size_is_prepared_for_it(tmp_path):
    whole = adapted(tmp_path / "base", tmp_path / "adapter")
    loaded, _ = load_model(ModelSpec(f"hf:{tmp_path / 'adapter'}", image_size=48))
    x = images(1, 48)
    torch.testing.assert_close(loaded(x), whole(pixel_values=x, interpolate_pos_encoding=True).logits)


def test_adapter_of_a_model_with_a_text_tower_embeds(tmp_path):
    model = made("CLIPModel", "CLIPConfig", vision_config=VIT, text_config=TEXT, projection_dim=16)
    whole = adapted(tmp_path / "base", tmp_path / "adapter", model=model)
    loaded, _ = load_model(f"hf:{tmp_path / 'adapter'}")
    expected = whole.get_base_model().get_image_features(pixel_values=images()).pooler_output
    torch.testing.assert_close(loaded(images()), expected)
    assert loaded.kind == "embedding"


# Where the base is


@pytest.mark.parametrize("place", ["../base", "../adapter/../base", "./../base"])
def test_relative_base_counts_from_the_adapters_folder(place, tmp_path, monkeypatch):
    elsewhere = tmp_path / "some" / "where"
    elsewhere.mkdir(parents=True)
    monkeypatch.chdir(elsewhere)
    whole = adapted(tmp_path / "base", tmp_path / "adapter")
    rewrite(tmp_path / "adapter" / CONFIG, {"base_model_name_or_path": place})
    torch.testing.assert_close(load_model(f"hf:{tmp_path / 'adapter'}")[0](images()), whole(images()).logits)


def test_relative_base_that_two_folders_may_be_is_refused(tmp_path, monkeypatch):
    adapted(tmp_path / "base", tmp_path / "adapter")
    rewrite(tmp_path / "adapter" / CONFIG, {"base_model_name_or_path": "../base"})
    (tmp_path / "some" / "where").mkdir(parents=True)
    (tmp_path / "some" / "base").mkdir()
    monkeypatch.chdir(tmp_path / "some" / "where")
    message = refused(f"hf:{tmp_path / 'adapter'}", UnknownModelError, "may be")
    assert str(tmp_path / "base") in message and str(tmp_path / "some" / "base") in message


@pytest.mark.parametrize("place", ["/nowhere/model", "./nowhere", "~/nowhere"])
def test_base_that_is_gone_is_named(place, tmp_path):
    adapted(tmp_path / "base", tmp_path / "adapter")
    rewrite(tmp_path / "adapter" / CONFIG, {"base_model_name_or_path": place})
    message = refused(f"hf:{tmp_path / 'adapter'}", UnknownModelError, f"was trained on {place}")
    assert "base_model_name_or_path" in message


def test_base_of_the_hub_that_cannot_be_fetched_is_named(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    adapted(tmp_path / "base", tmp_path / "adapter")
    rewrite(tmp_path / "adapter" / CONFIG, {"base_model_name_or_path": "nobody/nothing", "revision": "v1"})
    refused(f"hf:{tmp_path / 'adapter'}", UnknownModelError, "nobody/nothing, the model of the adapter")


def cached(folder, name, cache):
    """Put a folder into the cache of the hub, as if it had been downloaded."""
    place = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, place / "snapshots" / ("0" * 40))
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0" * 40)


def test_repositories_that_were_downloaded_are_loaded_without_a_network(tmp_path, monkeypatch):
    from huggingface_hub import constants

    whole = adapted(tmp_path / "base", tmp_path / "adapter")
    rewrite(tmp_path / "adapter" / CONFIG, {"base_model_name_or_path": "some/base"})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    cached(tmp_path / "base", "some/base", tmp_path / "cache")
    expected = load_model(f"hf:{tmp_path / 'base'}")[0](images())
    torch.testing.assert_close(load_model("hf:some/base")[0](images()), expected)
    refused("hf:some/adapter", UnknownModelError, "is not on this machine")
    cached(tmp_path / "adapter", "some/adapter", tmp_path / "cache")
    torch.testing.assert_close(load_model("hf:some/adapter")[0](images()), whole(images()).logits)


# What is refused


def timm_base(base, folder):
    rewrite(base / "config.json", {"architecture": "vit_tiny_patch16_224"})


def nested(base, folder):
    shutil.copy(folder / CONFIG, base / CONFIG)


def without_base_config(base, folder):
    os.remove(base / "config.json")


def code_in_base(base, folder):
    rewrite(base / "config.json", {"auto_map": {"AutoModel": "evil.M"}})


def less_weights(base, folder):
    weights = load_file(folder / WEIGHTS)
    save_file(dict(list(weights.items())[1:]), folder / WEIGHTS)


def more_weights(base, folder):
    save_file(
        load_file(folder / WEIGHTS) | {"base_model.model.extra.lora_A.weight": torch.zeros(2, 2)}, folder / WEIGHTS
    )


def other_shape(base, folder):
    save_file({name: torch.zeros(5, 5) for name in load_file(folder / WEIGHTS)}, folder / WEIGHTS)


def without_weights(base, folder):
    os.remove(folder / WEIGHTS)


def pickled(base, folder):
    os.remove(folder / WEIGHTS)
    torch.save({"a": Evil(str(folder / "ran"))}, folder / "adapter_model.bin")


def changed(**changes):
    def spoil(base, folder):
        rewrite(folder / CONFIG, changes)

    return spoil


OWN_CLASS = {"base_model_class": "Own", "parent_library": "evil"}
SPOILED = {
    "prompt tuning": (changed(peft_type="PROMPT_TUNING"), ModelError, "method PROMPT_TUNING, which is not supported"),
    "prefix tuning": (changed(peft_type="PREFIX_TUNING"), ModelError, "method PREFIX_TUNING"),
    "a method that compiles code": (changed(peft_type="BOFT"), ModelError, "method BOFT"),
    "an unknown method": (changed(peft_type="NEW"), ModelError, "method NEW"),
    "no method": (changed(peft_type=None), ModelError, "method None"),
    "no base": (changed(base_model_name_or_path=None), UnknownModelError, "does not say which model it belongs to"),
    "Megatron": (changed(megatron_config={"a": 1}, megatron_core="evil"), ModelError, "Megatron"),
    "a class of the user's": (changed(auto_mapping=OWN_CLASS), ModelError, "no part of transformers"),
    "another target": (changed(target_modules=["nothing"]), UnknownModelError, "could not be loaded"),
    "another rank": (changed(r=5), InputError, "size|shape"),
    "a rank of gigabytes": (
        changed(r=2**20, target_modules=["q_proj", "v_proj"]),
        ModelError,
        "far larger than its weights",
    ),
    "a pattern of ranks of gigabytes": (
        changed(rank_pattern={"._proj": 2**20}, target_modules=["q_proj", "v_proj"]),
        ModelError,
        "far larger than its weights",
    ),
    "a setting of a later peft": (changed(brand_new=3), ModelError, "does not know .brand_new."),
    "code of its own": (changed(auto_map={"AutoModel": "evil.M"}), ModelError, "code of its own"),
    "code in the base": (code_in_base, ModelError, "code of its own"),
    "a base of timm": (timm_base, ModelError, "no model of transformers"),
    "an adapter as the base": (nested, ModelError, "no model of transformers"),
    "a base without configuration": (without_base_config, ModelError, "no model of transformers"),
    "a tensor less": (less_weights, InputError, "1 are missing"),
    "a tensor more": (more_weights, InputError, "has no place for"),
    "tensors of another shape": (other_shape, InputError, "size|shape"),
    "no weights": (without_weights, UnknownModelError, "has no weights"),
    "a pickle of objects": (pickled, InputError, "code in pickles is not run"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_adapter_that_is_not_what_it_should_be_is_refused(name, tmp_path):
    spoil, kind, match = SPOILED[name]
    adapted(tmp_path / "base", tmp_path / "adapter")
    spoil(tmp_path / "base", tmp_path / "adapter")
    refused(f"hf:{tmp_path / 'adapter'}", kind, match)
    assert not (tmp_path / "adapter" / "ran").exists() and "evil" not in sys.modules


def test_adapter_in_a_pickle_of_tensors_is_loaded(tmp_path):
    whole = adapted(tmp_path / "base", tmp_path / "adapter")
    torch.save(load_file(tmp_path / "adapter" / WEIGHTS), tmp_path / "adapter" / "adapter_model.bin")
    os.remove(tmp_path / "adapter" / WEIGHTS)
    torch.testing.assert_close(load_model(f"hf:{tmp_path / 'adapter'}")[0](images()), whole(images()).logits)


@pytest.mark.parametrize("spec", [dict(random_weights=True), dict(random_weights=True, num_classes=3)])
def test_weights_and_classes_beside_an_adapter_are_refused(spec, tmp_path):
    adapted(tmp_path / "base", tmp_path / "adapter")
    refused(
        ModelSpec(f"hf:{tmp_path / 'adapter'}", **spec),
        InputError,
        "is an adapter, with weights and classes of its own",
    )


def test_adapter_without_peft_says_what_to_install(tmp_path, monkeypatch):
    import importlib.util

    adapted(tmp_path / "base", tmp_path / "adapter")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "peft" else find(name, *rest))
    refused(
        f"hf:{tmp_path / 'adapter'}",
        MissingPackageError,
        r"an adapter, needs the package peft, which is missing: pip install '\.\[hf\]'",
    )


# Names of an earlier version of transformers

EARLIER = (("vit.layers", "vit.encoder.layer"), ("attention.q_proj", "attention.attention.query"))
EARLIER += (("attention.v_proj", "attention.attention.value"),)


def earlier(folder, **changes):
    """Rename an adapter's tensors and targets to those of transformers 4."""
    renamed = {}
    for name, tensor in load_file(folder / WEIGHTS).items():
        for now, before in EARLIER:
            name = name.replace(now, before)
        renamed[name] = tensor
    save_file(renamed, folder / WEIGHTS)
    rewrite(folder / CONFIG, {"target_modules": ["query", "value"]} | changes)


@pytest.mark.parametrize(
    "changes", [{}, {"bias": "lora_only"}, {"use_dora": True}, {"modules_to_save": ["classifier"]}]
)
def test_adapter_with_names_of_an_earlier_transformers_is_the_same(changes, tmp_path):
    settings = dict(target_modules=["q_proj", "v_proj"]) | changes
    whole = adapted(tmp_path / "base", tmp_path / "adapter", **settings)
    earlier(tmp_path / "adapter")
    torch.testing.assert_close(load_model(f"hf:{tmp_path / 'adapter'}")[0](images()), whole(images()).logits)


@pytest.mark.parametrize(
    "changes", [{"rank_pattern": {"query": 2}}, {"alpha_pattern": {"query": 3}}, {"target_modules": ".*query"}]
)
def test_adapter_with_patterns_of_earlier_names_is_refused(changes, tmp_path):
    adapted(tmp_path / "base", tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
    earlier(tmp_path / "adapter", **changes)
    refused(f"hf:{tmp_path / 'adapter'}", ModelError, "as an earlier version of transformers did")


def test_adapter_with_earlier_names_and_a_tensor_less_is_refused(tmp_path):
    adapted(tmp_path / "base", tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
    earlier(tmp_path / "adapter")
    less_weights(tmp_path / "base", tmp_path / "adapter")
    refused(f"hf:{tmp_path / 'adapter'}", InputError, "1 are missing")
