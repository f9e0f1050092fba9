"""The cases of every op, with operands of the shapes in a model.

A case makes random operands, binds a backend's functions to them, and counts arithmetic and bytes. Work that is done
once for an engine, such as packing a weight, or the forward pass before a VJP, belongs to the binding and is not timed.
Bytes are the least that any implementation needs: operands read once, results written once. Further cases of an op set
options that the first does not.

T = R·N tokens · A = heads·head_dim · other letters: `shapes`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dave_fast.bench import pixel_cases
from dave_fast.bench.case import Case, Load, Operands, calling, named, numbers
from dave_fast.bench.shapes import Shapes
from dave_fast.ops.fp8 import TokenScales, coded
from dave_fast.ops.precision import NARROW, statistics_dtype

EPS = 1e-6
# large enough to show in a result whose rows have a variance of 1
LARGE_EPS = 0.1
# factor of the usual 1/√head_dim
OTHER_SCALE = 1.3
# scale of x in e4m3: values up to 14 standard deviations can be represented
X_SCALE = 2.0**-5
# the op that packs the weights of a product
PACKS = {"linear": "pack_weight"} | {f"linear_{narrow}": f"pack_weight_{narrow}" for narrow in NARROW}


def cases_of(op: str, shapes: Shapes) -> list[Case]:
    """Return the cases of one op ("perturb", "linear" ...) at a model's shapes."""
    return CASES[op](shapes)


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
    """Make the case of one product of a block, x (T, inner) Wᵀ with W (outer, inner) and the engine's epilogue."""
    rows = shapes.rows * shapes.tokens
    # in the engine the op before stores x as codes, except for the cotangent that enters the VJP
    codes = op == "linear_fp8" and not gate
    operands = partial(_product_operands, (rows, inner, outer), epilogue, shapes.gated_hidden if gate else 0)

    def bind(load: Load, given: Operands, dtype: torch.dtype) -> Callable[[], Any]:
        linear, pack = load(op), load(PACKS[op])
        weight = pack(given["weight"])
        settings = {key: given[key] for key in epilogue}
        if activation:
            settings["activation"] = shapes.activation
        if gate:
            # the gate as the same backend stores it in the forward walk
            _, settings["gate"] = linear(given["x"], pack(given["first"]), activation=shapes.activation)
        x = coded(given["x"], TokenScales.uniform(X_SCALE)) if codes else given["x"]
        return lambda: linear(x, weight, **settings)

    def reads(given: Operands) -> list[Tensor]:
        read = [given[key] for key in ("x", "weight", *epilogue)]
        if codes:
            read[0] = torch.empty(rows, inner, dtype=torch.uint8, device="meta")
        if gate:
            # the gate is made in `bind`, and some backends store a gate of two bytes in eight bits
            kind = torch.uint8 if given["x"].element_size() == 2 else given["x"].dtype
            read.append(torch.empty(rows, outer, dtype=kind, device="meta"))
        return read

    gigaflops = 2e-9 * rows * inner * outer
    return Case(op, name, operands, bind, reads, gigaflops, product=(rows, inner, outer))


def _product_operands(
    sizes: tuple[int, int, int], epilogue: tuple[str, ...], gated: int, generator: torch.Generator, dtype: torch.dtype
) -> Operands:
    """Draw x, the weight and the epilogue's operands; with `gated` the weight (gated, inner) that makes the gate."""
    rows, inner, outer = sizes
    made = {
        "x": numbers(generator, rows, inner).to(dtype),
        "weight": (numbers(generator, outer, inner) / inner**0.5).to(dtype),
        "bias": numbers(generator, outer).to(dtype),
        "row_scale": (0.5 + numbers(generator, rows).abs()).to(statistics_dtype(dtype)),
        "residual": numbers(generator, rows, outer).to(dtype),
    }
    if gated:
        made["first"] = (numbers(generator, gated, inner) / inner**0.5).to(dtype)
    return {key: value for key, value in made.items() if key in (*epilogue, "x", "weight", "first")}


def _attention(shapes: Shapes, *, vjp: bool = False) -> list[Case]:
    """Return the cases of attention or its VJP at the usual scale and at another."""
    op = "attention_vjp" if vjp else "attention"
    flops = 4e-9 * shapes.rows * shapes.tokens**2 * shapes.heads * shapes.head_dim

    def operands(generator: torch.Generator, dtype: torch.dtype) -> Operands:
        packed = numbers(generator, shapes.rows, shapes.tokens, 3, shapes.heads, shapes.head_dim).to(dtype)
        d_out = numbers(generator, shapes.rows, shapes.tokens, shapes.heads, shapes.head_dim).to(dtype)
        return {"qkv": packed, "d_out": d_out}

    def make(name: str, factor: float) -> Case:
        def bind(load: Load, given: Operands, dtype: torch.dtype) -> Callable[[], Any]:
            forward = load("attention")
            q, k, v = given["qkv"].unbind(2)
            scale = factor * shapes.head_dim**-0.5
            if not vjp:
                return lambda: forward(q, k, v, scale)
            (_, saved), run = forward(q, k, v, scale), load(op)
            return lambda: run(saved, given["d_out"])

        # the VJP computes Pᵀ d_out alone; a form that recomputes P needs as much again
        return Case(op, name, operands, bind, reads, flops / 2 if vjp else flops)

    def reads(given: Operands) -> list[Tensor]:
        # the VJP does not read v
        return [given["qkv"][:, :, :2], given["d_out"]] if vjp else [given["qkv"]]

    return [make(op, 1.0), make("of another scale", OTHER_SCALE)]


