"""Every op with the operands that a model gives it: what is timed, and what it is checked against.

A case makes random operands, binds a backend's functions to them (what is done once per engine, such as packing a
weight or the forward pass whose VJP is timed, happens there) and counts arithmetic and bytes: each operand read once
and each result written once, which no implementation can undercut.

T = R·N tokens · A = heads·head_dim · other letters: `shapes`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dave_fast.bench.shapes import Shapes
from dave_fast.ops.pull_back import pull_back_ref
from dave_fast.ops.robust_mean import EPSILON, KEPT_SIGMAS, MAD_TO_SIGMA
from dave_fast.precision import statistics_dtype
from dave_fast.sampling import draw

Operands = dict[str, Any]
Load = Callable[[str], Callable[..., Any]]
EPS = 1e-6
# how a product's weights are laid out
PACKS = {"linear": "pack_weight", "linear_fp8": "pack_weight_fp8"}


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    operands: generator, dtype -> named operands on the generator's device · bind: functions by op, operands, dtype
    -> the call that is timed · reads: operands that the call reads · undecided: operands in float64 -> elements of the
    result that rounding decides, which no two forms need to have in common.
    """

    op: str
    name: str
    operands: Callable[[torch.Generator, torch.dtype], Operands]
    bind: Callable[[Load, Operands, torch.dtype], Callable[[], Any]]
    reads: tuple[str, ...]
    gigaflops: float = 0.0
    undecided: Callable[[Operands], Tensor] | None = None

    def gigabytes(self, operands: Operands, results: tuple[Tensor, ...]) -> float:
        """The least traffic with memory."""
        tensors = [operands[name] for name in self.reads] + list(results)
        return 1e-9 * sum(t.numel() * t.element_size() for t in tensors)


def results_of(returned: Any) -> tuple[Tensor, ...]:
    """The tensors among what an op returned; attention's saved state is its own business."""
    values = returned if isinstance(returned, tuple) else (returned,)
    return tuple(value for value in values if isinstance(value, Tensor))


def widened(operands: Operands) -> Operands:
    """The operands in float64: the same numbers, for the truth."""
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in operands.items()
    }


def cases_of(op: str, shapes: Shapes) -> list[Case]:
    """The cases of one op ("perturb", "linear" ...) at a model's shapes."""
    return CASES[op](shapes)


def _numbers(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, device=generator.device)


# ---- pixel ops ----


def _images(generator: torch.Generator, dtype: torch.dtype, shapes: Shapes) -> Tensor:
    return _numbers(generator, 1, *shapes.image).to(statistics_dtype(dtype))


def _draws(shapes: Shapes) -> Any:
    return draw(shapes.samples, height=shapes.image[1], width=shapes.image[2])


def _perturb(shapes: Shapes) -> list[Case]:
    def operands(generator: torch.Generator, dtype: torch.dtype) -> Operands:
        return {"images": _images(generator, dtype, shapes), "draws": _draws(shapes)}

    def bind(load: Load, given: Operands, dtype: torch.dtype) -> Callable[[], Any]:
        run = load("perturb")
        return lambda: run(given["images"], given["draws"], shapes.patch, dtype=dtype)

    return [Case("perturb", "perturb", operands, bind, ("images",))]


def _pull_back(shapes: Shapes) -> list[Case]:
    def operands(generator: torch.Generator, dtype: torch.dtype) -> Operands:
        channels, _, _ = shapes.image
        length = channels * shapes.patch[0] * shapes.patch[1]
        cotangents = _numbers(generator, shapes.samples, shapes.patches, length).to(dtype)
        return {"images": _images(generator, dtype, shapes), "draws": _draws(shapes), "cotangents": cotangents}

    def bind(load: Load, given: Operands, dtype: torch.dtype) -> Callable[[], Any]:
        run, stored = load("pull_back"), given["images"].dtype
        return lambda: run(given["cotangents"], given["images"], given["draws"], shapes.patch, dtype=stored)

    return [Case("pull_back", "pull_back", operands, bind, ("images", "cotangents"))]


def _pull_back_mean(shapes: Shapes) -> list[Case]:
    (case,) = _pull_back(shapes)

    def bind(load: Load, given: Operands, dtype: torch.dtype) -> Callable[[], Any]:
        run = load("pull_back_mean")
        return lambda: run(given["cotangents"], given["images"], given["draws"], shapes.patch, shapes.samples)

    def undecided(wide: Operands) -> Tensor:
        contributions = pull_back_ref(wide["cotangents"], wide["images"], wide["draws"], shapes.patch)
        # float32 rounds the warp's source positions, in pixels, and neighbouring cotangents have nothing in common
        share = 1e-4 + 5e-6 * max(shapes.image[1:])
        return threshold_is_near(contributions.unflatten(0, (-1, shapes.samples)), share)

    return [replace(case, op="pull_back_mean", name="pull_back_mean", bind=bind, undecided=undecided)]


