"""Comparison of dave-fast's form of an op with PyTorch's and the library's, in turns, with its rates and its floor.

The floor of a case is the longer of its arithmetic at this machine's own rate of matrix products and its bytes, each
read and written once, at its own rate of copying memory.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.ops import own_form
from benchmarks.gpu.rows import Row, failed, row
from benchmarks.gpu.setting import DEVICE, REHEARSAL, guarded, shapes_here, why_no
from dave_fast.bench import rates
from dave_fast.bench.agreement import check, loader
from dave_fast.bench.case import Case, Operands
from dave_fast.bench.cases import cases_of
from dave_fast.bench.ops import operand_sets
from dave_fast.bench.timing import in_turns

REPEATS, BUDGET = (1, 0.05) if REHEARSAL else (15, 0.15)
# for `operand_sets`: one set of operands if PyTorch takes a twentieth of these seconds for it
SETS_BUDGET = 10.0
SIDE = 256 if REHEARSAL else 8192
SDPA = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
# rows of a micro-batch at each size of the image
SIZES = {224: 56, 448: 14, 672: 7}
PIXEL_OPS = ("perturb", "pull_back", "robust_mean", "pull_back_mean", "smooth")
# name -> function that makes its calls, one for each set of operands
Makers = dict[str, Callable[[], list[Callable[[], Any]]]]


def products(args: argparse.Namespace) -> Iterator[Row]:
    """Yield the eight products of a block at the micro-batches of the arguments, beside cuBLAS without an epilogue."""
    peaks: dict[str, float] = {}
    yield from peak_rows(args.precisions, peaks)
    # a rehearsal's shapes have one row
    for rows in args.micro_batches[: 1 if REHEARSAL else None]:
        for precision in args.precisions:
            if why_no(precision) is not None:
                continue
            op = "linear_fp8" if precision == "fp8" else "linear"
            for case in cases_of(op, shapes_here(rows))[: 2 if REHEARSAL else None]:
                yield from guarded(
                    f"{case.name}, {precision}, {rows} rows", partial(_product, case, rows, precision, peaks)
                )


def attention(args: argparse.Namespace) -> Iterator[Row]:
    """Yield attention and its frozen VJP at 197, 785 and 1,765 tokens, beside scaled_dot_product_attention."""
    peaks: dict[str, float] = {}
    yield from peak_rows(["bf16"], peaks)
    for size, rows in list(SIZES.items())[: 1 if REHEARSAL else None]:
        for op in ("attention", "attention_vjp"):
            case, *_ = cases_of(op, shapes_here(rows, size=size))
            library = partial(_sdpa, gradient=op == "attention_vjp")
            name = f"{op}, {shapes_here(rows, size=size).tokens} tokens, {rows} rows"
            yield from guarded(name, partial(compare, name, case, "bf16", peaks, library))


def pixels(args: argparse.Namespace) -> Iterator[Row]:
    """Yield warps of 50 rows, and medians and smoothing of three images, S = 50."""
    peaks: dict[str, float] = {}
    yield from peak_rows([], peaks)
    for op in PIXEL_OPS:
        (case,) = cases_of(op, shapes_here(1))
        yield from guarded(op, partial(compare, op, case, "fp32", peaks, lambda given: {}))


def peak_rows(precisions: list[str], peaks: dict[str, float]) -> Iterator[Row]:
    """Measure the machine's highest rates into `peaks`, GFLOP/s by precision and GB/s of "copy"; yield their rows."""
    gigabytes, run = rates.copy(DEVICE)
    peaks["copy"] = gigabytes / median(in_turns({"": [run]}, REPEATS, DEVICE, budget=BUDGET)[""])
    yield row("copying memory", "measured", peaks["copy"], "GB/s", "read and written")
    for precision in precisions:
        if why_no(precision) is None:
            call = rates.product(_kind(precision), SIDE, SIDE, SIDE, DEVICE)
            peaks[precision] = 2e-9 * SIDE**3 / median(in_turns({"": [call]}, REPEATS, DEVICE, budget=BUDGET)[""])
            yield row(f"cuBLAS {precision}, {SIDE}³", "measured", peaks[precision] / 1e3, "TFLOP/s")


def _kind(precision: str) -> str:
    """Return the kind of the library's product of a precision; fp32 on the CPU in a rehearsal."""
    return rates.kinds_of("fp32" if REHEARSAL else precision, DEVICE)[0]


