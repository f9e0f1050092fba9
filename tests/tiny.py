"""Tiny Vision Transformers, built in one place, for tests of the code around a model.

All are timm's ViT with two blocks of width 24, two heads, patches of 8 pixels, images of 32 and five classes, unless a
test says otherwise. `tests/variants.py` has a narrow model of every family instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from tests.variants import randomise


def initial_vit(seed: int = 0, **settings: Any) -> VisionTransformer:
    """Return a ViT in evaluation mode with timm's initial weights; its logits are near zero.

    Args:
        seed: set as the seed of PyTorch's global generator, from which the weights are drawn.
        settings: timm's constructor arguments that differ from those of this module.
    """
    torch.manual_seed(seed)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
    return VisionTransformer(**(sizes | settings)).eval()


def random_vit(seed: int = 0, **settings: Any) -> VisionTransformer:
    """Return a ViT whose every parameter is random, so that attention and gates are far from uniform."""
    model = initial_vit(seed, **settings)
    randomise(model)
    return model


def random_head_vit(seed: int = 0, **settings: Any) -> VisionTransformer:
    """Return a ViT with initial weights and a normal head, so that classes differ clearly."""
    model = initial_vit(seed, **settings)
    nn.init.normal_(model.head.weight)
    return model


def named_vit(names: Sequence[str], seed: int = 0) -> VisionTransformer:
    """Return `random_head_vit` with named classes and timm's configuration of its input, as a loaded model has."""
    model = random_head_vit(seed, num_classes=len(names))
    model.pretrained_cfg = {
        "input_size": (3, 32, 32),
        "num_classes": len(names),
        "label_names": list(names),
        "crop_pct": 1.0,
    }
    return model
