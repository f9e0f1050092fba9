"""LeGrad and AttnLRP from their packages, torchcam and LXT, on the torchvision twin of a model.

LeGrad: torchcam's, of all blocks (arXiv 2404.03214), a map of patches enlarged bilinearly. It is positive and not
⊙ input, so each channel gets an equal share.

AttnLRP: LXT's rules for torchvision's ViT (GELU and LayerNorm by the identity rule, attention probabilities constant)
and zennit's γ rule on the patch embedding and on linear layers, ⊙ input (arXiv 2402.05602). With `gammas=None`, no γ
rule: that is the frozen gradient ⊙ input, up to GELU at 0. LXT patches classes of torch and zennit for the whole
process; here it patches private subclasses of them, so that other models are not changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dave_fast.evaluate.twin import NotTakenError, torchvision_twin

# of the patch embedding and of linear layers: from the range that LXT's own ViT example searches, not tuned here
GAMMAS = (0.25, 0.05)


def legrad(model: nn.Module, setup: Any) -> Any:
    """Return an Attribute of LeGrad.

    Raises:
        NotTakenError: the package lacks LeGrad, or the model has no torchvision twin.
    """
    try:
        from torchcam.methods import LeGrad
    except ImportError as error:
        raise NotTakenError(f"{_named('torchcam')} has no LeGrad; 0.5 has ({error})") from error
    twin: Any = torchvision_twin(model)
    grid = (twin.image_size // twin.patch_size,) * 2

    def attribute(images: Tensor, classes: Tensor, keys: Sequence[int], seed: int) -> Tensor:
        with torch.enable_grad(), LeGrad(twin, list(twin.encoder.layers), grid_shape=grid) as extractor:
            (found,) = extractor(classes.tolist(), twin(images), normalized=False)
        size = images.shape[-2:]
        enlarged = functional.interpolate(found[:, None], size, mode="bilinear", align_corners=False)
        return (enlarged / images.shape[1]).expand_as(images).contiguous()

    return attribute


def attnlrp(model: nn.Module, setup: Any, gammas: tuple[float, float] | None = GAMMAS) -> Any:
    """Return an Attribute of AttnLRP.

    Args:
        model: in evaluation mode.
        setup: not used.
        gammas: γ of the patch embedding and of linear layers; None for no γ rule.

    Raises:
        NotTakenError: a package cannot be imported, or the model has no torchvision twin.
    """
    twin = lrp_twin(model, gammas)

    def attribute(images: Tensor, classes: Tensor, keys: Sequence[int], seed: int) -> Tensor:
        with torch.enable_grad():
            leaf = images.detach().clone().requires_grad_()
            chosen = twin(leaf).gather(1, classes[:, None]).sum()
            (gradient,) = torch.autograd.grad(chosen, leaf)
        return gradient.detach() * images

    return attribute


def lrp_twin(model: nn.Module, gammas: tuple[float, float] | None) -> Any:
    """Return the torchvision twin whose gradient ⊙ input is AttnLRP's relevance; arguments and errors as `attnlrp`."""
    try:
        from lxt.efficient import monkey_patch
        from lxt.efficient.models.vit_torch import cp_LRP
        from torchvision.models import vision_transformer
    except ImportError as error:
        raise NotTakenError(
            f"{_named('lxt')} cannot be imported ({error}); LXT 2.1 needs transformers 4, and here is "
            f"{_named('transformers')}: see docs/evaluate.md"
        ) from error
    twin = torchvision_twin(model)
    own = {kind: type(kind.__name__, (kind,), {}) for kind in cp_LRP}
    for module in twin.modules():
        module.__class__ = own.get(type(module), type(module))
    monkey_patch(vision_transformer, {own[kind]: rule for kind, rule in cp_LRP.items()})
    if gammas is not None:
        _gamma_rules(gammas).register(twin)
    return twin


def _gamma_rules(gammas: tuple[float, float]) -> Any:
    """Return zennit's composite with LXT's gradient ⊙ input form of the γ rule, on a private subclass."""
    from lxt.efficient import zennit_patches
    from zennit.composites import LayerMapComposite
    from zennit.rules import Gamma

    own = type(Gamma.__name__, (Gamma,), {})
    for name in ("forward", "backward"):
        zennit_patches.patch_method(getattr(zennit_patches, name), own, method_name=name)
    return LayerMapComposite([(nn.Conv2d, own(gammas[0])), (nn.Linear, own(gammas[1]))])


def _named(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"no {package}"