def _row_rstd(shapes: Shapes) -> list[Case]:
    def operands(generator: torch.Generator, dtype: torch.dtype) -> Operands:
        return {"x": numbers(generator, shapes.rows * shapes.tokens, shapes.width).to(dtype)}

    def make(name: str, eps: float, *, centred: bool) -> Case:
        bind = calling("row_rstd", lambda run, given, _: run(given["x"], eps, centred=centred))
        return Case("row_rstd", name, operands, bind, named("x"))

    return [make("row_rstd", EPS, centred=True), make("of rows with means", LARGE_EPS, centred=False)]


def _normalize(shapes: Shapes, *, vjp: bool = False) -> list[Case]:
    """Return the cases of a norm: a LayerNorm before the blocks, which centres the stream, and two qk-norms."""
    op = "normalize_vjp" if vjp else "normalize"

    def operands(generator: torch.Generator, dtype: torch.dtype) -> Operands:
        width, rows = shapes.width, shapes.rows * shapes.tokens
        weight, bias = (numbers(generator, width).to(statistics_dtype(dtype)) for _ in range(2))
        rstd = (0.5 + numbers(generator, rows).abs()).to(statistics_dtype(dtype))
        return {"x": numbers(generator, rows, width).to(dtype), "weight": weight, "bias": bias, "rstd": rstd}

    def make(name: str, eps: float, *, centres: bool, centred: bool) -> Case:
        read = ("x", "weight", "rstd" if vjp else "bias")
        more = () if vjp else (eps,)

        def call(run: Callable[..., Any], given: Operands, dtype: torch.dtype) -> Any:
            return run(*(given[key] for key in read), *more, centres=centres, centred=centred)

        return Case(op, name, operands, calling(op, call), named(*read))

    return [
        make(op, EPS, centres=True, centred=True),
        make("LayerNorm", LARGE_EPS, centres=True, centred=False),
        make("RMSNorm", LARGE_EPS, centres=False, centred=False),
    ]


def _assemble(shapes: Shapes) -> list[Case]:
    def operands(generator: torch.Generator, dtype: torch.dtype) -> Operands:
        count = shapes.patches
        sizes = {"patches": (shapes.rows, count), "prefix": (shapes.prefix,), "position": (count,)}
        return {name: numbers(generator, *size, shapes.width).to(dtype) for name, size in sizes.items()}

    reads = named("patches", "prefix", "position")
    return [
        Case("assemble", "assemble", operands, calling("assemble", lambda run, given, _: run(*reads(given))), reads)
    ]


def _rotate(shapes: Shapes) -> list[Case]:
    """Return the case of queries of a packed projection, rotated by angles that all heads share."""

    def operands(generator: torch.Generator, dtype: torch.dtype) -> Operands:
        angles = 3 * numbers(generator, shapes.tokens, 1, shapes.head_dim // 2)
        tables = {"cos": angles.cos(), "sin": angles.sin()}
        packed = numbers(generator, shapes.rows, shapes.tokens, 3, shapes.heads, shapes.head_dim).to(dtype)
        return {"qkv": packed} | {name: table.to(statistics_dtype(dtype)) for name, table in tables.items()}

    def reads(given: Operands) -> list[Tensor]:
        return [given["qkv"][:, :, 0], given["cos"], given["sin"]]

    return [Case("rotate", "rotate", operands, calling("rotate", lambda run, given, _: run(*reads(given))), reads)]


CASES: dict[str, Callable[[Shapes], list[Case]]] = {
    "perturb": pixel_cases.perturb,
    "pull_back": pixel_cases.pull_back,
    "robust_mean": pixel_cases.robust_mean,
    "pull_back_mean": pixel_cases.pull_back_mean,
    "robust_mean_variance": partial(pixel_cases.robust_mean, variance=True),
    "pull_back_mean_variance": partial(pixel_cases.pull_back_mean, variance=True),
    "spread_mean_variance": pixel_cases.spread_mean,
    "shrink": pixel_cases.shrink,
    "smooth": pixel_cases.smooth,
    "linear": _linear,
    **{f"linear_{narrow}": partial(_linear, op=f"linear_{narrow}") for narrow in NARROW},
    "attention": _attention,
    "attention_vjp": partial(_attention, vjp=True),
    "rotate": _rotate,
    "row_rstd": _row_rstd,
    "normalize": _normalize,
    "normalize_vjp": partial(_normalize, vjp=True),
    "assemble": _assemble,
}
