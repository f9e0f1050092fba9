"""How the tokens of a dense output lie in it and in the image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dave_fast.errors import InputError
from dave_fast.given.wrappers import last_part
from dave_fast.targets.cotangents import Cotangent, PatchCotangent
from dave_fast.targets.forms import ModelView
from dave_fast.targets.outputs import Detections
from dave_fast.targets.places import Place
from dave_fast.transfers import to_device

# the most prefix tokens that are tried where the model does not give their number: two class tokens, eight registers
MOST_PREFIX = 10


@dataclass(frozen=True)
class Grid:
    """The tokens of a dense output, and how they lie in it and in the image.

    Attributes:
        tokens: (B, h·w, D), row by row.
        shape: (h, w).
        size: (H, W) of what they cover, in pixels: of the images, unless these are no whole number of patches.
        prefix: tokens before them in outputs (B, N, D).
        channels_last: whether an output with four dimensions is (B, h, w, D).
    """

    tokens: Tensor
    shape: tuple[int, int]
    size: tuple[int, int]
    prefix: int = 0
    channels_last: bool = False

    @classmethod
    def of(
        cls, output: Tensor, size: tuple[int, int], view: ModelView, prefix: int | None = None, needs: str = ""
    ) -> Grid:
        """Return the tokens of an output.

        Args:
            output: (B, N, D), (B, D, h, w) or (B, h, w, D).
            size: (H, W) of the images.
            view: the model.
            prefix: number of prefix tokens of (B, N, D); None where it is not known.
            needs: what the question needs, for the message.

        Raises:
            InputError: the output is not dense, or its grid is not known.
        """
        # (B, Q, K + 4) of detections would pass for tokens
        detections = isinstance(last_part(view.model), Detections)
        if detections or output.dim() not in (3, 4):
            what = " of detections" if detections else ""
            raise InputError(f"the model's output is {tuple(output.shape)}{what}; {needs}")
        if output.dim() == 3:
            prefix, shape, covered = _layout(output.shape[1], prefix, size, view)
            return cls(output[:, prefix:], shape, covered, prefix)
        last = _channels_last(output, size, view)
        features = output if last else output.permute(0, 2, 3, 1)
        return cls(features.flatten(1, 2), (features.shape[1], features.shape[2]), size, channels_last=last)

    @property
    def cell(self) -> tuple[float, float]:
        """(height, width) of a token in pixels."""
        return self.size[0] / self.shape[0], self.size[1] / self.shape[1]

    def cotangent(self, weights: Tensor, place: Place) -> Cotangent:
        """Return the cotangent of ⟨weights, token⟩ at a place; weights (1, D) or (B, D)."""
        dtype, device = torch.promote_types(self.tokens.dtype, torch.float32), self.tokens.device
        weights = to_device(weights.to(dtype), device)
        return PatchCotangent(weights, place, self.shape, self.cell, self.prefix, self.channels_last)


def _layout(
    tokens: int, wanted: int | None, size: tuple[int, int], view: ModelView
) -> tuple[int, tuple[int, int], tuple[int, int]]:
    """Return the number of prefix tokens, `wanted` where it is known, the grid (h, w), and what it covers (H, W)."""
    patch = _patch_size(view.model)
    if patch is not None:
        # pixels beyond the last whole patch are padded by some models, and left out by others
        more = 1 if getattr(getattr(view.model, "patch_embed", None), "dynamic_img_pad", False) else 0
        height, width = ((side - more) // each + more for side, each in zip(size, patch, strict=True))
        if wanted in (None, tokens - height * width) and 0 <= tokens - height * width <= MOST_PREFIX:
            return tokens - height * width, (height, width), (height * patch[0], width * patch[1])
    # otherwise the smallest number of prefix tokens that leaves a grid of the image's aspect ratio
    for prefix in range(MOST_PREFIX + 1) if wanted is None else [wanted]:
        found = _grid(tokens - prefix, size)
        if found is not None:
            return prefix, found, size
    raise InputError(
        f"the output's {tokens} tokens are no grid of patches of an image of {size[0]}×{size[1]}"
        f"{'' if wanted is None else f' behind {wanted} prefix tokens'}; give prefix=, the number of tokens before "
        "the patches: Patch(..., prefix=1)"
    )


def _patch_size(model: Any) -> tuple[int, int] | None:
    """Return (p_h, p_w) by timm's `patch_embed` or the configuration of transformers; None where neither says it."""
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if patch is None:
        config = getattr(getattr(model, "model", model), "config", None)
        patch = getattr(getattr(config, "vision_config", config), "patch_size", None)
    patch = (patch, patch) if isinstance(patch, int) else patch
    return (int(patch[0]), int(patch[1])) if isinstance(patch, tuple | list) and len(patch) == 2 else None


def _channels_last(output: Tensor, size: tuple[int, int], view: ModelView) -> bool:
    """Return whether outputs are (B, h, w, D) rather than (B, D, h, w), by timm's `output_fmt` or the image's shape."""
    if getattr(view.model, "output_fmt", None) is not None:
        return str(view.model.output_fmt) == "NHWC"
    wanted = size[0] / size[1]
    first, last = (abs(math.log(output.shape[at] / output.shape[at + 1] / wanted)) for at in (2, 1))
    return last < first


def _grid(patches: int, size: tuple[int, int]) -> tuple[int, int] | None:
    """Return (h, w) with h·w patches and the aspect ratio of the image; None if there is no such grid."""
    if patches < 1:
        return None
    height = round((patches * size[0] / size[1]) ** 0.5)
    width = patches // max(1, height)
    fits = height * width == patches and height * size[1] == width * size[0]
    return (height, width) if fits else None