def _product(case: Case, rows: int, precision: str, peaks: dict[str, float]) -> Iterator[Row]:
    name = f"{case.name}, {precision}, {rows} rows"

    def bare(sets: list[Operands]) -> Makers:
        (tokens, inner), outer = sets[0]["x"].shape, len(sets[0]["weight"])
        return {"cuBLAS": lambda: [rates.product(_kind(precision), tokens, inner, outer, DEVICE) for _ in sets]}

    yield from compare(name, case, precision, peaks, bare)


def _sdpa(sets: list[Operands], *, gradient: bool) -> Makers:
    """Return SDPA's forward, or forward and gradient of v, since its backward alone cannot be captured as a graph."""

    def call(given: Operands, backend: SDPBackend) -> Callable[[], Any]:
        q, k, v = (part.transpose(1, 2) for part in given["qkv"].unbind(2))
        d_out, leaf = given["d_out"].transpose(1, 2), v.detach().requires_grad_()

        def forward() -> torch.Tensor:
            with sdpa_kernel(backend), torch.no_grad():
                return F.scaled_dot_product_attention(q, k, v)

        def both() -> torch.Tensor:
            with sdpa_kernel(backend):
                return torch.autograd.grad(F.scaled_dot_product_attention(q, k, leaf), leaf, d_out)[0]

        return both if gradient else forward

    more = " forward and gradient" if gradient else ""
    return {f"SDPA {name}{more}": lambda b=each: [call(given, b) for given in sets] for name, each in SDPA.items()}


def _started(makers: Makers) -> tuple[dict[str, list[Callable[[], Any]]], dict[str, str]]:
    """Return the calls of the contestants whose first call runs, and the errors of the others."""
    contestants, refused = {}, {}
    for label, make in makers.items():
        try:
            calls = make()
            calls[0]()
        except Exception as error:
            refused[label] = failed(label, error)["note"]
        else:
            contestants[label] = calls
    return contestants, refused


def compare(
    name: str,
    case: Case,
    precision: str,
    peaks: dict[str, float],
    library: Callable[[list[Operands]], Makers],
) -> Iterator[Row]:
    """Yield the row of one case: dave-fast's form, plain PyTorch's and the library's in turns.

    Args:
        name: of the row.
        case: of `dave_fast.bench.cases`.
        precision: "fp32", "bf16" or "fp8".
        peaks: of `peak_rows`.
        library: operand sets -> further contestants, which compute the same or less.
    """
    dtype = rates.DTYPES[precision]
    backend, reason = own_form(case.op)
    if reason is not None:
        yield row(name, "failed", note=reason)
        return
    sets = operand_sets(case, dtype, DEVICE, int.from_bytes(os.urandom(4), "little"), SETS_BUDGET)
    agreement, results = check(case, loader(backend, DEVICE), sets[0], dtype)
    forms = dict.fromkeys((backend, "torch"))
    makers: Makers = {
        form: lambda f=form: [case.bind(loader(f, DEVICE), given, dtype) for given in sets] for form in forms
    }
    contestants, refused = _started(makers | library(sets))
    if backend not in contestants:
        yield row(name, "failed", note=refused[backend])
        return
    captured: dict[str, bool] = {}
    seconds = in_turns(contestants, REPEATS, DEVICE, budget=BUDGET, captured=captured)
    micro = {label: 1e6 * median(values) for label, values in seconds.items()}
    gigabytes = case.gigabytes(sets[0], results)
    floor = 1e6 * max(case.gigaflops / peaks.get(precision, float("inf")), gigabytes / peaks["copy"])
    own = micro[backend]
    note = f"{1e3 * case.gigaflops / own:.0f} TFLOP/s, " if case.gigaflops else ""
    note += f"{1e6 * gigabytes / own:.0f} GB/s, floor {floor:.3g}"
    note += "".join(f", {label} {value:.4g}" for label, value in micro.items() if label != backend)
    eager = [] if REHEARSAL else [label for label, graph in captured.items() if not graph]
    note += f", not captured: {' and '.join(eager)}" if eager else ""
    note += "".join(f", {label} not: {why}" for label, why in refused.items())
    yield row(
        *(name, "failed" if agreement.reason else "measured", own, "µs", agreement.reason or note),
        **{"µs": micro, "backend": backend, "floor µs": floor, "gigaflops": case.gigaflops, "gigabytes": gigabytes},
        **{"error": agreement.error, "plain error": agreement.plain, "refused": refused},
        captured=captured,
    )
