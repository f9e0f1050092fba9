"""Models of Hugging Face by name: of transformers, timm and open_clip, and adapters that peft wrote.

The class is the one that the configuration names in `architectures`; without that name it is the bare model. Every
weight that the output depends on must be there: a model whose head would be random is refused. Attention is PyTorch's
own ("sdpa", else "eager"), whose operators the frozen route can intercept.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dave_fast.errors import InputError, ModelError, UnknownModelError
from dave_fast.models import from_open_clip, from_timm
from dave_fast.models.hub import loading
from dave_fast.models.huggingface_adapter import Transformers, TransformersTextImage, has_two_towers
from dave_fast.models.huggingface_files import (
    ADAPTER,
    CONFIGURATIONS,
    SEEN_ATTENTION,
    Place,
    build,
    named_class,
    refuse_quantised,
    without_bars,
)
from dave_fast.models.huggingface_peft import PeftFolder, saved_by
from dave_fast.models.limits import check_folder
from dave_fast.models.meaning import link_of_problem
from dave_fast.models.spec import ModelSpec
from dave_fast.models.weights_file import check_fit

# last names of what earlier versions saved besides weights, and of weights that other tasks or training alone use
_UNUSED = (
    "pooler.dense.weight",
    "pooler.dense.bias",
    "mask_token",
    "position_ids",
    "relative_position_index",
    "num_batches_tracked",
    "inv_freq",
)


def load(name: str, spec: ModelSpec) -> nn.Module:
    """Load a model of transformers, timm or open_clip from the hub or from a folder.

    Raises:
        UnknownModelError: there is no such model, or it cannot be fetched.
        InputError: weights, classes or size of the spec do not fit.
        ModelError: the model is not supported.
    """
    place = Place.of(name)
    with loading(spec.name, remote=not place.local):
        if place.local:
            check_folder(place.name)
        adapter = place.read(ADAPTER)
        config = place.read(*CONFIGURATIONS[1:])
    if adapter is not None:
        return _load_adapter(PeftFolder(place, adapter, config is not None), spec)
    if config is None:
        raise UnknownModelError(
            f"{spec.name!r} has neither config.json nor open_clip_config.json, so its architecture is not known. "
            "For a file of weights alone name the architecture, and give the file as its weights (--weights FILE)."
        )
    if "model_cfg" in config:
        return from_open_clip.create(place.scheme, spec, {}, pretrained=None, remote=not place.local)
    if "architecture" in config:
        model: Any = from_timm.create(place.scheme, spec, remote=not place.local)
        model.link = link_of_problem(config.get("problem_type"))
        return model
    return _load(place, spec)


def _load(place: Place, spec: ModelSpec) -> nn.Module:
    """Load a model of transformers."""
    with loading(spec.name, remote=not place.local), without_bars():
        config = place.configuration(**({} if spec.num_classes is None else {"num_labels": spec.num_classes}))
        kind = _class_of(config, place, head=spec.num_classes is not None)
        model, report = build(kind, config, place, spec)
        missing, other = _lacking(model, report)
        # what the class has no place for may be the head of another one
        extra = [key for key in report.get("unexpected_keys", ()) if not key.endswith(_UNUSED)]
        check_fit(spec.weights or place.name, spec.name, missing, extra, other)
        values = place.processor()
    return _adapter(model, values, place, spec.image_size)


def _class_of(config: Any, place: Place, *, head: bool) -> Any:
    """Return the class of transformers that a configuration names, else the bare model.

    Args:
        config: of transformers.
        place: of the configuration.
        head: whether the model has a head of classes, although the class that is named may have none.
    """
    from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, MODEL_MAPPING

    if config.model_type == "siglip2":
        raise ModelError(f"{place.name} takes patches of images of any shape (NaFlex), which is not supported.")
    name = str((config.architectures or [""])[0])
    bare = not name or name.endswith(("Model", "ForMaskedImageModeling", "ForPreTraining"))
    if name and not (head and bare):
        return named_class(name, config, place.name)
    table = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING if head else MODEL_MAPPING
    found = table.get(type(config), None)
    if found is None:
        raise ModelError(f"transformers has no {'classifier' if head else 'model'} for {config.model_type}.")
    return found[0] if isinstance(found, tuple | list) else found


def _lacking(
    model: nn.Module, report: Mapping[str, Any], elsewhere: Collection[str] = ()
) -> tuple[list[str], list[str]]:
    """Return the weights that a model needs and did not get, and those of other shapes.

    Args:
        model: is as it was when this returns.
        report: of `from_pretrained`.
        elsewhere: weights that come from another file.
    """
    missing = [key for key in report.get("missing_keys", ()) if key not in elsewhere]
    other = [each for each in report.get("mismatched_keys", ()) if each[0] not in elsewhere]
    needed = [] if missing and _is_without(model, missing) else missing
    return needed, [f"{key} is {tuple(found)}, expected {tuple(wanted)}" for key, found, wanted in other]


@torch.no_grad()
def _is_without(model: nn.Module, names: Sequence[str]) -> bool:
    """Return whether a model's output does not depend on weights, as on those of a pooler that it does not use."""
    weights = model.state_dict()
    # prompts go through the text tower, which the image's output does not depend on
    if has_two_towers(model) or not all(name in weights and weights[name].is_floating_point() for name in names):
        return False
    kept = {name: weights[name].clone() for name in names}
    adapter = _wrapped(model, None, Place(""), own_head=True)
    before = adapter.tried()
    for name in names:
        weights[name].fill_(torch.nan)
    after = adapter.tried()
    for name in names:
        weights[name].copy_(kept[name])
    return before is not None and after is not None and torch.equal(before, after)


