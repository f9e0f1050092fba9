"""Tests of the comparison of a model's classes with the code that was installed."""

import functools

import pytest
import timm.layers
import timm.models.vision_transformer as vision_transformer
import torch
from timm.layers import Mlp
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import nn

from dave_fast.plan.families import why_not
from dave_fast.plan.installed import replaced
from tests.tiny import random_vit
from tests.variants import ENGINE


def changed(name):
    """Return a function of a name of the library that is not the library's."""

    def forward(*args, **kwargs):
        return args[1]

    forward.__name__ = name
    forward.__qualname__ = f"Attention.{name}"
    return forward


class Callable:
    def __call__(self, *args):
        return args[0]


PATCHES = {
    "a method": (Attention, "forward", changed("forward")),
    "a method of the same name": (Attention, "forward", Block.forward),
    "a lambda": (Mlp, "forward", lambda self, x: x),
    "a wrapped method": (Block, "forward", functools.wraps(Block.forward)(lambda self, x, **k: x)),
    "a partial method": (Block, "forward", functools.partialmethod(Block.forward)),
    "an object": (VisionTransformer, "forward_head", Callable()),
    "a method without gradient": (VisionTransformer, "forward_features", torch.no_grad()(VisionTransformer.forward)),
    "positions": (VisionTransformer, "_pos_embed", changed("_pos_embed")),
    "a method of a base class": (nn.Linear, "forward", changed("forward")),
    "the norm": (nn.LayerNorm, "forward", changed("forward")),
    "how modules are called": (nn.Module, "__call__", changed("__call__")),
    "attributes": (nn.Module, "__getattr__", lambda self, name: None),
}
FUNCTIONS = {
    "attention": (torch.nn.functional, "scaled_dot_product_attention", changed("scaled_dot_product_attention")),
    "an activation": (torch.nn.functional, "gelu", lambda x, **k: x),
    "another builtin": (torch.nn.functional, "gelu", torch.relu),
    "a Python function": (torch.nn.functional, "layer_norm", changed("layer_norm")),
    "positions": (vision_transformer, "resample_abs_pos_embed", changed("resample_abs_pos_embed")),
    "the mask": (timm.layers.attention, "maybe_add_mask", changed("maybe_add_mask")),
    "pooling": (vision_transformer, "global_pool_nlc", changed("global_pool_nlc")),
}


@pytest.mark.parametrize(("owner", "name", "patch"), PATCHES.values(), ids=PATCHES)
def test_a_replaced_method_is_named(monkeypatch, owner, name, patch):
    model = random_vit()
    monkeypatch.setattr(owner, name, patch)
    kinds = {type(module) for module in nn.Module.modules(model)}
    found = {replaced(kind) for kind in kinds} - {None}
    assert f"{owner.__name__}.{name}" in found
    monkeypatch.undo()
    assert why_not(model) is None


@pytest.mark.parametrize(("scope", "name", "patch"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_a_replaced_function_is_named(monkeypatch, scope, name, patch):
    model = random_vit()
    monkeypatch.setattr(scope, name, patch)
    reason = why_not(model)
    assert reason is not None and name in reason and "is not the one that was installed" in reason
    monkeypatch.undo()
    assert why_not(model) is None


@pytest.mark.parametrize("name", ENGINE)
def test_the_installed_classes_are_as_installed(name):
    model = ENGINE[name].build()
    kinds = {type(module) for module in model.modules()}
    assert {kind: replaced(kind) for kind in kinds} == dict.fromkeys(kinds)


def test_what_other_libraries_replace_for_loading_is_no_change(monkeypatch):
    model = random_vit()
    monkeypatch.setattr(nn.Module, "load_state_dict", changed("load_state_dict"))
    monkeypatch.setattr(VisionTransformer, "__init__", changed("__init__"))
    monkeypatch.setattr(nn.Module, "smart_apply", changed("smart_apply"), raising=False)
    assert why_not(model) is None


def test_a_class_of_ones_own_is_not_compared():
    class Own(nn.Module):
        def forward(self, x):
            return x

    Own.forward = lambda self, x: 2 * x
    assert replaced(Own) is None
