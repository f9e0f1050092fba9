"""What timm's transformers share: patch embedding, positions, norms, MLPs, tail. Each family adds its blocks.

Readers take exact types and known attributes; anything else raises `NoPlanError` with its name. Models are read as
they are in evaluation mode: dropout and stochastic depth are then the identity.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from timm.layers import (
    DropPath,
    GluMlp,
    LayerScale,
    PatchDropout,
    PatchDropoutWithIndices,
    PatchEmbed,
    RmsNorm,
    SwiGLU,
    resample_abs_pos_embed,
)
from timm.layers import LayerNorm as TimmLayerNorm
from timm.layers import Mlp as TimmMlp
from torch import Tensor, nn

from dave_fast.plan.reading import Family, Linear, Mlp, NoPlanError, Norm, Reading, Step

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
# what does nothing in evaluation mode
INERT = (nn.Identity, nn.Dropout, DropPath, PatchDropout, PatchDropoutWithIndices)
# what comes ahead of the tail
BODY = ("blocks", "patch_embed", "norm_pre", "rope", "rel_pos_bias", "shared_rel_pos")

# a block, its index, the patch grid -> its steps
BlockReader = Callable[[Any, int], tuple[Step, ...]]


def timm_family(*classes: type[nn.Module], block_reader: Callable[[Any, tuple[int, int]], BlockReader]) -> Family:
    """A family of timm's. block_reader: (model, patch grid) -> reader of a block and its index."""
    return Family(classes, partial(_read, block_reader))


def _read(
    block_reader: Callable[[Any, tuple[int, int]], BlockReader], model: Any, size: tuple[int, int] | None
) -> Reading:
    check_whole(model)
    shape = grid(model, size or _image_size(model))
    projection, position, prefix = _read_embedding(model, shape)
    norm_pre = getattr(model, "norm_pre", nn.Identity())
    try:
        patch_norm, normed = read_norm(model.patch_embed.norm), read_norm(norm_pre)
    except NoPlanError as reason:
        raise NoPlanError(f"ahead of the blocks: {reason}") from None
    if patch_norm is None:
        projection, position = replace(projection, bias=0 * projection.bias), position + projection.bias.double()
    read_block = block_reader(model, shape)
    blocks = []
    for i, block in enumerate(model.blocks):
        try:
            blocks.append(read_block(block, i))
        except NoPlanError as reason:
            raise NoPlanError(f"blocks.{i}: {reason}") from None
    if not blocks:
        raise NoPlanError("it has no blocks")
    return Reading(
        image_size=size or _image_size(model),
        patch_size=tuple(model.patch_embed.patch_size),
        channels=model.patch_embed.proj.in_channels,
        projection=projection,
        patch_norm=patch_norm,
        position=position,
        prefix=prefix,
        norm_pre=normed,
        blocks=tuple(blocks),
        read=_read_tokens(model),
        tail=partial(Tail, model),
        blind=_is_blind(model),
    )


def check_whole(model: nn.Module) -> None:
    """NoPlanError where a module of the model was patched, or an inert one replaced."""
    for name, module in model.named_modules():
        if _is_patched(module):
            raise NoPlanError(f"module '{name or type(model).__name__}' carries hooks or a replaced forward")
        if "drop" in name.rpartition(".")[2] and type(module) not in INERT:
            raise NoPlanError(f"a {type(module).__name__} stands at '{name}'")


def _is_patched(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or "forward" in module.__dict__
        or hasattr(module, "parametrizations")
    )


# ---- embedding ----


def _image_size(model: Any) -> tuple[int, int]:
    height, width = model.patch_embed.img_size
    return int(height), int(width)


def grid(model: Any, size: tuple[int, int]) -> tuple[int, int]:
    """The patch grid for images of `size`; NoPlanError where the model would refuse them."""
    embed = model.patch_embed
    if type(embed) is not PatchEmbed:
        raise NoPlanError(f"its patch embedding is a {type(embed).__name__}")
    if embed.dynamic_img_pad:
        raise NoPlanError("its patch embedding pads images")
    conv, patch = embed.proj, tuple(embed.patch_size)
    if type(conv) is not nn.Conv2d or (conv.kernel_size, conv.stride) != (patch, patch):
        raise NoPlanError(f"its patch embedding has a {type(conv).__name__} of another form")
    if (conv.padding, conv.dilation, conv.groups) != ((0, 0), (1, 1), 1):
        raise NoPlanError("its patch embedding pads, dilates or groups")
    dynamic = getattr(model, "dynamic_img_size", False)
    if (size != _image_size(model) and not dynamic) or size[0] % patch[0] or size[1] % patch[1]:
        raise NoPlanError(f"images of {size[0]}×{size[1]} do not fit its patches or its position embedding")
    return size[0] // patch[0], size[1] // patch[1]


def _read_embedding(model: Any, shape: tuple[int, int]) -> tuple[Linear, Tensor, Tensor]:
    """(patch projection, positions (n, C), prefix tokens (k, C)), the latter two in float64."""
    conv = model.patch_embed.proj
    weight = conv.weight.detach().flatten(1)
    bias = torch.zeros_like(weight[:, 0]) if conv.bias is None else conv.bias.detach()
    tokens = [getattr(model, name, None) for name in ("cls_token", "dist_token", "reg_token")]
    found = [t.detach()[0].double() for t in tokens if t is not None]
    prefix = torch.cat(found) if found else weight.new_zeros(0, len(weight)).double()
    position = weight.new_zeros(torch.Size(shape).numel(), len(weight)).double()
    table = getattr(model, "pos_embed", None)
    if table is not None:
        skipped = 0 if getattr(model, "no_embed_class", False) else model.num_prefix_tokens
        table = table.detach()
        if getattr(model, "dynamic_img_size", False):
            table = resample_abs_pos_embed(
                table, new_size=list(shape), old_size=list(model.patch_embed.grid_size), num_prefix_tokens=skipped
            )
        position = table[0, skipped:].double()
        prefix[:skipped] += table[0, :skipped].double()
    return Linear(weight, bias), position, prefix


