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

from dave_fast.errors import InputError
from dave_fast.ops._warp import check_shapes
from dave_fast.ops.precision import check_images, statistics_dtype
from dave_fast.sampling import ROWS, Draws

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


def _draws(tensors: list[Tensor]) -> Draws:
    if len(tensors) != len(ROWS):
        raise InputError(f"draws must be the {len(ROWS)} tensors {', '.join(ROWS)}; got {len(tensors)}")
    return Draws(*tensors)


def _raw_and_variance(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Return the fake form of a mean with its variance."""
    return raw, raw.new_empty(raw.shape[:1] + raw.shape[2:], dtype=torch.float64)


def _run_mean(op: str) -> Callable[..., Any]:
    return lambda g, images, draws, p_h, p_w, samples, backend: _public(op)(
        g, images, _draws(draws), (p_h, p_w), samples, backend=backend
    )


# Both take the arguments of the op's schema; the fake forms check what does not need a value.
_RUNS: dict[str, Callable[..., Any]] = {
    "perturb": lambda images, draws, p_h, p_w, dtype, backend: _public("perturb")(
        images, _draws(draws), (p_h, p_w), dtype=dtype, backend=backend
    ),
    "pull_back": lambda g, images, draws, p_h, p_w, dtype, backend: _public("pull_back")(
        g, images, _draws(draws), (p_h, p_w), dtype=dtype, backend=backend
    ),
    "pull_back_mean": _run_mean("pull_back_mean"),
    "robust_mean": lambda contributions, backend: _public("robust_mean")(contributions, backend=backend),
    "pull_back_mean_variance": _run_mean("pull_back_mean_variance"),
    "robust_mean_variance": lambda contributions, backend: _public("robust_mean_variance")(
        contributions, backend=backend
    ),
    "spread_mean_variance": lambda values, draws, height, width, p_h, p_w, samples, backend: _public(
        "spread_mean_variance"
    )(values, _draws(draws), (height, width), (p_h, p_w), samples, backend=backend),
    "shrink": lambda raw, variance, backend: _public("shrink")(raw, variance, backend=backend),
    "smooth": lambda raw, backend: _public("smooth")(raw, backend=backend),
}


def _fake_perturb(images: Tensor, draws: list[Tensor], p_h: int, p_w: int, dtype: Any, backend: str) -> Tensor:
    return images.new_empty(check_shapes(images, _draws(draws), (p_h, p_w)), dtype=dtype)


def _fake_pull_back(
    g: Tensor, images: Tensor, draws: list[Tensor], p_h: int, p_w: int, dtype: Any, backend: str
) -> Tensor:
    _check("pull_back", "check_shapes", g, images, _draws(draws), (p_h, p_w))
    return images.new_empty(len(draws[0]), *images.shape[1:], dtype=dtype or images.dtype)


def _fake_pull_back_mean(
    g: Tensor, images: Tensor, draws: list[Tensor], p_h: int, p_w: int, samples: int, backend: str
) -> Tensor:
    _check("pull_back", "check_shapes", g, images, _draws(draws), (p_h, p_w))
    _check("pull_back_mean", "check_samples", samples, _draws(draws))
    return images.new_empty(len(draws[0]) // samples, *images.shape[1:])


def _fake_robust_mean(contributions: Tensor, backend: str) -> Tensor:
    _check("robust_mean", "check", contributions)
    shape = contributions.shape[:1] + contributions.shape[2:]
    return contributions.new_empty(shape, dtype=statistics_dtype(contributions.dtype))


def _fake_robust_mean_variance(contributions: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    _check("robust_mean", "check_channels", contributions)
    return _raw_and_variance(_fake_robust_mean(contributions, backend))


def _fake_spread_mean_variance(
    values: Tensor, draws: list[Tensor], height: int, width: int, p_h: int, p_w: int, samples: int, backend: str
) -> tuple[Tensor, Tensor]:
    _check("spread_mean", "check_shapes", values, _draws(draws), (height, width), (p_h, p_w), samples)
    return _raw_and_variance(values.new_empty(len(values) // samples, 1, height, width))


def _fake_shrink(raw: Tensor, variance: Tensor, backend: str) -> Tensor:
    _check("shrink", "check", raw, variance)
    return raw.new_empty(raw[:, :1].shape)


def _fake_smooth(raw: Tensor, backend: str) -> Tensor:
    check_images("raw", raw)
    return raw.new_empty(raw.shape[:1] + raw.shape[2:])


def _check(module: str, function: str, *arguments: Any) -> None:
    getattr(import_module(f"dave_fast.ops.{module}"), function)(*arguments)


_FAKES: dict[str, Callable[..., Any]] = {
    "perturb": _fake_perturb,
    "pull_back": _fake_pull_back,
    "pull_back_mean": _fake_pull_back_mean,
    "pull_back_mean_variance": lambda *given: _raw_and_variance(_fake_pull_back_mean(*given)),
    "robust_mean": _fake_robust_mean,
    "robust_mean_variance": _fake_robust_mean_variance,
    "spread_mean_variance": _fake_spread_mean_variance,
    "shrink": _fake_shrink,
    "smooth": _fake_smooth,
}

for _op, _schema in SCHEMAS.items():
    torch.library.define(f"dave_fast::{_op}", _schema)
    torch.library.impl(f"dave_fast::{_op}", "default", _RUNS[_op])
    torch.library.register_fake(f"dave_fast::{_op}", _FAKES[_op])
