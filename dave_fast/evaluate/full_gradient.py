"""Libra FullGrad+ (Mehri et al., LibraGrad, CVPR 2025, arXiv 2411.16760), on the frozen operators of this package.

LibraGrad's backward pass (its section 3.5) holds attention probabilities, the gates of activations and the denominators
of norms constant: for a plain ViT these are the frozen operators of DAVE (`dave_fast.frozen`), so that
x·∂f/∂x + Σ_b b·∂f/∂b = f(x) (its Definition 1, Corollary 3). FullGrad+ (its section 2.1) adds the input × gradient of
every layer and of every bias:

    FullGrad+(f)(x₀) = Σ_l x_l ⊙ ∂f/∂x_l + Σ_l Σ_{b in layer l} b ⊙ ∂f/∂b

Where the paper leaves a detail open, it is decided here:
- x_l, l = 0 … L−1, are the tokens that enter the L blocks; so x₀ holds the position embedding and the patches' bias.
- A bias is a term at every token that it is added to; the position embedding and prefix tokens are biases, too.
- A term's place is its patch, and its channels are added up; terms of prefix tokens, of a pooling by attention and of
  the head have no place in the image and are left out.
- The map of patches is enlarged bilinearly; its channels get equal shares.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from dave_fast.evaluate.twin import NotTakenError
from dave_fast.frozen.mode import run_frozen


class Terms(NamedTuple):
    """The terms of a decomposition of one logit an image.

    Attributes:
        logits: (B,), what is explained.
        pixels: (B, C, H, W), x ⊙ ∂f/∂x.
        layers: of each block, (B, N, D): the tokens that enter it ⊙ their gradient.
        biases: by name, (B, N, D), (B, 1, D) or (B, K): a bias ⊙ the gradient where it is added.
    """

    logits: Tensor
    pixels: Tensor
    layers: list[Tensor]
    biases: dict[str, Tensor]


def full_gradient(model: nn.Module, images: Tensor, classes: Tensor) -> Terms:
    """Compute the terms of the frozen model; pixels and biases add up to the logits.

    Args:
        model: a timm VisionTransformer in evaluation mode.
        images: (B, C, H, W).
        classes: (B,) int64.
    """
    leaf = images.detach().clone().requires_grad_()
    with torch.enable_grad(), _recorded(model) as (entered, added):
        logits = run_frozen(model, leaf).gather(1, classes[:, None])[:, 0]
        outputs = [output for _, output in added.values()]
        gradients = torch.autograd.grad(logits.sum(), [leaf, *entered, *outputs], allow_unused=True)
    slopes = [
        torch.zeros_like(at) if g is None else g for g, at in zip(gradients[1:], [*entered, *outputs], strict=True)
    ]
    layers = [tokens.detach() * slope for tokens, slope in zip(entered, slopes, strict=False)]
    biases = {
        name: (bias * slope).detach()
        for (name, (bias, _)), slope in zip(added.items(), slopes[len(entered) :], strict=True)
    }
    return Terms(logits.detach(), images * gradients[0], layers, biases)


@contextmanager
def _recorded(model: Any) -> Iterator[tuple[list[Tensor], dict[str, tuple[Tensor, Tensor]]]]:
    """Record the tokens that enter each block, and each bias, as tokens (1, 1, D) or (1, N, D), where it is added."""
    entered: list[Tensor] = []
    added: dict[str, tuple[Tensor, Tensor]] = {}

    def embeds(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        added["embedding"] = _embedding(model, inputs[0]), inputs[0]

    def enters(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        entered.append(inputs[0])

    def adds(name: str) -> Any:
        def keep(module: Any, inputs: Any, output: Tensor) -> None:
            # the query of a pooling is the same for every image
            if output.requires_grad:
                added[name] = module.bias.detach(), output

        return keep

    biased = [
        (name, module)
        for name, module in model.named_modules()
        # the patch embedding's bias is part of the embedding
        if getattr(module, "bias", None) is not None and not name.startswith("patch_embed.")
    ]
    handles = [model.norm_pre.register_forward_pre_hook(embeds)]
    handles += [block.register_forward_pre_hook(enters) for block in model.blocks]
    handles += [module.register_forward_hook(adds(name)) for name, module in biased]
    try:
        yield entered, added
    finally:
        for handle in handles:
            handle.remove()


def _embedding(model: Any, tokens: Tensor) -> Tensor:
    """Return what the embedding adds to the projected pixels, (1, N, D): the tokens of a black image."""
    size = model.patch_embed.img_size
    with torch.no_grad():
        black = tokens.new_zeros(1, model.patch_embed.proj.in_channels, *size)
        return model._pos_embed(model.patch_embed(black))


def libra_fullgrad_plus(model: nn.Module, setup: Any) -> Any:
    """Return an Attribute of Libra FullGrad+.

    Raises:
        NotTakenError: the model is no timm VisionTransformer.
    """
    from timm.models.vision_transformer import VisionTransformer

    if not isinstance(model, VisionTransformer):
        raise NotTakenError(f"it takes a timm VisionTransformer, not {type(model).__name__}")
    prefix, grid = model.num_prefix_tokens, model.patch_embed.grid_size

    def attribute(images: Tensor, classes: Tensor, keys: Sequence[int], seed: int) -> Tensor:
        terms = full_gradient(model, images, classes)
        tokens = terms.layers[0].shape[:2]
        # (B, K) of the head and (B, 1, D) of a pooling have no place
        located = [
            each for each in (*terms.layers, *terms.biases.values()) if each.ndim == 3 and each.shape[:2] == tokens
        ]
        patches = torch.stack([each[:, prefix:].sum(2) for each in located]).sum(0)
        maps = patches.unflatten(1, grid)[:, None]
        enlarged = functional.interpolate(maps, images.shape[-2:], mode="bilinear", align_corners=False)
        return (enlarged / images.shape[1]).expand_as(images).contiguous()

    return attribute
