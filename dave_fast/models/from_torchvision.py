"""Models of torchvision, with the preprocessing and the class names of their weights."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from dave_fast.errors import UnknownModelError, suggestion
from dave_fast.images import describe_preprocessing
from dave_fast.models.hub import download, loading
from dave_fast.models.spec import ModelSpec
from dave_fast.models.weights_file import load_weights


def load(name: str, spec: ModelSpec) -> nn.Module:
    """Load the model of NAME or NAME:WEIGHTS, a member of torchvision's enumeration, by default "DEFAULT".

    The model is torchvision's own with the attributes `num_classes` and `pretrained_cfg` added.

    Raises:
        UnknownModelError: there is no such model, or its weights cannot be fetched.
        InputError: the weights of the spec do not fit.
    """
    from torchvision import models

    architecture, chosen = name.partition(":")[0], weights_of(name)
    classes = spec.num_classes or len(chosen.meta["categories"])
    if not spec.pretrained:
        with loading(spec.name, remote=False):
            model = models.get_model(architecture, weights=None, num_classes=classes)
        if spec.weights is not None:
            load_weights(model, spec.weights, spec.name)
    else:
        cached = os.path.join(torch.hub.get_dir(), "checkpoints", chosen.url.rpartition("/")[2])
        with download(spec.name, chosen.url, cached):
            model = models.get_model(architecture, weights=chosen, progress=False)
    names = chosen.meta["categories"] if spec.num_classes is None else None
    model.num_classes = classes
    model.pretrained_cfg = preprocessing_of(chosen) | ({} if names is None else {"label_names": tuple(names)})
    return model


def weights_of(name: str) -> Any:
    """Return the member of torchvision's weights that NAME or NAME:WEIGHTS names.

    Raises:
        UnknownModelError: there is no such model, or it has no such weights.
    """
    from torchvision import models

    architecture, _, wanted = name.partition(":")
    if architecture not in models.list_models(module=models):
        hint = suggestion(architecture, models.list_models(module=models), "torchvision.models.list_models()")
        raise UnknownModelError(f"torchvision has no classifier {architecture!r}; {hint}")
    known = models.get_model_weights(architecture)
    if wanted and wanted not in known.__members__:
        raise UnknownModelError(f"{architecture} has no weights {wanted!r}; it has {', '.join(known.__members__)}.")
    return known[wanted] if wanted else known["DEFAULT"]


def preprocessing_of(weights: Any) -> dict[str, Any]:
    """Return the preprocessing of a member of torchvision's weights under timm's keys."""
    preset = weights.transforms()
    (size,), (resize,) = preset.crop_size, preset.resize_size
    return describe_preprocessing(
        (size, size), preset.mean, preset.std, resize=resize, interpolation=preset.interpolation.value
    )
