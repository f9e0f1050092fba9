"""Checks of images and settings that callers give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dave_fast.errors import InputError
from dave_fast.numbers import check_integer


def check_images(images: Any, dtype: torch.dtype) -> Tensor:
    """Return images as contiguous (B, C, H, W) in `dtype`, on the device where they are.

    Args:
        images: (B, C, H, W) or (C, H, W) of any floating dtype.
        dtype: of the result.

    Raises:
        InputError: images are not a floating tensor of such a shape, or a dimension is empty.
    """
    if not isinstance(images, Tensor) or images.dim() not in (3, 4) or 0 in images.shape:
        raise InputError(f"images must be a tensor (B, C, H, W) or (C, H, W); got {describe(images)}")
    if not images.is_floating_point():
        raise InputError(
            f"images are a tensor of {images.dtype}; expected floating point, normalised as the model expects. Pixels "
            "go in as an array (H, W, 3) of uint8, a path or a PIL image, and are prepared"
        )
    images = images.detach() if images.dim() == 4 else images.detach()[None]
    # autograd cannot save a tensor that was made in inference mode, a copy can be saved
    images = images.clone() if images.is_inference() else images
    return images.to(dtype).contiguous()


def describe(value: Any) -> str:
    """Describe a value by its class, or a tensor by its shape, for messages."""
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def check_targets(targets: Any, images: int) -> tuple[int, int]:
    """Return the smallest and the largest of targets (images, K); raise InputError unless they are such integers."""
    integers = isinstance(targets, Tensor) and not (targets.is_floating_point() or targets.dtype == torch.bool)
    if not integers or targets.dim() != 2 or len(targets) != images or targets.shape[1] < 1:
        raise InputError(f"targets must be integers ({images} images, one or more targets); got {describe(targets)}")
    return int(targets.min()), int(targets.max())


def check_classes(first: int, last: int, output: Tensor) -> None:
    """Raise InputError unless `first` to `last` are classes of a classifier with this output (R, K)."""
    if output.dim() != 2:
        raise InputError(f"the model's output is {tuple(output.shape)}; expected (rows, classes): give a classifier")
    if first < 0 or last >= output.shape[1]:
        raise InputError(
            f"a target is out of range: targets are {first} to {last} and the model has the classes 0 to "
            f"{output.shape[1] - 1}"
        )


def check_rows(rows: int | None) -> int | None:
    """Return internal_batch_size if it is None or an integer ≥ 1; otherwise raise InputError."""
    return None if rows is None else check_integer(rows, "internal_batch_size", 1)


def check_keys(keys: Sequence[int] | None, images: int) -> Sequence[int]:
    """Return one key an image, zeros if `keys` is None; raise InputError unless there are as many as images."""
    if keys is None:
        return [0] * images
    if len(keys) != images:
        raise InputError(f"{len(keys)} image_keys were given for {images} images; give one integer an image")
    return [check_integer(key, "an image key") for key in keys]
