"""What callers give, checked once: images, settings, and results that are not finite."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dave_fast.errors import InputError, NonFiniteError


def check_images(images: Any, dtype: torch.dtype) -> Tensor:
    """images (B, C, H, W), or one (C, H, W), as contiguous (B, C, H, W) in `dtype`, where they are.

    Raises InputError for what is no such tensor of floating point.
    """
    if not isinstance(images, Tensor) or images.dim() not in (3, 4) or 0 in images.shape:
        raise InputError(f"images must be a tensor (B, C, H, W) or (C, H, W); got {describe(images)}")
    if not images.is_floating_point():
        raise InputError(
            f"images are {images.dtype}; expected floating point, normalised as the model expects "
            "(see dave_fast.images.preprocessing)"
        )
    images = images.detach() if images.dim() == 4 else images.detach()[None]
    # a copy where the caller's inference mode made a tensor that autograd may not keep
    images = images.clone() if images.is_inference() else images
    return images.to(dtype).contiguous()


def describe(value: Any) -> str:
    """A value in a few words, for messages."""
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def finite_rows(values: Tensor) -> Tensor:
    """(B,) bool, on the device of `values` (B, ...): whether all of a row is finite."""
    return torch.isfinite(values).reshape(len(values), -1).all(1)


def refuse_rows(finite: Tensor, what: str, advice: str) -> None:
    """NonFiniteError that names the images whose `finite` (B,), on the host, is False."""
    if not finite.all():
        bad = (~finite).nonzero()[:, 0].tolist()
        raise NonFiniteError(f"NaN or infinity in {what} of image {', '.join(map(str, bad))}. {advice}")


def check_classes(targets: Any, images: int, output: Tensor) -> None:
    """InputError unless targets are (B, K) classes of a classifier whose output for some rows is given."""
    if output.dim() != 2:
        raise InputError(f"the model's output is {tuple(output.shape)}; expected (rows, classes)")
    integers = isinstance(targets, Tensor) and not (targets.is_floating_point() or targets.dtype == torch.bool)
    if not integers or targets.dim() != 2 or len(targets) != images or targets.shape[1] < 1:
        raise InputError(f"targets must be integers (B, K), B = {images} images, K ≥ 1; got {describe(targets)}")
    if targets.min() < 0 or targets.max() >= output.shape[1]:
        raise InputError(f"a target is out of range: the model has the classes 0 to {output.shape[1] - 1}")


def check_integer(value: Any, name: str, at_least: int | None = None) -> int:
    """Any kind of integer (also NumPy's) as an int."""
    try:
        integer = operator.index(value)
    except TypeError:
        integer = None
    if integer is None or isinstance(value, bool) or (at_least is not None and integer < at_least):
        raise InputError(f"{name} is {value!r}; expected an integer{'' if at_least is None else f' ≥ {at_least}'}")
    return integer


def check_rows(rows: int | None) -> int | None:
    """internal_batch_size: None, or an integer ≥ 1."""
    return None if rows is None else check_integer(rows, "internal_batch_size", 1)


def check_keys(keys: Sequence[int] | None, images: int) -> Sequence[int]:
    """One integer an image; zeros where none are given."""
    if keys is None:
        return [0] * images
    if len(keys) != images:
        raise InputError(f"{len(keys)} image_keys were given for {images} images; give one integer an image")
    return [check_integer(key, "an image key") for key in keys]
