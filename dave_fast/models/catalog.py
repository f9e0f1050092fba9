"""Models by name, and the noise_alpha that the method's authors tuned for them."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import torch
from torch import nn

from dave_fast.errors import InputError, UnknownModelError, missing
from dave_fast.given.wrappers import Normalised, last_part, unwrapped
from dave_fast.models.meaning import require_classifier
from dave_fast.models.spec import LINK_WORDS, ModelSpec, as_spec, class_names
from dave_fast.models.weights_file import load_weights

# The authors' tuned values (github.com/a-vrobell/DAVE, model configurations at ee412e5). A name without a tag
# stands for timm's default weights of that architecture.
NOISE_ALPHA = {
    "deit3_base_patch16_224.fb_in1k": 0.9,
    "deit3_small_patch16_224.fb_in1k": 0.5,
    "deit_base_patch16_224.fb_in1k": 0.7,
    "deit_small_patch16_224.fb_in1k": 0.5,
    "vit_base_patch16_224": 0.3,
    "vit_small_patch16_224": 0.1,
}
# the same weights under another name
_ALSO = {
    "hf:facebook/deit-base-patch16-224": "deit_base_patch16_224.fb_in1k",
    "hf:facebook/deit-small-patch16-224": "deit_small_patch16_224.fb_in1k",
}
# the extra of dave-fast that installs a source's library
_EXTRAS = {"hf": "hf", "open_clip": "openclip"}
_TIMM = ("timm:", "hf:timm/", "hf-hub:timm/")


def load_model(model: str | ModelSpec | nn.Module) -> tuple[nn.Module, str]:
    """Load a model.

    Args:
        model: a name (see `dave_fast.models.spec`), a spec, or a module. A module is returned without its wrappers
            (see `dave_fast.given.wrappers`); those of transformers, open_clip and bcos are wrapped in an adapter.

    Returns:
        The module, in evaluation mode if it was loaded here, and its name.

    Raises:
        UnknownModelError: there is no such model, or its weights cannot be fetched.
        MissingPackageError: its library is an extra, and missing.
        InputError: weights or class names do not fit the model.
    """
    if isinstance(model, nn.Module):
        return _adapted(model), model_name(model)
    if not isinstance(model, str | ModelSpec):
        raise UnknownModelError(
            f"the model is a {type(model).__name__}; expected a name (timm's, 'demo', hf:..., torchvision:..., "
            "open_clip:...), a ModelSpec or an nn.Module"
        )
    spec = as_spec(model)
    source, name = spec.source
    if spec.image_size is not None and source not in ("timm", "hf"):
        raise InputError(f"{spec.name} takes images of its own size: leave image_size out.")
    if spec.num_classes is not None and source in ("demo", "python"):
        raise InputError(f"{spec.name} has classes of its own: leave num_classes out.")
    # random weights are the same each time, and the caller's generator is not advanced
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            loaded = _load(source, name, spec)
        except ModuleNotFoundError as error:
            if source in _EXTRAS:
                raise missing(_EXTRAS[source], repr(spec.name), str(error.name)) from error
            raise UnknownModelError(f"{spec.name!r} needs the package {error.name}, which is missing.") from error
    if spec.labels is not None:
        _name_classes(loaded, spec)
    if spec.link is not None:
        require_classifier(loaded, spec.name)
        said: Any = last_part(loaded)
        said.link = LINK_WORDS[spec.link]
    return loaded.eval(), spec.name


def is_private(model: str | ModelSpec | nn.Module) -> bool:
    """Return whether the module that `load_model` returns has no other owner, so that it may be changed.

    A given module belongs to the caller, and one made by an imported function may be kept there.
    """
    return not isinstance(model, nn.Module) and as_spec(model).source[0] != "python"


def _load(source: str, name: str, spec: ModelSpec) -> nn.Module:
    """Load a model by its source's loader, whose module is imported here since it may import a library."""
    if source == "demo":
        return _demo(spec)
    if source == "python":
        return _python(name, spec)
    library = "huggingface" if source == "hf" else source
    return importlib.import_module(f"dave_fast.models.from_{library}").load(name, spec)


