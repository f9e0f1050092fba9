"""From a name to a model, and from a model to the settings that its authors tuned."""

from __future__ import annotations

import difflib
import warnings

from torch import nn

from dave_fast.errors import UnknownModelError

DEFAULT_NOISE_ALPHA = 0.5
# The authors' tuned values (github.com/a-vrobell/DAVE, model configurations at ee412e5). A name without a tag
# stands for timm's default weights of that architecture. The embedded model's is ours.
NOISE_ALPHA = {
    "deit3_base_patch16_224.fb_in1k": 0.9,
    "deit3_small_patch16_224.fb_in1k": 0.5,
    "deit_base_patch16_224.fb_in1k": 0.7,
    "deit_small_patch16_224.fb_in1k": 0.5,
    "vit_base_patch16_224": 0.3,
    "vit_small_patch16_224": 0.1,
    "demo": 0.5,
}


class NoiseAlphaWarning(UserWarning):
    """The model's noise_alpha was never tuned."""


def load_model(model: str | nn.Module) -> tuple[nn.Module, str]:
    """A timm name, "demo" or a module -> the module and its name.

    Raises UnknownModelError where timm has no such model, or its weights cannot be fetched.
    """
    if isinstance(model, nn.Module):
        return model, model_name(model)
    if not isinstance(model, str):
        raise UnknownModelError(
            f"the model is a {type(model).__name__}; expected a timm model name, 'demo' or an nn.Module"
        )
    if model == "demo":
        from dave_fast.demo import load_demo_model

        return load_demo_model(), "demo"
    import timm

    if not timm.is_model(model):
        near = difflib.get_close_matches(model, ["demo", *timm.list_models()], n=3, cutoff=0.6)
        hint = f"did you mean {' or '.join(near)}?" if near else "see timm.list_models()."
        raise UnknownModelError(f"timm has no model {model!r}; {hint} 'demo' is the embedded one.")
    try:
        return timm.create_model(model, pretrained=True).eval(), model
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).rstrip('. ')}"
        raise UnknownModelError(
            f"the weights of {model!r} could not be loaded: {reason}. Check the network and the tag, download them "
            "beforehand, or pass a model that you have built: DAVE(timm.create_model(name, checkpoint_path=...))."
        ) from error


def model_name(model: nn.Module) -> str:
    """architecture.tag as timm writes it, else the class name."""
    config = getattr(model, "pretrained_cfg", None) or {}
    architecture = config.get("architecture")
    if not architecture:
        return type(model).__name__
    tag = config.get("tag")
    return f"{architecture}.{tag}" if tag else str(architecture)


def noise_alpha_for(name: str) -> float:
    """The tuned noise_alpha of a model; where nobody tuned it, the default and a warning."""
    for known in (name, name.partition(".")[0] if _has_default_tag(name) else name):
        if known in NOISE_ALPHA:
            return NOISE_ALPHA[known]
    warnings.warn(
        f"noise_alpha was never tuned for {name!r}; {DEFAULT_NOISE_ALPHA} is used. It changes maps strongly: let "
        "`dave-fast tune` choose it from a few of your own images, or pass noise_alpha=.",
        NoiseAlphaWarning,
        stacklevel=3,
    )
    return DEFAULT_NOISE_ALPHA


def _has_default_tag(name: str) -> bool:
    import timm

    architecture, _, tag = name.partition(".")
    if not tag or not timm.is_model(architecture):
        return False
    config = timm.get_pretrained_cfg(architecture)
    return config is not None and config.tag == tag