def threshold_is_near(contributions: Tensor, share: float) -> Tensor:
    """Where a sample is so near the threshold of `robust_mean` that an error decides whether it is kept.

    Args:
        contributions: (B, S, ...) float64.
        share: errors of contributions and threshold, as a share of the largest contribution.

    Returns:
        (B, ...) bool.
    """
    deviations = (contributions - contributions.median(dim=1, keepdim=True).values).abs()
    threshold = KEPT_SIGMAS * (MAD_TO_SIGMA * deviations.median(dim=1, keepdim=True).values + EPSILON)
    near = (deviations - threshold).abs() <= share * contributions.abs().amax(1, keepdim=True)
    return ((deviations > 0) & near).any(1)


def _robust_mean(shapes: Shapes) -> list[Case]:
    def operands(generator: torch.Generator, dtype: torch.dtype) -> Operands:
        values = _numbers(generator, 1, shapes.samples, *shapes.image)
        # a cube has the tails that the mean is there for
        return {"contributions": (values**3).to(statistics_dtype(dtype))}

    def bind(load: Load, given: Operands, dtype: torch.dtype) -> Callable[[], Any]:
        run = load("robust_mean")
        return lambda: run(given["contributions"])

    def undecided(wide: Operands) -> Tensor:
        return threshold_is_near(wide["contributions"], 1e-6)

    return [Case("robust_mean", "robust_mean", operands, bind, ("contributions",), undecided=undecided)]


def _smooth(shapes: Shapes) -> list[Case]:
    def operands(generator: torch.Generator, dtype: torch.dtype) -> Operands:
        return {"raw": 0.05 * _images(generator, dtype, shapes)}

    def bind(load: Load, given: Operands, dtype: torch.dtype) -> Callable[[], Any]:
        run = load("smooth")
        return lambda: run(given["raw"])

    return [Case("smooth", "smooth", operands, bind, ("raw",))]


# ---- the ops of the two walks ----


def _linear(shapes: Shapes, op: str = "linear") -> list[Case]:
    width, hidden, gated = shapes.width, shapes.hidden, shapes.gated_hidden
    inner = shapes.heads * shapes.head_dim
    make = partial(_product, shapes, op)
    return [
        make("qkv", width, 3 * inner, ("bias", "row_scale")),
        make("proj", inner, width, ("bias", "residual")),
        make("fc1", width, gated, ("bias", "row_scale"), activation=True),
        make("fc2", hidden, width, ("bias", "residual")),
        make("fc2 back", width, hidden, ("row_scale",), gate=True),
        make("fc1 back", hidden, width, ("residual",)),
        make("proj back", width, inner, ()),
        make("values back", inner, width, ("row_scale", "residual")),
    ]


def _product(
    shapes: Shapes,
    op: str,
    name: str,
    inner: int,
    outer: int,
    epilogue: tuple[str, ...],
    *,
    activation: bool = False,
    gate: bool = False,
) -> Case:
    """One product of a block: x (T, inner) Wᵀ, with the epilogue that the engine asks for there."""
    rows = shapes.rows * shapes.tokens

    def operands(generator: torch.Generator, dtype: torch.dtype) -> Operands:
        made = {
            "x": _numbers(generator, rows, inner).to(dtype),
            "weight": (_numbers(generator, outer, inner) / inner**0.5).to(dtype),
            "bias": _numbers(generator, outer).to(dtype),
            "row_scale": (0.5 + _numbers(generator, rows).abs()).to(statistics_dtype(dtype)),
            "residual": _numbers(generator, rows, outer).to(dtype),
        }
        if gate:
            made["first"] = (_numbers(generator, shapes.gated_hidden, inner) / inner**0.5).to(dtype)
        return {key: value for key, value in made.items() if key in (*epilogue, "x", "weight", "first")}

    def bind(load: Load, given: Operands, dtype: torch.dtype) -> Callable[[], Any]:
        linear, pack = load(op), load(PACKS[op])
        weight = pack(given["weight"])
        settings = {key: given[key] for key in epilogue}
        if activation:
            settings["activation"] = shapes.activation
        if gate:
            # the gate as the same backend stored it on its way forward
            _, settings["gate"] = linear(given["x"], pack(given["first"]), activation=shapes.activation)
        return lambda: linear(given["x"], weight, **settings)

    return Case(op, name, operands, bind, ("x", "weight", *epilogue), 2e-9 * rows * inner * outer)


def _heads(shapes: Shapes) -> Callable[[torch.Generator, torch.dtype], Operands]:
    def operands(generator: torch.Generator, dtype: torch.dtype) -> Operands:
        packed = _numbers(generator, shapes.rows, shapes.tokens, 3, shapes.heads, shapes.head_dim).to(dtype)
        d_out = _numbers(generator, shapes.rows, shapes.tokens, shapes.heads, shapes.head_dim).to(dtype)
        return {"qkv": packed, "d_out": d_out}

    return operands


def _attention_gigaflops(shapes: Shapes) -> float:
    return 4e-9 * shapes.rows * shapes.tokens**2 * shapes.heads * shapes.head_dim


