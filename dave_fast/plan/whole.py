"""The reading of a whole model from its parts, whatever its library: patch embedding, positions, blocks, tail."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dave_fast.given.isolation import isolated
from dave_fast.plan.reading import ImageSizeError, Linear, NoPlanError, Norm, Reading, Step

# what is left of a model, and the tokens (R, read, D) after its last block -> the output (R, ...)
Head = Callable[[Any, Tensor], Tensor]


class Tail(nn.Module):
    """What follows a model's last block, as copies of its own modules.

    Args:
        shell: the model without embedding and blocks, or a module that holds what is left of it.
        head: makes the output of the shell and the tokens.
        dtype: of the copies.
        device: of the copies.
    """

    def __init__(self, shell: nn.Module, head: Head, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.model: Any = isolated(shell, dtype, device)
        self.head = head
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Return the output (R, ...) for the tokens (R, tokens, D) after the last block."""
        return self.head(self.model, x)


def shell_of(**parts: Any) -> nn.Module:
    """Return a module that holds these modules, parameters and settings by name."""
    shell = nn.Module()
    for name, part in parts.items():
        setattr(shell, name, part)
    return shell


def without(module: Any, *names: str, keep: Sequence[str] = ()) -> Any:
    """Return a shallow copy of a module without children of these names, and without parameters but those to keep."""
    shell = copy.copy(module)
    children = {name: child for name, child in module._modules.items() if name not in names}
    parameters = {name: module._parameters[name] for name in keep}
    shell.__dict__ = module.__dict__ | {"_modules": children, "_parameters": parameters, "_buffers": {}}
    return shell


def patch_grid(conv: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Return the patch grid (H/p_h, W/p_w) of images; raise NoPlanError where a convolution makes no whole patches."""
    patch = getattr(conv, "kernel_size", None)
    if type(conv) is not nn.Conv2d or conv.stride != patch:
        raise NoPlanError(f"its patch embedding has a {type(conv).__name__} of another form")
    if (conv.padding, conv.dilation, conv.groups) not in (((0, 0), (1, 1), 1), ("valid", (1, 1), 1)):
        raise NoPlanError("its patch embedding pads, dilates or groups")
    if size[0] % patch[0] or size[1] % patch[1]:
        raise NoPlanError(f"images of {size[0]}×{size[1]} are no whole number of its patches")
    return size[0] // patch[0], size[1] // patch[1]


def check_size(size: tuple[int, int], own: tuple[int, int]) -> None:
    """Raise ImageSizeError for images (H, W) of another size than the only one that a model takes."""
    if size != own:
        raise ImageSizeError(f"images of {size[0]}×{size[1]} do not fit its patches or its position embedding")


def read_blocks(
    blocks: nn.Module, path: str, read_block: Callable[[Any, int], tuple[Step, ...]]
) -> dict[str, tuple[Step, ...]]:
    """Return the steps of each block by the path of its module.

    Args:
        blocks: a list of modules.
        path: of that list in the model.
        read_block: (block, index) -> its steps.
    """
    found = {}
    for index, (name, block) in enumerate(blocks.named_children()):
        try:
            found[f"{path}.{name}"] = read_block(block, index)
        except NoPlanError as reason:
            raise NoPlanError(f"{path}.{name}: {reason}") from None
    if not found:
        raise NoPlanError("it has no blocks")
    return found


def whole(
    size: tuple[int, int],
    conv: nn.Conv2d,
    tokens: Sequence[Tensor],
    table: Tensor | None,
    blocks: dict[str, tuple[Step, ...]],
    *,
    tail: Callable[[torch.dtype, torch.device], nn.Module],
    read: int | None,
    blind: bool,
    patch_norm: Norm | None = None,
    norm_pre: Norm | None = None,
) -> Reading:
    """Return the reading of a model of these parts.

    Args:
        size: (H, W) of the images in pixels.
        conv: of the patches (see `patch_grid`).
        tokens: class, distillation and register tokens in their order, (…, D) each.
        table: positions (k + n, D) of the first k of these tokens and of the patches; None without positions.
        blocks: see `read_blocks`.
        tail: as that of a reading; so are the following.
        read: leading tokens that the tail reads; None for all.
        blind: whether the tail ignores each token's mean.
        patch_norm: of the patches alone.
        norm_pre: of all tokens, ahead of the blocks.
    """
    weight = conv.weight.detach().flatten(1)
    bias = torch.zeros_like(weight[:, 0]) if conv.bias is None else conv.bias.detach()
    width, patches = len(weight), torch.Size(patch_grid(conv, size)).numel()
    prefix = torch.cat([weight.new_zeros(0, width).double(), *(t.detach().reshape(-1, width).double() for t in tokens)])
    position = weight.new_zeros(patches, width).double()
    if table is not None:
        first = len(table) - patches
        if not 0 <= first <= len(prefix):
            raise NoPlanError(f"it has {len(table)} positions for {len(prefix)} tokens and {patches} patches")
        position = table[first:].detach().double()
        prefix[:first] += table[:first].detach().double()
    if patch_norm is None:
        position, bias = position + bias.double(), torch.zeros_like(bias)
    return Reading(
        image_size=size,
        patch_size=(conv.kernel_size[0], conv.kernel_size[1]),
        channels=conv.in_channels,
        projection=Linear(weight, bias),
        patch_norm=patch_norm,
        position=position,
        prefix=prefix,
        norm_pre=norm_pre,
        blocks=tuple(blocks.values()),
        paths=tuple(blocks),
        read=read,
        tail=tail,
        blind=blind,
    )
