"""Models of timm: by name, from the hub or from a folder that timm wrote."""

from __future__ import annotations

from typing import Any

from torch import nn

from dave_fast.errors import InputError, UnknownModelError, suggestion
from dave_fast.models.hub import loading
from dave_fast.models.huggingface_files import Place
from dave_fast.models.limits import limited_memory
from dave_fast.models.spec import ModelSpec
from dave_fast.models.weights_file import load_weights


def load(name: str, spec: ModelSpec) -> nn.Module:
    """Load the model of a name such as vit_base_patch16_224.augreg_in1k.

    Raises:
        UnknownModelError: timm has no such model, or its weights cannot be fetched.
        InputError: the weights or the size of the spec do not fit.
    """
    import timm

    if not timm.is_model(name):
        hint = suggestion(name, ["demo", *timm.list_models()], "timm.list_models()")
        raise UnknownModelError(
            f"timm has no model {name!r}; {hint} 'demo' is the embedded model; names of other libraries begin with "
            "hf:, torchvision: or open_clip:."
        )
    return create(name, spec, remote=True)


def create(name: str, spec: ModelSpec, *, remote: bool) -> nn.Module:
    """Create the model of any name that `timm.create_model` takes.

    Weights from a file may be for the model's own image size, and are then resampled, or for that of the spec.

    Args:
        name: for `timm.create_model`.
        spec: of the model.
        remote: whether weights or configuration may be fetched from the hub.

    Raises:
        UnknownModelError: the model cannot be loaded.
        InputError: the weights or the size of the spec do not fit.
    """
    remote = remote and (spec.pretrained or ":" in name)
    if spec.weights is None:
        return _made(name, spec, spec.image_size, remote=remote)
    model: Any = _made(name, spec, None, remote=remote)
    try:
        load_weights(model, spec.weights, spec.name)
    except InputError:
        if spec.image_size is None:
            raise
        model = _made(name, spec, spec.image_size, remote=remote)
        load_weights(model, spec.weights, spec.name)
        return model
    if spec.image_size is not None:
        if not hasattr(model, "set_input_size"):
            raise InputError(f"{spec.name} takes images of its own size: leave image_size out.")
        model.set_input_size((spec.image_size, spec.image_size))
    return model


def _made(name: str, spec: ModelSpec, size: int | None, *, remote: bool) -> nn.Module:
    """Build a model; raise InputError if it cannot be built for images of this size."""
    import timm

    given = {"num_classes": spec.num_classes, "img_size": size}
    settings: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    with loading(spec.name, remote=remote), limited_memory(Place.folder_of(name), spec.weights):
        try:
            return timm.create_model(name, pretrained=spec.pretrained, **settings)
        except (TypeError, AssertionError) as error:
            if size is None:
                raise
            raise InputError(f"{spec.name} cannot be built for images of {size} pixels: {error}.") from error
