"""torch.library schemas of the public pixel ops, for torch.compile and opcheck.

`torch.ops.dave_fast.<op>` runs the public op, checks included; its fake form returns the shape and dtype alone. The
public ops call it while torch.compile traces them, so that each becomes one node of the graph. Outside of a trace the
public ops and the engine call the bound functions directly: smooth of 2×2 pixels takes 9 µs bound, 12 µs as the public
op, 15 µs through the dispatcher (two Zen 5 cores, least of 15 repeats of 2,000 calls).

The ops inside the walks have no schema: they take packed weights, which are not tensors, and only the engine calls
them. No op carries a gradient. In the schemas, draws are the six tensors of a Draws in the order of its fields, and g
the cotangents of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from dave_fast.ops._warp import tokens_shape
from dave_fast.ops.precision import statistics_dtype
from dave_fast.sampling import Draws

_PATCHES = "int p_h, int p_w"
SCHEMAS = {
    "perturb": f"(Tensor images, Tensor[] draws, {_PATCHES}, ScalarType dtype, str backend) -> Tensor",
    "pull_back": f"(Tensor g, Tensor images, Tensor[] draws, {_PATCHES}, ScalarType? dtype, str backend) -> Tensor",
    "pull_back_mean": f"(Tensor g, Tensor images, Tensor[] draws, {_PATCHES}, int samples, str backend) -> Tensor",
    "robust_mean": "(Tensor contributions, str backend) -> Tensor",
    "pull_back_mean_variance": (
        f"(Tensor g, Tensor images, Tensor[] draws, {_PATCHES}, int samples, str backend) -> (Tensor, Tensor)"
    ),
    "robust_mean_variance": "(Tensor contributions, str backend) -> (Tensor, Tensor)",
    "spread_mean_variance": (
        f"(Tensor values, Tensor[] draws, int height, int width, {_PATCHES}, int samples, str backend)"
        " -> (Tensor, Tensor)"
    ),
    "shrink": "(Tensor raw, Tensor variance, str backend) -> Tensor",
    "smooth": "(Tensor raw, str backend) -> Tensor",
}


def call(op: str, *arguments: Any) -> Any:
    """Call an op as one node of a traced graph, with a Draws passed as its tensors."""
    flat = [a.tensors() if isinstance(a, Draws) else a for a in arguments]
    return getattr(torch.ops.dave_fast, op)(*flat)


def _public(op: str) -> Callable[..., Any]:
    module = op.removesuffix("_variance")
    function: Callable[..., Any] = getattr(import_module(f"dave_fast.ops.{module}"), op)
    return function


def _raw_and_variance(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Return the fake form of a mean with its variance."""
    return raw, raw.new_empty(raw.shape[:1] + raw.shape[2:], dtype=torch.float64)


# Both take the arguments of the op's schema.
_RUNS: dict[str, Callable[..., Any]] = {
    "perturb": lambda images, draws, p_h, p_w, dtype, backend: _public("perturb")(
        images, Draws(*draws), (p_h, p_w), dtype=dtype, backend=backend
    ),
    "pull_back": lambda g, images, draws, p_h, p_w, dtype, backend: _public("pull_back")(
        g, images, Draws(*draws), (p_h, p_w), dtype=dtype, backend=backend
    ),
    "pull_back_mean": lambda g, images, draws, p_h, p_w, samples, backend: _public("pull_back_mean")(
        g, images, Draws(*draws), (p_h, p_w), samples, backend=backend
    ),
    "robust_mean": lambda contributions, backend: _public("robust_mean")(contributions, backend=backend),
    "pull_back_mean_variance": lambda g, images, draws, p_h, p_w, samples, backend: _public("pull_back_mean_variance")(
        g, images, Draws(*draws), (p_h, p_w), samples, backend=backend
    ),
    "robust_mean_variance": lambda contributions, backend: _public("robust_mean_variance")(
        contributions, backend=backend
    ),
    "spread_mean_variance": lambda values, draws, height, width, p_h, p_w, samples, backend: _public(
        "spread_mean_variance"
    )(values, Draws(*draws), (height, width), (p_h, p_w), samples, backend=backend),
    "shrink": lambda raw, variance, backend: _public("shrink")(raw, variance, backend=backend),
    "smooth": lambda raw, backend: _public("smooth")(raw, backend=backend),
}
_FAKES: dict[str, Callable[..., Any]] = {
    "perturb": lambda images, draws, p_h, p_w, dtype, backend: images.new_empty(
        tokens_shape(images, Draws(*draws), (p_h, p_w)), dtype=dtype
    ),
    "pull_back": lambda g, images, draws, p_h, p_w, dtype, backend: images.new_empty(
        len(draws[0]), *images.shape[1:], dtype=dtype or images.dtype
    ),
    "pull_back_mean": lambda g, images, draws, p_h, p_w, samples, backend: images.new_empty(
        len(draws[0]) // samples, *images.shape[1:]
    ),
    "robust_mean": lambda contributions, backend: contributions.new_empty(
        contributions.shape[:1] + contributions.shape[2:], dtype=statistics_dtype(contributions.dtype)
    ),
    "spread_mean_variance": lambda values, draws, height, width, p_h, p_w, samples, backend: _raw_and_variance(
        values.new_empty(len(values) // samples, 1, height, width)
    ),
    "shrink": lambda raw, variance, backend: raw.new_empty(raw[:, :1].shape),
    "smooth": lambda raw, backend: raw.new_empty(raw.shape[:1] + raw.shape[2:]),
}
for _op in ("pull_back_mean", "robust_mean"):
    _FAKES[f"{_op}_variance"] = lambda *given, _fake=_FAKES[_op]: _raw_and_variance(_fake(*given))

for _op, _schema in SCHEMAS.items():
    torch.library.define(f"dave_fast::{_op}", _schema)
    torch.library.impl(f"dave_fast::{_op}", "default", _RUNS[_op])
    torch.library.register_fake(f"dave_fast::{_op}", _FAKES[_op])
