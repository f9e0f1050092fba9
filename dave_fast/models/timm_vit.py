"""timm's VisionTransformer family, read into the neutral form that plans are made from.

Covered: class-token, average and attention pooling, distilled heads, register tokens, LayerScale, qk-norm,
no class embedding, pre-norm (CLIP), final-norm and fc-norm variants, LayerNorm and RMSNorm, GELU/SiLU/ReLU and
gated MLPs, any patch size, rectangular and dynamic image sizes, any head.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import (
    Attention,
    GluMlp,
    LayerScale,
    Mlp,
    PatchEmbed,
    RmsNorm,
    resample_abs_pos_embed,
)
from timm.layers import LayerNorm as TimmLayerNorm
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

FAMILY = (VisionTransformer, VisionTransformerDistilled)
LAYER_NORMS = (nn.LayerNorm, TimmLayerNorm)
RMS_NORMS = (nn.RMSNorm, RmsNorm)
# nn.GELU's name depends on its `approximate`
ACTIVATIONS = {
    "GELUTanh": "gelu_tanh",
    "SiLU": "silu",
    "Swish": "silu",
    "ReLU": "relu",
    "QuickGELU": "quick_gelu",
    "QuickGELUActivation": "quick_gelu",
}


@dataclass(frozen=True)
class Linear:
    """weight (O, I), bias (O,), float64."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Norm:
    """A LayerNorm (`centres`) or RMSNorm; weight, bias (C,) float64."""

    centres: bool
    weight: Tensor
    bias: Tensor
    eps: float


@dataclass(frozen=True)
class BlockReading:
    """One pre-norm block, LayerScale folded into `proj` and `fc2`."""

    norm1: Norm
    qkv: Linear
    heads: int
    head_dim: int
    scale: float
    q_norm: nn.Module | None
    k_norm: nn.Module | None
    proj: Linear
    norm2: Norm
    fc1: Linear
    activation: str
    fc2: Linear


def why_not(model: nn.Module) -> str | None:
    """Why this model has no plan; None when it has one."""
    if type(model) not in FAMILY:
        return f"{type(model).__name__} is not timm's VisionTransformer or VisionTransformerDistilled"
    hooked = next((name for name, m in model.named_modules() if _is_patched(m)), None)
    if hooked is not None:
        return f"module '{hooked or type(model).__name__}' carries hooks or a replaced forward"
    if type(model.patch_embed) is not PatchEmbed or type(model.patch_embed.norm) is not nn.Identity:
        return f"its patch embedding is a {type(model.patch_embed).__name__} with a norm or another form"
    vit: Any = model
    if vit.patch_embed.dynamic_img_pad:
        return "its patch embedding pads images"
    if type(vit.norm_pre) is not nn.Identity and norm_reason(vit.norm_pre):
        return f"norm_pre: {norm_reason(vit.norm_pre)}"
    if not len(vit.blocks):
        return "it has no blocks"
    for i, block in enumerate(vit.blocks):
        reason = _block_reason(block)
        if reason is not None:
            return f"blocks.{i}: {reason}"
    return None


def _is_patched(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or "forward" in module.__dict__
        or hasattr(module, "parametrizations")
    )


