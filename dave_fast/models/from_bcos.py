"""B-cos models (arXiv 2306.10898) of the `bcos` package: their preprocessing and their own explanation.

A B-cos unit computes |cos(x, w)|^(B−1)·ŵᵀx with ŵ = w/‖w‖. Its dynamic scaling |cos|^(B−1) is the operator to hold
constant, and the general rules of `dave_fast.frozen.rules` do so: |ŵᵀx| is an activation, ‖x‖ an operator, and their
quotient is multiplied by the value ŵᵀx. The rest is linear, as in the models' own explanation mode: the unperturbed
effective gradient ⊙ image is the models' own contribution map (`inherent_contributions`).

Images have six channels (r, g, b, 1−r, 1−g, 1−b), pixels in [0, 1] without normalisation, so that black and white
are equally bright to a unit without bias. Outside of a warped image all six are zero. Noise is added to each of the six
in this unit, so a noise_alpha tuned for normalised pixels, whose range is about four times as wide, is too large.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dave_fast.errors import InputError, ModelError
from dave_fast.images import ADD_INVERSE, describe_preprocessing
from dave_fast.models.adapter import Adapter


class BcosModel(Adapter):
    """A B-cos model as images (B, 6, H, W), pixels and their inverse in [0, 1], -> (B, K) logits."""


def add_inverse(images: Tensor) -> Tensor:
    """Return images (..., 3, H, W) with inverted channels, (..., 6, H, W): r, g, b, 1−r, 1−g, 1−b.

    Raises:
        InputError: the images have another number of channels, or pixels outside of [0, 1].
    """
    if images.dim() < 3 or images.shape[-3] != 3:
        raise InputError(f"images of shape {tuple(images.shape)}; expected three channels (..., 3, H, W)")
    if images.numel() and not (images.min() >= 0 and images.max() <= 1):
        raise InputError(
            f"pixels from {float(images.min()):.3g} to {float(images.max()):.3g}; B-cos models take pixels in "
            "[0, 1]: do not normalise them"
        )
    return torch.cat([images, 1 - images], dim=-3)


def adapt(model: nn.Module) -> BcosModel:
    """Wrap a model of `bcos.models.pretrained`, or one built of its parts, with its preprocessing.

    Raises:
        ModelError: the model is in explanation mode, whose detach() would hide operators from the affine replay.
    """
    if any(getattr(module, "detach", False) is True for module in model.modules()):
        raise ModelError("the B-cos model is in its explanation mode, which is not needed here: leave it first")
    return BcosModel(model, kind="classifier", num_classes=_classes(model), pretrained_cfg=preprocessing_of(model))


def preprocessing_of(model: nn.Module) -> dict[str, Any]:
    """Return the preprocessing that `bcos.models.pretrained` attaches, else of its ImageNet models, by timm's keys."""
    resize, side, interpolation = 256, 224, "bilinear"
    attached = getattr(model, "transform", None)
    if attached is not None:
        # the package's only preset for evaluation begins with Resize and CenterCrop
        resizing, crop = attached.transforms.transforms[:2]
        resize, side, interpolation = resizing.size, crop.size[0], resizing.interpolation.value
    known = describe_preprocessing((side, side), (0, 0, 0), (1, 1, 1), resize=resize, interpolation=interpolation)
    return {**known, "input_size": (6, side, side), ADD_INVERSE: True}


def inherent_contributions(model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """Return the model's own explanation: its dynamic linear weights ⊙ image (arXiv 2306.10898, Eq. 14 and 15).

    Args:
        model: of the `bcos` package, or its adapter; it is put into explanation mode and back.
        images: (B, 6, H, W).
        classes: (B,) int64.

    Returns:
        (B, 6, H, W); the sum over channels is the map.
    """
    own = model.model if isinstance(model, BcosModel) else model
    leaf = images.detach().clone().requires_grad_()
    with torch.inference_mode(False), torch.enable_grad(), own.explanation_mode():  # type: ignore[operator]
        logits = own(leaf).gather(1, classes.view(-1, 1))
        (weights,) = torch.autograd.grad(logits.sum(), leaf)
    return weights * images


def _classes(model: nn.Module) -> int:
    """Return the number of outputs of the last layer with weights."""
    weights = [p for p in model.parameters() if p.dim() >= 2]
    return len(weights[-1]) if weights else 0
