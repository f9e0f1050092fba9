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
    """The model of any name that `timm.create_model` takes. remote: its weights, or its configuration, are fetched."""
    import timm

    own = spec.weights is None and not spec.random_weights
    given = {"num_classes": spec.num_classes, "img_size": spec.image_size}
    settings: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    needed = own or ":" in name
    with loading(spec.name, remote=remote and needed):
        try:
            model = timm.create_model(name, pretrained=own, **settings)
        except (TypeError, AssertionError) as error:
            if spec.image_size is None:
                raise
            raise InputError(f"{spec.name} cannot be built for {spec.image_size} pixels: {error}.") from error
    if spec.weights is not None:
        load_weights(model, spec.weights, spec.name)
    return model