def _attention(shapes: Shapes) -> list[Case]:
    def bind(load: Load, given: Operands, dtype: torch.dtype) -> Callable[[], Any]:
        forward = load("attention")
        q, k, v = given["qkv"].unbind(2)
        return lambda: forward(q, k, v, shapes.head_dim**-0.5)

    return [Case("attention", "attention", _heads(shapes), bind, ("qkv",), _attention_gigaflops(shapes))]


def _attention_vjp(shapes: Shapes) -> list[Case]:
    def bind(load: Load, given: Operands, dtype: torch.dtype) -> Callable[[], Any]:
        vjp = load("attention_vjp")
        q, k, v = given["qkv"].unbind(2)
        _, saved = load("attention")(q, k, v, shapes.head_dim**-0.5)
        return lambda: vjp(saved, given["d_out"])

    # Pᵀ d_out alone: a form that makes P again does as much once more
    flops = _attention_gigaflops(shapes) / 2
    return [Case("attention_vjp", "attention_vjp", _heads(shapes), bind, ("qkv", "d_out"), flops)]


def _row_rstd(shapes: Shapes) -> list[Case]:
    def operands(generator: torch.Generator, dtype: torch.dtype) -> Operands:
        return {"x": _numbers(generator, shapes.rows * shapes.tokens, shapes.width).to(dtype)}

    def bind(load: Load, given: Operands, dtype: torch.dtype) -> Callable[[], Any]:
        run = load("row_rstd")
        return lambda: run(given["x"], EPS, centred=True)

    return [Case("row_rstd", "row_rstd", operands, bind, ("x",))]


def _normalize(shapes: Shapes, *, vjp: bool = False) -> list[Case]:
    """The norm ahead of the blocks that some models have: a LayerNorm behind which the stream starts, centred."""
    settings = {"centres": True, "centred": True}

    def operands(generator: torch.Generator, dtype: torch.dtype) -> Operands:
        width, rows = shapes.width, shapes.rows * shapes.tokens
        weight, bias = (_numbers(generator, width).to(statistics_dtype(dtype)) for _ in range(2))
        rstd = (0.5 + _numbers(generator, rows).abs()).to(statistics_dtype(dtype))
        return {"x": _numbers(generator, rows, width).to(dtype), "weight": weight, "bias": bias, "rstd": rstd}

    def bind(load: Load, given: Operands, dtype: torch.dtype) -> Callable[[], Any]:
        run = load("normalize_vjp" if vjp else "normalize")
        if vjp:
            return lambda: run(given["x"], given["weight"], given["rstd"], **settings)
        return lambda: run(given["x"], given["weight"], given["bias"], EPS, **settings)

    op = "normalize_vjp" if vjp else "normalize"
    return [Case(op, op, operands, bind, ("x", "weight", "rstd") if vjp else ("x", "weight", "bias"))]


def _assemble(shapes: Shapes) -> list[Case]:
    def operands(generator: torch.Generator, dtype: torch.dtype) -> Operands:
        count = shapes.patches
        sizes = {"patches": (shapes.rows, count), "prefix": (shapes.prefix,), "position": (count,)}
        return {name: _numbers(generator, *size, shapes.width).to(dtype) for name, size in sizes.items()}

    def bind(load: Load, given: Operands, dtype: torch.dtype) -> Callable[[], Any]:
        run = load("assemble")
        return lambda: run(given["patches"], given["prefix"], given["position"])

    return [Case("assemble", "assemble", operands, bind, ("patches", "prefix", "position"))]


def _rotate(shapes: Shapes) -> list[Case]:
    """Queries of a packed projection, turned by angles that all heads share."""

    def operands(generator: torch.Generator, dtype: torch.dtype) -> Operands:
        angles = 3 * _numbers(generator, shapes.tokens, 1, shapes.head_dim // 2)
        tables = {"cos": angles.cos(), "sin": angles.sin()}
        packed = _numbers(generator, shapes.rows, shapes.tokens, 3, shapes.heads, shapes.head_dim).to(dtype)
        return {"qkv": packed} | {name: table.to(statistics_dtype(dtype)) for name, table in tables.items()}

    def bind(load: Load, given: Operands, dtype: torch.dtype) -> Callable[[], Any]:
        run = load("rotate")
        return lambda: run(given["qkv"][:, :, 0], given["cos"], given["sin"])

    return [Case("rotate", "rotate", operands, bind, ("qkv", "cos", "sin"))]


CASES: dict[str, Callable[[Shapes], list[Case]]] = {
    "perturb": _perturb,
    "pull_back": _pull_back,
    "robust_mean": _robust_mean,
    "pull_back_mean": _pull_back_mean,
    "smooth": _smooth,
    "linear": _linear,
    "linear_fp8": partial(_linear, op="linear_fp8"),
    "attention": _attention,
    "attention_vjp": _attention_vjp,
    "rotate": _rotate,
    "row_rstd": _row_rstd,
    "normalize": _normalize,
    "normalize_vjp": partial(_normalize, vjp=True),
    "assemble": _assemble,
}
