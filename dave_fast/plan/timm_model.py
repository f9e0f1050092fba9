"""The reader of a whole timm transformer: patch embedding, positions and tail; each family adds its blocks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from timm.layers import PatchEmbed, resample_abs_pos_embed
from torch import Tensor, nn

from dave_fast.plan.parts import class_name, is_layer_norm, read_norm
from dave_fast.plan.reading import Family, NoPlanError, Reading, Step
from dave_fast.plan.whole import Tail, check_size, patch_grid, read_blocks, whole, without

# modules ahead of the tail
BODY = ("blocks", "patch_embed", "norm_pre", "rope", "rel_pos_bias", "shared_rel_pos")

# a block and its index -> its steps
BlockReader = Callable[[Any, int], tuple[Step, ...]]
# a model and its patch grid -> the reader of its blocks
BlockReaderMaker = Callable[[Any, tuple[int, int]], BlockReader]


def timm_family(*classes: type[nn.Module], block_reader: BlockReaderMaker) -> Family:
    """Return the family of these classes of timm's, whose blocks are read by what `block_reader` makes."""
    return Family(tuple(map(class_name, classes)), partial(_read, block_reader))


def _read(block_reader: BlockReaderMaker, model: Any, size: tuple[int, int] | None) -> Reading:
    size = size or _image_size(model)
    grid = _patch_grid(model, size)
    tokens = [getattr(model, name, None) for name in ("cls_token", "dist_token", "reg_token")]
    try:
        patch_norm = read_norm(model.patch_embed.norm)
        norm_pre = read_norm(getattr(model, "norm_pre", nn.Identity()))
    except NoPlanError as reason:
        raise NoPlanError(f"ahead of the blocks: {reason}") from None
    return whole(
        size,
        model.patch_embed.proj,
        [token for token in tokens if token is not None],
        _positions(model, grid),
        read_blocks(model.blocks, "blocks", block_reader(model, grid)),
        tail=partial(Tail, without(model, *BODY), _head),
        read=_read_tokens(model),
        blind=_is_blind(model),
        patch_norm=patch_norm,
        norm_pre=norm_pre,
    )


def _image_size(model: Any) -> tuple[int, int]:
    height, width = model.patch_embed.img_size
    return int(height), int(width)


def _patch_grid(model: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Return the patch grid (H/p_h, W/p_w) of images; raise ImageSizeError where the model would refuse them."""
    embed = model.patch_embed
    if type(embed) is not PatchEmbed:
        raise NoPlanError(f"its patch embedding is a {type(embed).__name__}")
    if embed.dynamic_img_pad:
        raise NoPlanError("its patch embedding pads images")
    if tuple(embed.patch_size) != getattr(embed.proj, "kernel_size", None):
        raise NoPlanError(f"its patch embedding has a {type(embed.proj).__name__} of another form")
    dynamic, (p_h, p_w) = getattr(model, "dynamic_img_size", False), embed.patch_size
    check_size(size, (size[0] // p_h * p_h, size[1] // p_w * p_w) if dynamic else _image_size(model))
    return patch_grid(embed.proj, size)


def _positions(model: Any, grid: tuple[int, int]) -> Tensor | None:
    """Return the positions of the first tokens, where these have any, and of the patches, (…, D)."""
    table: Tensor | None = getattr(model, "pos_embed", None)
    if table is None or not getattr(model, "dynamic_img_size", False):
        return None if table is None else table[0]
    skipped = 0 if getattr(model, "no_embed_class", False) else model.num_prefix_tokens
    old = list(model.patch_embed.grid_size)
    resampled: Tensor = resample_abs_pos_embed(
        table.detach(), new_size=list(grid), old_size=old, num_prefix_tokens=skipped
    )
    return resampled[0]


def _head(shell: Any, x: Tensor) -> Tensor:
    output: Tensor = shell.forward_head(shell.norm(x))
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
    if is_layer_norm(model.norm):
        return True
    return type(model.norm) is nn.Identity and is_layer_norm(model.fc_norm) and model.global_pool in ("token", "avg")
