"""torch.library schemas of the public pixel ops, so that torch.compile and opcheck see them.

`torch.ops.dave_fast.<op>` runs the public op, checks included; its fake form knows shape and dtype alone. The public
ops call it while torch.compile traces them, which makes each one node of the graph. Outside of a trace nothing goes
through it, and engines call the bound functions directly. What a call costs, smooth of 2×2 pixels on a busy two-core
machine, least of 15 repeats: 27 µs bound, 50 µs the public op, 82 µs through the dispatcher.

The ops inside of the walks have none: they take packed weights, which are no tensors, and are called by the engine
alone, which is a graph of its own on a GPU; a traced model meets the pixel ops.

None of them carries a gradient. draws: the six tensors of a Draws, in the order of its fields; g: cotangents of
tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from dave_fast.ops.patches import patch_grid
from dave_fast.sampling import Draws

_PATCHES = "int p_h, int p_w"
SCHEMAS = {
    "perturb": f"(Tensor images, Tensor[] draws, {_PATCHES}, ScalarType dtype, str backend) -> Tensor",
    "pull_back": f"(Tensor g, Tensor images, Tensor[] draws, {_PATCHES}, ScalarType? dtype, str backend) -> Tensor",
    "pull_back_mean": f"(Tensor g, Tensor images, Tensor[] draws, {_PATCHES}, int samples, str backend) -> Tensor",
    "robust_mean": "(Tensor contributions, str backend) -> Tensor",
    "smooth": "(Tensor raw, str backend) -> Tensor",
}


def call(op: str, *arguments: Any) -> Tensor:
    """One node of a traced graph; a Draws among the arguments goes as its tensors."""
    flat = [a.tensors() if isinstance(a, Draws) else a for a in arguments]
    result: Tensor = getattr(torch.ops.dave_fast, op)(*flat)
    return result


def _public(op: str) -> Callable[..., Tensor]:
    function: Callable[..., Tensor] = getattr(import_module(f"dave_fast.ops.{op}"), op)
    return function


def _perturb(images: Tensor, draws: list[Tensor], p_h: int, p_w: int, dtype: torch.dtype, backend: str) -> Tensor:
    return _public("perturb")(images, Draws(*draws), (p_h, p_w), dtype=dtype, backend=backend)


def _perturb_fake(images: Tensor, draws: list[Tensor], p_h: int, p_w: int, dtype: torch.dtype, backend: str) -> Tensor:
    _, channels, height, width = images.shape
    n_y, n_x = patch_grid(height, width, (p_h, p_w))
    return images.new_empty(len(draws[0]), n_y * n_x, channels * p_h * p_w, dtype=dtype)


def _pull_back(
    g: Tensor,
    images: Tensor,
    draws: list[Tensor],
    p_h: int,
    p_w: int,
    dtype: torch.dtype | None,
    backend: str,
) -> Tensor:
    return _public("pull_back")(g, images, Draws(*draws), (p_h, p_w), dtype=dtype, backend=backend)


def _pull_back_fake(
    g: Tensor,
    images: Tensor,
    draws: list[Tensor],
    p_h: int,
    p_w: int,
    dtype: torch.dtype | None,
    backend: str,
) -> Tensor:
    return images.new_empty(len(draws[0]), *images.shape[1:], dtype=dtype or images.dtype)


def _pull_back_mean(
    g: Tensor, images: Tensor, draws: list[Tensor], p_h: int, p_w: int, samples: int, backend: str
) -> Tensor:
    return _public("pull_back_mean")(g, images, Draws(*draws), (p_h, p_w), samples, backend=backend)


def _pull_back_mean_fake(
    g: Tensor, images: Tensor, draws: list[Tensor], p_h: int, p_w: int, samples: int, backend: str
) -> Tensor:
    return images.new_empty(len(draws[0]) // samples, *images.shape[1:])


def _robust_mean(contributions: Tensor, backend: str) -> Tensor:
    return _public("robust_mean")(contributions, backend=backend)


def _robust_mean_fake(contributions: Tensor, backend: str) -> Tensor:
    statistics = torch.float64 if contributions.dtype == torch.float64 else torch.float32
    return contributions.new_empty(contributions.shape[:1] + contributions.shape[2:], dtype=statistics)


def _smooth(raw: Tensor, backend: str) -> Tensor:
    return _public("smooth")(raw, backend=backend)


def _smooth_fake(raw: Tensor, backend: str) -> Tensor:
    return raw.new_empty(raw.shape[:1] + raw.shape[2:])


for _op, _schema in SCHEMAS.items():
    torch.library.define(f"dave_fast::{_op}", _schema)
    torch.library.impl(f"dave_fast::{_op}", "default", globals()[f"_{_op}"])
    torch.library.register_fake(f"dave_fast::{_op}", globals()[f"_{_op}_fake"])
