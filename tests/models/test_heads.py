"""Tests of class names after a head was replaced, in the ways that people replace it."""

from __future__ import annotations

import copy
import functools
import json

import pytest
import timm
import torch
from torch import nn
from torchvision import models as torchvision_models

from dave_fast.models.adapter import Adapter
from dave_fast.models.catalog import load_model
from dave_fast.models.labels import Labels, labels_of
from dave_fast.models.meaning import kind_of, link_of

# one for each kind of place that timm keeps a head in
NAMES = (
    "vit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "swin_tiny_patch4_window7_224",
    "convnext_atto",
    "resnet18",
    "efficientnet_b0",
    "beit_base_patch16_224",
    "levit_128s",
    "crossvit_9_240",
    "volo_d1_224",
    "maxvit_tiny_rw_224",
    "hiera_tiny_224",
)
SLOW = ("crossvit_9_240", "volo_d1_224", "maxvit_tiny_rw_224", "hiera_tiny_224")
TIMM = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in NAMES]
TORCHVISION = ("vit_b_16", "swin_t", "resnet18", "convnext_tiny", "efficientnet_b0", "maxvit_t")


@functools.cache
def original(name, **settings):
    with torch.device("meta"):
        return timm.create_model(name, **settings)


def made(name, **settings):
    """Return a model of timm of its own, without memory for its weights."""
    return copy.deepcopy(original(name, **settings))


def places(model):
    """Return the names of a timm model's heads."""
    named = model.pretrained_cfg["classifier"]
    return [named] if isinstance(named, str) else list(named)


def put(model, path, module):
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def of_width(width):
    return nn.Linear(4, width)


def with_dropout(width):
    return nn.Sequential(nn.Dropout(), of_width(width))


def perceptron(width):
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), of_width(width))


HEADS = {"linear": of_width, "dropout and linear": with_dropout, "perceptron": perceptron}


@pytest.mark.parametrize("name", TIMM)
def test_a_model_as_it_was_made_has_imagenets_names(name):
    model = made(name)
    assert labels_of(model).name(0) == "tench" and labels_of(model).count == 1000 and kind_of(model) == "classifier"


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", TIMM)
def test_a_replaced_timm_head_has_as_many_classes_as_outputs_and_no_names(name, head):
    model = made(name)
    for path in places(model):
        put(model, path, HEADS[head](3))
    assert labels_of(model) == Labels(3) and kind_of(model) == "classifier"
    assert model.num_classes == 1000


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "convnext_atto"])
def test_a_module_in_place_of_all_that_held_the_head_has_no_names(name, head):
    model = made(name)
    setattr(model, places(model)[0].partition(".")[0], HEADS[head](3))
    assert labels_of(model) == Labels(3)


@pytest.mark.parametrize("name", TIMM)
def test_a_head_of_another_form_loses_the_names_even_with_as_many_outputs(name):
    model = made(name)
    put(model, places(model)[0], perceptron(1000))
    assert labels_of(model) == Labels(1000)


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "levit_128s"])
def test_one_replaced_head_of_two_is_enough_to_lose_the_names(name):
    model = made(name)
    put(model, places(model)[-1], of_width(3))
    assert labels_of(model).names is None


@pytest.mark.parametrize("name", TIMM)
def test_a_reset_classifier_has_no_names(name):
    model = made(name)
    with torch.device("meta"):
        model.reset_classifier(3)
    assert labels_of(model) == Labels(3)


@pytest.mark.parametrize("name", TIMM)
def test_a_removed_head_leaves_an_embedding_and_a_new_one_makes_classes_again(name):
    model = made(name)
    for path in places(model):
        put(model, path, nn.Identity())
    assert kind_of(model) == "embedding" and labels_of(model) == Labels(0)
    model = made(name, num_classes=0)
    assert kind_of(model) == "embedding"
    for path in places(model):
        put(model, path, of_width(5))
    assert model.num_classes == 0 and kind_of(model) == "classifier" and labels_of(model) == Labels(5)


@pytest.mark.parametrize("name", TORCHVISION)
def test_replaced_heads_of_torchvision(name):
    with torch.device("meta"):
        model = torchvision_models.get_model(name, weights=None)
    # as `load_model` leaves it
    model.num_classes, model.pretrained_cfg = 1000, {"label_names": [f"thing {i}" for i in range(1000)]}
    assert labels_of(model).name(7) == "thing 7"
    last, _ = list(model.named_children())[-1]
    leaf = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    for path in {leaf, last}:
        put(model, path, of_width(3))
        assert labels_of(model) == Labels(3)
    put(model, last, nn.Identity())
    assert kind_of(model) == "embedding"


HUGGING = {"vit": "ViT", "dinov2": "Dinov2", "beit": "Beit", "deit": "DeiT", "vit_msn": "ViTMSN"}


def transformers_model(name, **settings):
    import transformers

    config = getattr(transformers, f"{HUGGING[name]}Config")(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=16,
        patch_size=8,
        id2label={0: "cat", 1: "dog", 2: "newt"},
        **settings,
    )
    return getattr(transformers, f"{HUGGING[name]}ForImageClassification")(config).eval()


@pytest.mark.parametrize("name", HUGGING)
def test_replaced_heads_of_transformers(name):
    model = transformers_model(name)
    width = model.classifier.in_features
    assert labels_of(load_model(model)[0]).names == ("cat", "dog", "newt")
    for classes in (1, 2, 4):
        model.classifier = nn.Sequential(nn.Dropout(), nn.Linear(width, classes)).eval()
        assert labels_of(load_model(model)[0]) == Labels(classes)
    model.classifier = nn.Identity()
    assert kind_of(load_model(model)[0]) == "embedding"


@pytest.mark.parametrize("problem", [None, "multi_label_classification", "regression"])
def test_a_timm_folder_says_what_its_scores_are(problem, tmp_path):
    from timm.models import save_for_hf

    save_for_hf(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=5), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_args": {"img_size": 32, "depth": 1}, "problem_type": problem}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, _ = load_model(f"hf:{tmp_path}")
    assert link_of(model, 5) == {None: "softmax", "multi_label_classification": "sigmoid", "regression": None}[problem]


def test_the_output_decides_before_the_head_and_the_head_before_num_classes():
    model = made("vit_tiny_patch16_224")
    model.head = of_width(3)
    assert [labels_of(model, width) for width in (None, 2)] == [Labels(3), Labels(2)]
    assert labels_of(model, 1000).names is not None


def test_an_adapter_is_taken_at_its_word_until_its_output_is_known():
    names = {"label_names": ("ant", "bee")}
    model = Adapter(nn.Identity(), kind="classifier", pretrained_cfg=names)
    assert labels_of(model) == Labels(2, ("ant", "bee")) and labels_of(model, 3) == Labels(3)


@pytest.mark.parametrize("last", [of_width(3), perceptron(3)])
def test_layers_behind_a_model_are_its_head(last):
    model = nn.Sequential(made("vit_tiny_patch16_224"), last)
    assert labels_of(model).names is None and labels_of(model).count in (3, None)
    assert kind_of(model) == "classifier"
