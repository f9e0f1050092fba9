"""Libra FullGrad+: its decomposition is complete, and its map is the terms that have a place."""

import pytest
import torch
from torch import nn

from dave_fast import effective_gradient
from dave_fast.evaluate.full_gradient import full_gradient, libra_fullgrad_plus
from dave_fast.evaluate.methods import METHODS, MethodSettings
from dave_fast.evaluate.twin import NotTakenError
from tests.tiny import random_vit
from tests.tolerances import EXACT

OPTIONS = [
    {},
    {"init_values": 0.1},
    {"global_pool": "avg", "fc_norm": False},
    {"reg_tokens": 2, "qkv_bias": False},
    {"pre_norm": True},
    {"global_pool": "map", "class_token": False},
]
CLASSES = torch.tensor([1, 3])


def drawn():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("options", OPTIONS)
def test_pixels_and_biases_add_up_to_the_logit(options):
    model, images = random_vit(**options).double(), drawn()
    terms = full_gradient(model, images, CLASSES)
    wanted = model(images).detach()[torch.arange(2), CLASSES]
    assert (terms.logits - wanted).norm() <= EXACT * wanted.norm()
    found = terms.pixels.flatten(1).sum(1) + sum(each.flatten(1).sum(1) for each in terms.biases.values())
    assert (found - terms.logits).norm() <= EXACT * terms.logits.norm()


def test_pixels_are_the_frozen_gradient_times_the_image_and_each_block_adds_up_with_the_biases_behind_it():
    model, images = random_vit().double(), drawn()
    terms = full_gradient(model, images, CLASSES)
    wanted = effective_gradient(model, images, CLASSES) * images
    assert (terms.pixels - wanted).norm() <= EXACT * wanted.norm()
    behind = [name for name in terms.biases if name.startswith(("blocks.1.", "norm", "head"))]
    found = terms.layers[1].flatten(1).sum(1) + sum(terms.biases[name].flatten(1).sum(1) for name in behind)
    assert (found - terms.logits).norm() <= EXACT * terms.logits.norm()


def test_the_map_has_the_sum_of_the_patch_tokens_terms_and_no_hook_is_left():
    model, images = random_vit(img_size=8).double(), drawn()[:, :, :8, :8]
    maps = libra_fullgrad_plus(model, MethodSettings())(images, CLASSES, (0, 1), 0)
    terms = full_gradient(model, images, CLASSES)
    wanted = sum(each[:, 1].sum(1) for each in (*terms.layers, *terms.biases.values()) if each.ndim == 3)
    # one patch of 8×8 pixels: a constant map
    assert torch.allclose(maps.sum(1), wanted[:, None, None].expand(2, 8, 8), rtol=EXACT)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_terms_of_the_one_token_of_a_pooling_have_no_place():
    model, images = random_vit(global_pool="map", class_token=False).double(), drawn()
    maps = libra_fullgrad_plus(model, MethodSettings())(images, CLASSES, (0, 1), 0)
    terms = full_gradient(model, images, CLASSES)
    assert terms.biases["attn_pool.proj"].shape == (2, 1, 24)
    patches = [each for each in (*terms.layers, *terms.biases.values()) if each.shape[1] == 16]
    wanted = sum(each.flatten(1).sum(1) for each in patches)
    # the enlarged map has each patch 64 times
    assert torch.allclose(maps.flatten(1).sum(1) / 64, wanted, rtol=EXACT)


def test_a_model_without_tokens_is_refused():
    with pytest.raises(NotTakenError, match="not Linear"):
        METHODS["Libra FullGrad+"].make(nn.Linear(2, 2), MethodSettings())
