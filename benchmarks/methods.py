"""The attribution methods of the quality comparison behind one signature, DAVE and its alternatives alike.

Each takes images (B, C, H, W), classes (B,) and an integer an image, and gives signed attributions (B, C, H, W).
Baselines are captum's, with its defaults but for what is said here; the reference input is 0, a normalised image's
mean. All attributions are ⊙ input, so that they differ in the gradient only.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from captum.attr import InputXGradient, IntegratedGradients, NoiseTunnel, Saliency
from torch import Tensor

from dave_fast import DAVE
from dave_fast.demo.model import build_model

Method = Callable[[Tensor, Tensor, list[int]], Tensor]

N_SAMPLES = 50
NOISE_ALPHA = 0.5
# SmoothGrad's usual 15 % of the input's range, which is 2 for images normalised to [-1, 1]
SMOOTHGRAD_SIGMA = 0.3
ROWS_AT_ONCE = 64

DAVE_NAME = "DAVE"
CONTROLS = ("DAVE, untrained model", "|x|", "uniform")


def methods(model: Any, seed: int = 0) -> dict[str, Method]:
    """Name to method, for a timm VisionTransformer; images have the size that it takes."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        untrained = _like(model, build_model()).eval().requires_grad_(False)
    return {
        DAVE_NAME: partial(_dave, DAVE(model, precision="fp32", noise_alpha=NOISE_ALPHA), seed),
        "frozen gradient": partial(_frozen, DAVE(model, precision="fp32", noise_alpha=NOISE_ALPHA)),
        "input × gradient": partial(_input_gradient, model),
        "integrated gradients": partial(_integrated, model),
        "SmoothGrad": partial(_smoothgrad, model, seed),
        CONTROLS[0]: partial(_dave, DAVE(untrained, precision="fp32", noise_alpha=NOISE_ALPHA), seed),
        CONTROLS[1]: lambda images, classes, keys: images.abs(),
        CONTROLS[2]: lambda images, classes, keys: torch.ones_like(images),
    }


def resized(model: Any, size: int) -> Any:
    """A copy of the model for another image size, its position embedding resampled by timm."""
    other = copy.deepcopy(model)
    if other.patch_embed.img_size != (size, size):
        other.set_input_size(img_size=(size, size))
        other.pretrained_cfg = {**other.pretrained_cfg, "input_size": (3, size, size)}
    return other


def _like(model: Any, other: Any) -> Any:
    return resized(other, model.patch_embed.img_size[0])


def _dave(explainer: DAVE, seed: int, images: Tensor, classes: Tensor, keys: list[int]) -> Tensor:
    return explainer.explain(images, classes, N_SAMPLES, seed, image_keys=keys).raw


def _frozen(explainer: DAVE, images: Tensor, classes: Tensor, keys: list[int]) -> Tensor:
    return explainer.effective_gradient(images, classes) * images


def _input_gradient(model: Any, images: Tensor, classes: Tensor, keys: list[int]) -> Tensor:
    return InputXGradient(model).attribute(images.clone().requires_grad_(), target=classes).detach()


def _integrated(model: Any, images: Tensor, classes: Tensor, keys: list[int]) -> Tensor:
    attribution = IntegratedGradients(model).attribute(
        images, target=classes, n_steps=N_SAMPLES, internal_batch_size=max(ROWS_AT_ONCE, len(images))
    )
    return attribution.detach().to(images)


def _smoothgrad(model: Any, seed: int, images: Tensor, classes: Tensor, keys: list[int]) -> Tensor:
    """The mean gradient over noisy copies, ⊙ the clean input; an image's noise depends on its key alone."""
    tunnel = NoiseTunnel(Saliency(model))
    out = torch.empty_like(images)
    for row, key in enumerate(keys):
        with torch.random.fork_rng():
            torch.manual_seed((seed << 32) + key)
            gradient = tunnel.attribute(
                images[row : row + 1].clone().requires_grad_(),
                target=int(classes[row]),
                abs=False,
                nt_samples=N_SAMPLES,
                stdevs=SMOOTHGRAD_SIGMA,
            )
        out[row] = gradient[0].detach() * images[row]
    return out