# ---- parts of blocks ----


def read_norm(norm: Any) -> Norm | None:
    """A norm's numbers, ones and zeros where it has none; None for the identity."""
    if type(norm) is nn.Identity:
        return None
    if type(norm) not in LAYER_NORMS + RMS_NORMS:
        raise NoPlanError(f"norm {type(norm).__name__} is neither LayerNorm nor RMSNorm")
    if norm.eps is None:
        raise NoPlanError("its RMSNorm's eps depends on the precision")
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    ones = torch.ones(norm.normalized_shape)
    return Norm(
        type(norm) in LAYER_NORMS,
        ones if weight is None else weight.detach(),
        torch.zeros_like(ones) if bias is None else bias.detach(),
        norm.eps,
    )


def read_linear(module: Any) -> Linear:
    """A linear layer that is nothing more."""
    if type(module) is not nn.Linear:
        raise NoPlanError(f"a {type(module).__name__} stands where nn.Linear is expected")
    weight = module.weight.detach()
    return Linear(weight, torch.zeros_like(weight[:, 0]) if module.bias is None else module.bias.detach())


def read_packed(attn: Any) -> Linear:
    """A packed projection whose biases of q, k and v may stand beside it: EVA's and BEiT's."""
    packed = read_linear(attn.qkv)
    if getattr(attn, "q_bias", None) is None:
        return packed
    if attn.qkv.bias is not None:
        raise NoPlanError("its qkv projection has two biases")
    return Linear(packed.weight, torch.cat([b.detach() for b in (attn.q_bias, attn.k_bias, attn.v_bias)]))


def split(packed: Linear) -> tuple[Linear, Linear, Linear]:
    """Query, key and value of one packed projection."""
    width = len(packed.bias) // 3
    return packed.rows(0, width), packed.rows(width, 2 * width), packed.rows(2 * width, 3 * width)


def read_gamma(scale: Any) -> Tensor | None:
    """LayerScale's γ, given as its module, its parameter or nothing."""
    if scale is None or type(scale) is nn.Identity:
        return None
    if type(scale) is LayerScale:
        scale = scale.gamma
    if not isinstance(scale, Tensor):
        raise NoPlanError(f"a {type(scale).__name__} stands where LayerScale is expected")
    return scale.detach()


def read_scale(attention: Any, head_dim: int) -> float:
    """What multiplies the scores: PyTorch's fused attention does not ask the module."""
    scale: float = head_dim**-0.5 if attention.fused_attn else attention.scale
    return scale


def read_head_norm(norm: nn.Module) -> Norm | nn.Module | None:
    """A norm of queries or keys: its numbers, or the module itself where it has another form."""
    try:
        return read_norm(norm)
    except NoPlanError:
        return norm


def read_mlp(mlp: Any, norm: Norm | None, gamma: Tensor | None = None, post: Norm | None = None) -> Mlp:
    """timm's Mlp, GluMlp or SwiGLU as a branch behind `norm`."""
    if type(mlp) not in (TimmMlp, GluMlp, SwiGLU):
        raise NoPlanError(f"its MLP is a {type(mlp).__name__}")
    activation = activation_name(mlp.act)
    if type(mlp) is GluMlp:
        activation += "_glu_last" if mlp.gate_last else "_glu"
    elif type(mlp) is SwiGLU:
        activation += "_glu"
    first = (mlp.fc1_g, mlp.fc1_x) if type(mlp) is SwiGLU else (mlp.fc1,)
    fc1 = tuple(read_linear(layer) for layer in first)
    return Mlp(norm, fc1, activation, read_linear(mlp.fc2), read_norm(mlp.norm), gamma, post)


def activation_name(module: nn.Module) -> str:
    """The name in `ops.activation`."""
    name = type(module).__name__
    if name == "GELU":
        return "gelu_tanh" if getattr(module, "approximate", "none") == "tanh" else "gelu"
    if name not in ACTIVATIONS:
        raise NoPlanError(f"activation {name} has no frozen gate")
    return ACTIVATIONS[name]


# ---- tail ----


class Tail(nn.Module):
    """What follows the last block: final norm, pooling, head, as the model's own modules."""

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        super().__init__()
        shell = copy.copy(model)
        # the copy keeps its own table of modules, without the blocks and the embedding
        kept = {k: m for k, m in model._modules.items() if k not in BODY}
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


def _read_tokens(model: Any) -> int | None:
    """How many leading tokens the head reads; None for all of them."""
    if hasattr(model, "dist_token"):
        return 2
    return 1 if model.global_pool == "token" else None


def _is_blind(model: Any) -> bool:
    """Whether what follows the last block is blind to a token's mean: it starts with a LayerNorm.

    A LayerNorm after an average of tokens is blind to it too; after a maximum it is not.
    """
    if type(model.norm) in LAYER_NORMS:
        return True
    return (
        type(model.norm) is nn.Identity and type(model.fc_norm) in LAYER_NORMS and model.global_pool in ("token", "avg")
    )