def _block_reason(block: Any) -> str | None:
    if type(block) is not Block:
        return f"a {type(block).__name__}, not a pre-norm Block"
    if type(block.attn) is not Attention:
        return f"its attention is a {type(block.attn).__name__}"
    if block.attn.gate is not None or type(block.attn.norm) is not nn.Identity:
        return "its attention gates or norms its output"
    if type(block.mlp) not in (Mlp, GluMlp) or type(block.mlp.norm) is not nn.Identity:
        return f"its MLP is a {type(block.mlp).__name__} of another form"
    if activation_name(block.mlp.act) is None:
        return f"activation {type(block.mlp.act).__name__} has no frozen gate"
    linears = (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
    odd = next((m for m in linears if type(m) is not nn.Linear), None)
    if odd is not None:
        return f"a {type(odd).__name__} stands where nn.Linear is expected"
    for scale in (block.ls1, block.ls2):
        if type(scale) not in (nn.Identity, LayerScale):
            return f"a {type(scale).__name__} stands where LayerScale is expected"
    return norm_reason(block.norm1) or norm_reason(block.norm2)


def norm_reason(norm: nn.Module) -> str | None:
    """Why a norm cannot be read as numbers; None when it can."""
    if type(norm) in LAYER_NORMS + RMS_NORMS:
        return None if norm.eps is not None else "its RMSNorm's eps depends on the precision"
    return f"norm {type(norm).__name__} is neither LayerNorm nor RMSNorm"


def activation_name(module: nn.Module) -> str | None:
    """The name in `ops.activation`, or None where there is none."""
    if type(module).__name__ == "GELU":
        return "gelu_tanh" if getattr(module, "approximate", "none") == "tanh" else "gelu"
    return ACTIVATIONS.get(type(module).__name__)


def image_size(model: VisionTransformer) -> tuple[int, int]:
    """(H, W) that the model was built for."""
    height, width = model.patch_embed.img_size
    return int(height), int(width)


def grid(model: VisionTransformer, size: tuple[int, int]) -> tuple[int, int] | None:
    """The patch grid for images of `size`; None where the model would refuse them."""
    ph, pw = model.patch_embed.patch_size
    if size != image_size(model) and not model.dynamic_img_size:
        return None
    if size[0] % ph or size[1] % pw:
        return None
    return size[0] // ph, size[1] // pw


def read_embedding(model: VisionTransformer, size: tuple[int, int]) -> tuple[Linear, Tensor, Tensor]:
    """(patch projection, its bias with the positions (n, C), prefix tokens (k, C)), float64."""
    projection = _linear(model.patch_embed.proj)
    names = ("cls_token", "dist_token", "reg_token")
    tokens = [getattr(model, name, None) for name in names]
    width = projection.weight.shape[0]
    prefix = torch.cat([t[0].double() for t in tokens if t is not None] or [torch.zeros(0, width).double()])
    prefix = prefix.to(projection.weight)
    patches = torch.Size(grid(model, size) or (0, 0)).numel()
    position = torch.zeros(patches, width).to(projection.weight)
    if model.pos_embed is not None:
        table = model.pos_embed.detach()
        skipped = 0 if model.no_embed_class else model.num_prefix_tokens
        if model.dynamic_img_size:
            table = resample_abs_pos_embed(
                table,
                new_size=list(grid(model, size) or ()),
                old_size=list(model.patch_embed.grid_size),
                num_prefix_tokens=skipped,
            )
        position = table[0, skipped:].double()
        prefix[:skipped] += table[0, :skipped].double()
    return projection, position + projection.bias, prefix


def read_norm(norm: Any, width: int) -> Norm:
    """A norm's numbers, ones and zeros where it has none."""
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    ones = torch.ones(width, dtype=torch.float64)
    return Norm(
        type(norm) in LAYER_NORMS,
        ones if weight is None else weight.detach().double(),
        torch.zeros_like(ones) if bias is None else bias.detach().double(),
        norm.eps,
    )


def read_blocks(model: VisionTransformer) -> Iterator[BlockReading]:
    """Block after block, so that only one is held in float64 at a time."""
    for block in model.blocks:
        attn, mlp = block.attn, block.mlp
        width = attn.qkv.in_features
        yield BlockReading(
            norm1=read_norm(block.norm1, width),
            qkv=_linear(attn.qkv),
            heads=attn.num_heads,
            head_dim=attn.head_dim,
            scale=attn.scale,
            q_norm=None if type(attn.q_norm) is nn.Identity else attn.q_norm,
            k_norm=None if type(attn.k_norm) is nn.Identity else attn.k_norm,
            proj=_scaled(_linear(attn.proj), block.ls1),
            norm2=read_norm(block.norm2, width),
            fc1=_linear(mlp.fc1),
            activation=_mlp_activation(mlp),
            fc2=_scaled(_linear(mlp.fc2), block.ls2),
        )


def _mlp_activation(mlp: Any) -> str:
    name = activation_name(mlp.act)
    assert name is not None
    if type(mlp) is GluMlp:
        return name + ("_glu_last" if mlp.gate_last else "_glu")
    return name


def _linear(module: nn.Linear | nn.Conv2d) -> Linear:
    weight = module.weight.detach().double().flatten(1)
    bias = torch.zeros_like(weight[:, 0]) if module.bias is None else module.bias.detach().double()
    return Linear(weight, bias)


def _scaled(linear: Linear, scale: Any) -> Linear:
    if type(scale) is nn.Identity:
        return linear
    gamma = scale.gamma.detach().double()
    return Linear(linear.weight * gamma[:, None], linear.bias * gamma)


class Tail(nn.Module):
    """What follows the last block: final norm, pooling, head, as the model's own modules."""

    def __init__(self, model: VisionTransformer, dtype: torch.dtype) -> None:
        super().__init__()
        shell = copy.copy(model)
        # the copy keeps its own table of modules, without the blocks and the embedding
        kept = {k: m for k, m in model._modules.items() if k not in ("blocks", "patch_embed", "norm_pre")}
        shell.__dict__ = model.__dict__ | {
            "_modules": {k: copy.deepcopy(m) for k, m in kept.items()},
            "_parameters": {},
            "_buffers": {},
        }
        self.model: Any = shell.to(dtype).eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """x (R, tokens, C) after the last block -> logits (R, K)."""
        logits: Tensor = self.model.forward_head(self.model.norm(x))
        return logits


def read_tokens(model: VisionTransformer) -> int | None:
    """How many leading tokens the head reads; None for all of them."""
    if type(model) is VisionTransformerDistilled:
        return 2
    return 1 if model.global_pool == "token" else None


def tail_centres(model: VisionTransformer) -> bool:
    """Whether what follows the last block is blind to a token's mean: it starts with a LayerNorm.

    A LayerNorm after an average of tokens is blind to it too; after a maximum it is not.
    """
    if type(model.norm) in LAYER_NORMS:
        return True
    return (
        type(model.norm) is nn.Identity and type(model.fc_norm) in LAYER_NORMS and model.global_pool in ("token", "avg")
    )
