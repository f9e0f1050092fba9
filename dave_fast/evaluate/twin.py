"""A timm ViT as torchvision's VisionTransformer with the same weights, for packages that support no other.

Supported is what torchvision can express: a class token, square images, a bias on every layer, LayerNorm, GELU, no
qk-norm, no registers. LayerScale becomes part of the linear layer before it; a head on the mean of the patch tokens is
a subclass. Other parts either have parameters that torchvision has no name for, or change the logits, which are
compared.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dave_fast.models.meaning import head_width

# largest difference allowed, as a share of the largest logit, by the model's dtype
LOGITS_AGREE = {torch.float64: 1e-9, torch.float32: 1e-3}
# timm's names -> torchvision's; the first that matches is taken
_NAMES = (
    (r"^cls_token$", "class_token"),
    (r"^pos_embed$", "encoder.pos_embedding"),
    (r"^patch_embed\.proj\.", "conv_proj."),
    (r"^blocks\.(\d+)\.norm1\.", r"encoder.layers.encoder_layer_\1.ln_1."),
    (r"^blocks\.(\d+)\.norm2\.", r"encoder.layers.encoder_layer_\1.ln_2."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.encoder_layer_\1.self_attention.in_proj_"),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.encoder_layer_\1.self_attention.out_proj."),
    (r"^blocks\.(\d+)\.mlp\.fc1\.", r"encoder.layers.encoder_layer_\1.mlp.0."),
    (r"^blocks\.(\d+)\.mlp\.fc2\.", r"encoder.layers.encoder_layer_\1.mlp.3."),
    (r"^norm\.", "encoder.ln."),
    (r"^head\.", "heads.head."),
)


class NotTakenError(Exception):
    """A method does not support a model or this installation; the report shows the message."""


def torchvision_twin(model: nn.Module) -> nn.Module:
    """Return a torchvision VisionTransformer that computes the same function as a timm model.

    It is in evaluation mode, without gradients of its parameters, on the model's device and in its dtype.

    Raises:
        NotTakenError: torchvision is missing or has no such model; the message says what differs.
    """
    from timm.models.vision_transformer import VisionTransformer

    try:
        from torchvision.models import vision_transformer
    except ImportError as error:
        raise NotTakenError(f"torchvision cannot be imported ({error})") from error
    if not isinstance(model, VisionTransformer):
        raise NotTakenError(f"it takes torchvision's ViT or a timm VisionTransformer, not {type(model).__name__}")
    weights = {_renamed(name): value for name, value in _without_layer_scale(model.state_dict()).items()}
    (height, width), (patch, other) = model.patch_embed.img_size, model.patch_embed.patch_size
    if height != width or patch != other:
        raise NotTakenError(f"torchvision's ViT takes square images and patches, not {height}×{width}, {patch}×{other}")
    block: Any = model.blocks[0]
    averaged = getattr(model, "global_pool", "token") == "avg"
    kind = _averaging(vision_transformer.VisionTransformer) if averaged else vision_transformer.VisionTransformer
    made = kind(
        image_size=height,
        patch_size=patch,
        num_layers=len(model.blocks),
        num_heads=block.attn.num_heads,
        hidden_dim=model.embed_dim,
        mlp_dim=block.mlp.fc1.out_features,
        num_classes=head_width(model) or model.num_classes,
        norm_layer=partial(nn.LayerNorm, eps=getattr(block.norm1, "eps", 1e-6)),
    )
    parameter = next(model.parameters())
    made = made.to(parameter)
    try:
        made.load_state_dict(weights)
    except RuntimeError as error:
        raise NotTakenError(f"torchvision's ViT has other parameters: {_first_line(error)}") from error
    made = made.eval().requires_grad_(False)
    _check_logits(model, made, parameter, height)
    return made


def _averaging(base: type[Any]) -> type[Any]:
    """Return a subclass of torchvision's ViT whose head takes the mean of the patch tokens."""

    class Averaging(base):
        def forward(self, x: Tensor) -> Tensor:
            patches = self._process_input(x)
            tokens = self.encoder(torch.cat([self.class_token.expand(len(x), -1, -1), patches], 1))
            return self.heads(tokens[:, 1:].mean(1))

    return Averaging


def _without_layer_scale(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights in which the factors of LayerScale are part of the linear layers before it."""
    scaled = dict(weights)
    for name in weights:
        if found := re.fullmatch(r"(blocks\.\d+\.)ls([12])\.gamma", name):
            layer = found[1] + ("attn.proj" if found[2] == "1" else "mlp.fc2")
            factors = scaled.pop(name)
            scaled[f"{layer}.weight"] = factors[:, None] * weights[f"{layer}.weight"]
            # without a bias torchvision has another parameter than the model
            if f"{layer}.bias" in weights:
                scaled[f"{layer}.bias"] = factors * weights[f"{layer}.bias"]
    return scaled


def _renamed(name: str) -> str:
    for pattern, ours in _NAMES:
        found, count = re.subn(pattern, ours, name)
        if count:
            return found
    raise NotTakenError(f"torchvision's ViT has no {name}")


def _first_line(error: RuntimeError) -> str:
    """Return the last line of torch's message, which names a wrong parameter."""
    return str(error).strip().splitlines()[-1].strip()


@torch.no_grad()
def _check_logits(model: nn.Module, made: nn.Module, parameter: nn.Parameter, size: int) -> None:
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)).to(parameter)
    wanted = model(images)
    apart = (made(images) - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6)
    if not apart <= LOGITS_AGREE.get(parameter.dtype, 0.05):
        raise NotTakenError(
            f"with the same parameters torchvision's ViT gives other logits (apart by {apart:.1%}): "
            "the model computes something that it cannot express"
        )
