"""torchvision's models, with the preprocessing and the class names that their weights come with."""

from __future__ import annotations

import difflib
import os
from typing import Any

from torch import nn

from dave_fast.errors import UnknownModelError
from dave_fast.images import describe_preprocessing
from dave_fast.models.hub import download, loading
from dave_fast.models.spec import ModelSpec
from dave_fast.models.weights_file import load_weights


def load(name: str, spec: ModelSpec) -> nn.Module:
    """The model of NAME or NAME:WEIGHTS, its weights those of torchvision's enumeration, by default the best.

    The model is torchvision's own, with `num_classes` and `pretrained_cfg` beside.

    Raises UnknownModelError, InputError.
    """
    from torchvision import models

    architecture, _, wanted = name.partition(":")
    if architecture not in models.list_models(module=models):
        near = difflib.get_close_matches(architecture, models.list_models(module=models), n=3, cutoff=0.6)
        hint = f"did you mean {' or '.join(near)}?" if near else "see torchvision.models.list_models()."
        raise UnknownModelError(f"torchvision has no classifier {architecture!r}; {hint}")
    known = models.get_model_weights(architecture)
    if wanted and wanted not in known.__members__:
        raise UnknownModelError(f"{architecture} has no weights {wanted!r}; it has {', '.join(known.__members__)}.")
    chosen: Any = known[wanted] if wanted else known["DEFAULT"]
    classes = spec.num_classes or len(chosen.meta["categories"])
    if spec.weights is not None or spec.random_weights:
        with loading(spec.name, remote=False):
            model = models.get_model(architecture, weights=None, num_classes=classes)
        if spec.weights is not None:
            load_weights(model, spec.weights, spec.name)
    else:
        with download(spec.name, chosen.url, _cached(chosen.url)):
            model = models.get_model(architecture, weights=chosen, progress=False)
    names = chosen.meta["categories"] if spec.num_classes is None else None
    model.num_classes = classes
    model.pretrained_cfg = preprocessing_of(chosen) | ({} if names is None else {"label_names": tuple(names)})
    return model


def preprocessing_of(weights: Any) -> dict[str, Any]:
    """The preprocessing of a member of torchvision's weights, in timm's words."""
    preset = weights.transforms()
    (size,), (resize,) = preset.crop_size, preset.resize_size
    return describe_preprocessing(
        (size, size), preset.mean, preset.std, resize=resize, interpolation=preset.interpolation.value
    )


def _cached(url: str) -> str:
    """Where torch.hub keeps what it fetched."""
    import torch

    return os.path.join(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
