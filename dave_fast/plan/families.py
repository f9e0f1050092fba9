"""The families of models that the engine makes plans for: one table, one reader each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from dave_fast.given.wrappers import Normalised
from dave_fast.plan import huggingface, timm_beit, timm_eva, timm_relpos, timm_vit, torchvision_vit
from dave_fast.plan.checks import check_modules
from dave_fast.plan.folding import double
from dave_fast.plan.open_clip_vit import open_clip_family
from dave_fast.plan.parts import class_name
from dave_fast.plan.reading import Family, Linear, NoPlanError, Reading

_TIMM = (timm_vit.FAMILY, timm_eva.FAMILY, timm_beit.FAMILY, timm_relpos.FAMILY)
FAMILIES: tuple[Family, ...] = (
    *_TIMM,
    huggingface.FAMILY,
    torchvision_vit.FAMILY,
    open_clip_family(lambda trunk, size: _family(trunk).read(trunk, size)),
)
# our adapters, which lie beside this folder, and whose output is that of the module that they hold as `model`
_ADAPTERS = (
    "dave_fast.models.adapter.Adapter",
    "dave_fast.models.huggingface_adapter.Transformers",
    "dave_fast.models.huggingface_adapter.TransformersTextImage",
    "dave_fast.models.from_open_clip.OpenClip",
)


def read(model: nn.Module, size: tuple[int, int] | None = None) -> Reading:
    """Read a model into the neutral form from which plans are made; the model itself is not changed.

    Args:
        model: any module.
        size: (H, W) of the images in pixels; by default those that the model was built for.

    Raises:
        NoPlanError: the model belongs to no family, has a part that its family's reader does not know, or does not
            take images of this size.
    """
    if type(model) is Normalised:
        channels = model.channel_map()
        if channels is None:
            raise NoPlanError("what stands ahead of its model is no map of single channels")
        return _normalised(read(model.model, size), *channels)
    found: Any = model.model if class_name(type(model)) in _ADAPTERS else model
    family = _family(found)
    check_modules(model)
    return family.read(found, size)


def _family(model: nn.Module) -> Family:
    """Return the family of a model by its class; raise NoPlanError where it belongs to none."""
    name = class_name(type(model))
    family = next((f for f in FAMILIES if name in f.classes), None)
    if family is None:
        known = ", ".join(each.rpartition(".")[2] for f in _TIMM for each in f.classes)
        raise NoPlanError(
            f"{type(model).__name__} is none of timm's classes {known}, and none of another library's that are read"
        )
    return family


def _normalised(model: Reading, scale: Tensor, shift: Tensor) -> Reading:
    """Return a model behind the map scale · x + shift of its channels (C,): W·diag(scale) and W·shift."""
    projection = double(model.projection)
    # a patch is ordered (c, y, x)
    pixels = projection.weight.shape[1] // len(scale)
    scale, shift = (each.to(projection.weight).repeat_interleave(pixels) for each in (scale, shift))
    added = projection.weight @ shift
    weight = projection.weight * scale
    if model.patch_norm is None:
        return replace(model, projection=Linear(weight, projection.bias), position=model.position + added)
    return replace(model, projection=Linear(weight, projection.bias + added))


def why_not(model: nn.Module, size: tuple[int, int] | None = None) -> str | None:
    """Return why the engine has no plan for a model at an image size (H, W), or None where it has one."""
    try:
        read(model, size)
    except NoPlanError as reason:
        return str(reason)
    return None