def _demo(spec: ModelSpec) -> nn.Module:
    from dave_fast.models.demo.model import build_model, load_demo_model

    if spec.pretrained:
        return load_demo_model()
    model = build_model()
    if spec.weights is not None:
        load_weights(model, spec.weights, spec.name)
    return model


def _python(name: str, spec: ModelSpec) -> nn.Module:
    """Return the module that an importable function makes."""
    made = load_object(name)()
    if not isinstance(made, nn.Module):
        raise InputError(f"{name} returned a {type(made).__name__}; expected a torch.nn.Module")
    if spec.weights is not None:
        load_weights(made, spec.weights, name)
    return _adapted(made)


def load_object(path: str) -> Any:
    """Import the object that "package.module:name" names, from what is installed or else from the current folder.

    The folder stays on Python's path, behind all others: the object may import more of it later.

    Raises:
        InputError: there is no such object.
    """
    module, _, name = path.partition(":")
    # a console script and a worker's process do not search it by themselves
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)
        importlib.invalidate_caches()
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"{path!r} cannot be loaded: {error}; expected 'package.module:function' of an installed package or of the "
            "current folder, or one of hf:, torchvision:, open_clip: before a name"
        ) from error


def _adapted(model: nn.Module) -> nn.Module:
    """Return the model inside of wrappers; wrap one of a known library in its adapter."""
    model = unwrapped(model)
    if type(model) is Normalised:
        return Normalised(model.normalise, _adapted(model.model))
    for library, kind, module in (
        ("transformers", "PreTrainedModel", "from_huggingface"),
        ("open_clip", "CLIP", "from_open_clip"),
        ("open_clip", "CustomTextCLIP", "from_open_clip"),
        ("bcos", "BcosUtilMixin", "from_bcos"),
    ):
        # a library that has not been imported has made no module
        known = getattr(sys.modules.get(library), kind, None)
        if known is not None and isinstance(model, known):
            return importlib.import_module(f"dave_fast.models.{module}").adapt(model)
    return model


def _name_classes(model: nn.Module, spec: ModelSpec) -> None:
    """Give a loaded model its class names; raise InputError if their number differs."""
    assert spec.labels is not None
    require_classifier(model, spec.name)
    names = class_names(spec.labels)
    count = getattr(model, "num_classes", None)
    if count is not None and count != len(names):
        where = spec.labels if isinstance(spec.labels, str) else "the labels"
        raise InputError(
            f"{where}: {len(names)} class names were given, and {spec.name} has {count} classes; give one name a class."
        )
    known: Any = model
    known.num_classes = len(names)
    known.pretrained_cfg = {**(getattr(model, "pretrained_cfg", None) or {}), "label_names": names}
    known.pretrained_cfg.pop("label_descriptions", None)


def model_name(model: nn.Module) -> str:
    """Return architecture.tag of a timm model, hf:PLACE of one of transformers, otherwise the name of its class.

    The name of a model in wrappers is that of the model.
    """
    model = unwrapped(model)
    model = model.model if type(model) is Normalised else model
    config = getattr(model, "pretrained_cfg", None) or {}
    architecture = config.get("architecture")
    if not architecture:
        place = getattr(model, "name_or_path", None)
        return f"hf:{place}" if isinstance(place, str) and place else type(model).__name__
    tag = config.get("tag")
    return f"{architecture}.{tag}" if tag else str(architecture)


def noise_alpha_for(name: str) -> float | None:
    """Return the noise_alpha that was tuned for a model; None where none was."""
    same = _ALSO.get(name, name)
    for prefix in _TIMM:
        same = same.removeprefix(prefix)
    return NOISE_ALPHA.get(same, NOISE_ALPHA.get(same.partition(".")[0]) if _has_default_tag(same) else None)


def _has_default_tag(name: str) -> bool:
    import timm

    architecture, _, tag = name.partition(".")
    if not tag or not timm.is_model(architecture):
        return False
    config = timm.get_pretrained_cfg(architecture)
    return config is not None and config.tag == tag
