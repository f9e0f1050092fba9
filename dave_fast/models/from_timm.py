"""timm's models: by name, from the hub or from a folder that timm wrote."""

from __future__ import annotations

import difflib
from typing import Any

from torch import nn

from dave_fast.errors import InputError, UnknownModelError
from dave_fast.models.hub import loading
from dave_fast.models.spec import ModelSpec
from dave_fast.models.weights_file import load_weights


def load(name: str, spec: ModelSpec) -> nn.Module:
    """The model of a name such as vit_base_patch16_224.augreg_in1k. Raises UnknownModelError, InputError."""
    import timm

    if not timm.is_model(name):
        near = difflib.get_close_matches(name, ["demo", *timm.list_models()], n=3, cutoff=0.6)
        hint = f"did you mean {' or '.join(near)}?" if near else "see timm.list_models()."
        raise UnknownModelError(
            f"timm has no model {name!r}; {hint} 'demo' is the embedded one, hf:, torchvision: and open_clip: lead to "
            "other libraries."
        )
    return create(name, spec, remote=True)


def create(name: str, spec: ModelSpec, *, remote: bool) -> nn.Module:
    """The model of any name that `timm.create_model` takes. remote: its weights, or its configuration, are fetched.

    Weights from a file may be of the model's own image size, which is then resampled, or of the one asked for.
    """
    own = spec.weights is None and not spec.random_weights
    if spec.weights is None:
        return _made(name, spec, spec.image_size, pretrained=own, remote=remote and (own or ":" in name))
    elsewhere = remote and ":" in name
    model: Any = _made(name, spec, None, pretrained=False, remote=elsewhere)
    try:
        load_weights(model, spec.weights, spec.name)
    except InputError:
        if spec.image_size is None:
            raise
        model = _made(name, spec, spec.image_size, pretrained=False, remote=elsewhere)
        load_weights(model, spec.weights, spec.name)
        return model
    if spec.image_size is not None:
        if not hasattr(model, "set_input_size"):
            raise InputError(f"{spec.name} takes images of its own size: leave image_size out.")
        model.set_input_size((spec.image_size, spec.image_size))
    return model


def _made(name: str, spec: ModelSpec, size: int | None, *, pretrained: bool, remote: bool) -> nn.Module:
    """A model by its name. Raises InputError where it cannot be built for images of this size."""
    import timm

    given = {"num_classes": spec.num_classes, "img_size": size}
    settings: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    with loading(spec.name, remote=remote):
        try:
            return timm.create_model(name, pretrained=pretrained, **settings)
        except (TypeError, AssertionError) as error:
            if size is None:
                raise
            raise InputError(f"{spec.name} cannot be built for images of {size} pixels: {error}.") from error
