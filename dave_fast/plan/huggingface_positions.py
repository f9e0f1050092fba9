"""Where the tokens of transformers' ViTs are: tables of positions, rotary embeddings, relative position biases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dave_fast.given.isolation import isolated
from dave_fast.plan.huggingface_parts import expect
from dave_fast.plan.parts import Bias
from dave_fast.plan.reading import NoPlanError, Rotary


def own_size(body: Any) -> tuple[int, int]:
    """Return the size (H, W) of the images that a model was built for."""
    holders: list[Any] = [getattr(body.embeddings, "patch_embeddings", None), body.embeddings, body.config]
    size = next(holder.image_size for holder in holders if hasattr(holder, "image_size"))
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def read_table(embeddings: Any, patches: int, size: tuple[int, int] | None) -> Tensor | None:
    """Return the positions (k + n, D) of the first k tokens and of the patches; None without positions.

    Args:
        embeddings: of a model.
        patches: n, of the images.
        size: (H, W) of images for which the model interpolates its positions; None where it takes them as they are.
    """
    own: Tensor | None = getattr(embeddings, "position_embeddings", None)
    layer = getattr(embeddings, "position_embedding", None)
    if layer is not None:
        if type(layer) is not nn.Embedding or layer.max_norm is not None:
            raise NoPlanError(f"its position embedding is a {type(layer).__name__} of another form")
        own = layer.weight[embeddings.position_ids]
    if own is None or size is None:
        return None if own is None else own[0]
    # the tokens that have positions are those of the table that are no patches of the model's own images
    twin: Any = isolated(embeddings, torch.float64)
    tokens = own.shape[1] - int(getattr(embeddings, "patch_embeddings", embeddings).num_patches)
    like = torch.empty(1, tokens + patches, own.shape[2], dtype=torch.float64, device=own.device)
    with torch.no_grad():
        table: Tensor = twin.interpolate_pos_encoding(like, *size)
    return table[0]


def read_rotary(model: Any, size: tuple[int, int]) -> Rotary:
    """Return the rotation of DINOv3's queries and keys for images (H, W); its own class draws others in training."""
    expect(model.rope_embeddings, model, "DINOv3ViTRopePositionEmbedding")
    rope: Any = isolated(model.rope_embeddings, torch.float64)
    like = torch.empty(1, 1, *size, dtype=torch.float64, device=rope.inv_freq.device)
    with torch.no_grad():
        cos, sin = rope(like)
    return Rotary(sin, cos, half=True, skip=1 + model.embeddings.register_tokens.shape[1])


def read_biases(model: Any, grid: tuple[int, int]) -> Callable[[Any], Bias | None]:
    """Return a function that gives the relative position bias of each of BEiT's blocks: its own, the shared one, both.

    Args:
        model: BEiT's body.
        grid: patches of the images, (rows, columns).
    """
    shared = _read_bias(model.shared_position_bias, model, grid)

    def bias_of(block: Any) -> Bias | None:
        own = _read_bias(block.relative_position_bias, model, grid)
        if own is None or shared is None:
            return own or shared
        return lambda: own() + shared()

    return bias_of


def _read_bias(module: Any, model: Any, grid: tuple[int, int]) -> Bias | None:
    if module is None:
        return None
    expect(module, model, "BeitRelativePositionBias")

    def bias() -> Tensor:
        with torch.no_grad():
            made: Tensor = isolated(module, torch.float64)(grid)[0]
        return made

    return bias
