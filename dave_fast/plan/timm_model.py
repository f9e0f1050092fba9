"""The reader of a whole timm transformer: patch embedding, positions and tail; each family adds its blocks.

Models are read as they are in evaluation mode: dropout and stochastic depth are then the identity.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath, PatchDropout, PatchDropoutWithIndices, PatchEmbed, resample_abs_pos_embed
from torch import Tensor, nn

from dave_fast.given.isolation import GLOBAL_HOOKS, HOOKS, isolated
from dave_fast.plan.installed import replaced
from dave_fast.plan.reading import Family, Linear, NoPlanError, Reading, Step
from dave_fast.plan.timm_parts import LAYER_NORMS, read_norm

# modules that are the identity in evaluation mode, and the table of an adapter's, which cannot be called
INERT = (nn.Identity, nn.Dropout, DropPath, PatchDropout, PatchDropoutWithIndices, nn.ModuleDict)
# modules ahead of the tail
BODY = ("blocks", "patch_embed", "norm_pre", "rope", "rel_pos_bias", "shared_rel_pos")

# a block and its index -> its steps
BlockReader = Callable[[Any, int], tuple[Step, ...]]
# a model and its patch grid -> the reader of its blocks
BlockReaderMaker = Callable[[Any, tuple[int, int]], BlockReader]


def timm_family(*classes: type[nn.Module], block_reader: BlockReaderMaker) -> Family:
    """Return the family of these classes of timm's, whose blocks are read by what `block_reader` makes."""
    return Family(classes, partial(_read, block_reader))


def _read(block_reader: BlockReaderMaker, model: Any, size: tuple[int, int] | None) -> Reading:
    _check_modules(model)
    size = size or _image_size(model)
    grid = _patch_grid(model, size)
    projection, position, prefix = _read_embedding(model, grid)
    try:
        patch_norm = read_norm(model.patch_embed.norm)
        norm_pre = read_norm(getattr(model, "norm_pre", nn.Identity()))
    except NoPlanError as reason:
        raise NoPlanError(f"ahead of the blocks: {reason}") from None
    if patch_norm is None:
        projection, position = replace(projection, bias=0 * projection.bias), position + projection.bias.double()
    return Reading(
        image_size=size,
        patch_size=tuple(model.patch_embed.patch_size),
        channels=model.patch_embed.proj.in_channels,
        projection=projection,
        patch_norm=patch_norm,
        position=position,
        prefix=prefix,
        norm_pre=norm_pre,
        blocks=_read_blocks(model, block_reader(model, grid)),
        read=_read_tokens(model),
        tail=partial(Tail, model),
        blind=_is_blind(model),
    )


def _read_blocks(model: Any, read_block: BlockReader) -> tuple[tuple[Step, ...], ...]:
    blocks = []
    for i, block in enumerate(model.blocks):
        try:
            blocks.append(read_block(block, i))
        except NoPlanError as reason:
            raise NoPlanError(f"blocks.{i}: {reason}") from None
    if not blocks:
        raise NoPlanError("it has no blocks")
    return tuple(blocks)


def _check_modules(model: nn.Module) -> None:
    """Raise NoPlanError where code was patched, or where something else stands in the place of a dropout."""
    if any(vars(nn.modules.module).get(name) for name in GLOBAL_HOOKS):
        raise NoPlanError("hooks of all modules are registered (torch.nn.modules.module.register_module_...)")
    for name, module in model.named_modules():
        where = f"module '{name or type(model).__name__}'"
        if any(vars(module).get(hooks) for hooks in HOOKS):
            raise NoPlanError(f"{where} carries hooks")
        if hasattr(module, "parametrizations"):
            raise NoPlanError(f"{where} computes its weights (parametrizations)")
        shadowing = next((key for key in vars(module) if _is_code(getattr(type(module), key, None))), None)
        if shadowing is not None:
            raise NoPlanError(f"{where} has a {shadowing} of its own in place of that of its class")
        if "drop" in name.rpartition(".")[2] and type(module) not in INERT:
            raise NoPlanError(f"a {type(module).__name__} stands at '{name}'")
    for kind in {type(module): None for module in model.modules()}:
        found = replaced(kind)
        if found is not None:
            raise NoPlanError(f"{found} is not the one that was installed")


def _is_code(member: object) -> bool:
    return callable(member) or isinstance(member, property)


def _image_size(model: Any) -> tuple[int, int]:
    height, width = model.patch_embed.img_size
    return int(height), int(width)


def _patch_grid(model: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Return the patch grid (H/p_h, W/p_w); raise NoPlanError where the model would refuse such images."""
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


def _read_embedding(model: Any, grid: tuple[int, int]) -> tuple[Linear, Tensor, Tensor]:
    """Return the patch projection, positions (n, D) and prefix tokens (N − n, D), the latter two in float64."""
    conv = model.patch_embed.proj
    weight = conv.weight.detach().flatten(1)
    bias = torch.zeros_like(weight[:, 0]) if conv.bias is None else conv.bias.detach()
    tokens = [getattr(model, name, None) for name in ("cls_token", "dist_token", "reg_token")]
    found = [t.detach()[0].double() for t in tokens if t is not None]
    prefix = torch.cat(found) if found else weight.new_zeros(0, len(weight)).double()
    position = weight.new_zeros(torch.Size(grid).numel(), len(weight)).double()
    table = getattr(model, "pos_embed", None)
    if table is not None:
        skipped = 0 if getattr(model, "no_embed_class", False) else model.num_prefix_tokens
        table = table.detach()
        if getattr(model, "dynamic_img_size", False):
            table = resample_abs_pos_embed(
                table, new_size=list(grid), old_size=list(model.patch_embed.grid_size), num_prefix_tokens=skipped
            )
        position = table[0, skipped:].double()
        prefix[:skipped] += table[0, :skipped].double()
    return Linear(weight, bias), position, prefix


class Tail(nn.Module):
    """The final norm, pooling and head of a model, as copies of its own modules.

    Args:
        model: the model.
        dtype: of the copies.
        device: of the copies.
    """

    def __init__(self, model: Any, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        shell = copy.copy(model)
        # the shell has its own table of modules, without the blocks and the embedding
        kept = {name: module for name, module in model._modules.items() if name not in BODY}
        shell.__dict__ = model.__dict__ | {"_modules": kept, "_parameters": {}, "_buffers": {}}
        self.model: Any = isolated(shell, dtype, device)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Return the output (R, ...) for the tokens (R, tokens, D) after the last block."""
        output: Tensor = self.model.forward_head(self.model.norm(x))
        return output


def _read_tokens(model: Any) -> int | None:
    """Return how many leading tokens the head reads; None for all of them."""
    if hasattr(model, "dist_token"):
        return 2
    return 1 if model.global_pool == "token" else None


def _is_blind(model: Any) -> bool:
    """Return whether the tail ignores each token's mean: it starts with a LayerNorm.

    A LayerNorm after an average over tokens ignores it too; after a maximum it does not.
    """
    if type(model.norm) in LAYER_NORMS:
        return True
    return (
        type(model.norm) is nn.Identity and type(model.fc_norm) in LAYER_NORMS and model.global_pool in ("token", "avg")
    )