def _load_adapter(folder: PeftFolder, spec: ModelSpec) -> nn.Module:
    """Load the model that an adapter was trained on, with the adapter."""
    if spec.weights is not None or spec.num_classes is not None or spec.random_weights:
        raise InputError(f"{spec.name} is an adapter, with weights and classes of its own: leave out other ones.")
    with loading(spec.name, remote=not folder.place.local):
        weights, base = folder.weights(), folder.base()
    with loading(f"{base.name}, the model of the adapter {spec.name}", remote=not base.local), without_bars():
        model = _base_model(folder, base, weights, spec)
        values = base.processor()
    with loading(spec.name, remote=not folder.place.local):
        model = folder.applied(model, weights)
        values = folder.place.processor() or values
    return _adapter(model, values, base, spec.image_size)


def _base_model(folder: PeftFolder, base: Place, weights: Mapping[str, Tensor], spec: ModelSpec) -> nn.Module:
    """Return the model that an adapter was trained on, whose head may be random where the adapter has its weights."""
    if base.local:
        check_folder(base.name)
    stated = base.read("config.json")
    if base.file(ADAPTER) is not None or stated is None or "architecture" in stated:
        raise ModelError(
            f"the adapter {folder.place.name} was trained on {base.name}, which is no model of transformers that "
            "save_pretrained wrote: load both yourself, and give the module."
        )
    config = (folder.place if folder.has_config else base).configuration()
    width = folder.head_width(weights)
    if width not in (None, config.num_labels):
        # the names are then gone, too
        config.num_labels = width
    kind = folder.named_class(config) or _class_of(config, base, head=width is not None)
    model, report = build(kind, config, base, spec)
    missing, other = _lacking(model, report, saved_by(weights))
    check_fit(base.name, f"the adapter {folder.place.name}", missing, (), other)
    return model


def adapt(model: nn.Module) -> Transformers:
    """Wrap a module of transformers, with the image processor from the place that it was loaded from.

    Raises:
        ModelError: the module takes more than images, is quantised, or has an attention whose operators the frozen
            route cannot intercept.
    """
    config: Any = model.config
    refuse_quantised(config, type(model).__name__)
    used = {getattr(c, "_attn_implementation", None) for c in (config, getattr(config, "vision_config", config))}
    if not used.issubset(SEEN_ATTENTION):
        raise ModelError(
            f"the model's attention is {', '.join(sorted(map(str, used)))}, whose operators cannot be held constant: "
            'load it with attn_implementation="sdpa".'
        )
    place = Place(getattr(config, "name_or_path", "") or "")
    values = place.processor(local_files_only=True) if place.name else None
    return _wrapped(model, values, place, own_head=False)


def _adapter(model: nn.Module, values: Mapping[str, Any] | None, place: Place, image_size: int | None) -> Transformers:
    """Return the adapter of a model that was loaded here, for images of a size."""
    made = _wrapped(model, values, place, own_head=True)
    if image_size is not None:
        made.prepare_for((image_size, image_size))
    return made


def _wrapped(model: nn.Module, values: Mapping[str, Any] | None, place: Place, *, own_head: bool) -> Transformers:
    kind = TransformersTextImage if has_two_towers(model) else Transformers
    return kind(model, values, place.name, place.at, own_head=own_head)
