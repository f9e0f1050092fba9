"""The machine's highest rates: matrix products at a model's shapes, and copying memory.

The ceiling of a precision is the best of all libraries' plain products there, ours too: a bias and no other epilogue.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dave_fast.ops import _ext, _registry
from dave_fast.ops.linear import OPERANDS, linear_native, linear_onednn, pack_onednn, pack_panels
from dave_fast.ops.precision import DTYPES as ENGINE_DTYPES

DTYPES = ENGINE_DTYPES | {"tf32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class Ceiling:
    """Matrix products of a block.

    Attributes:
        gigaflops: their arithmetic.
        run: computes them.
    """

    gigaflops: float
    run: Callable[[], None]


def kinds_of(precision: str, device: str) -> tuple[str, ...]:
    """Return the kinds of products of a precision on a device, LIBRARY-PRECISION, whose best is the ceiling.

    "mkl" and "cublas" are F.linear; "packed" is oneDNN with weights packed, and for int8 numbers quantised, beforehand;
    "native" is our own product.
    """
    if device == "cuda":
        return (f"cublas-{precision}",)
    if precision == "fp8":
        # CPUs have no products in e4m3, and the reference multiplies in float32
        precision = "fp32"
    packs = {
        "fp32": True,
        "bf16": torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        "int8": "onednn" in torch.backends.quantized.supported_engines,
    }
    has = {
        "mkl": precision != "int8",
        "packed": packs.get(precision, False) and _registry.why_not("linear", "onednn", "cpu") is None,
        "native": precision in OPERANDS and _ext.unavailable() is None,
    }
    return tuple(f"{library}-{precision}" for library, there in has.items() if there)


def fastest(rates: Mapping[str, Sequence[float]]) -> str:
    """Return the name of the highest median."""
    return max(rates, key=lambda name: statistics.median(rates[name]))


def ceiling(
    kind: str, rows: int, width: int, hidden: int, *, at_least: float = 60.0, device: torch.device | str = "cpu"
) -> Ceiling:
    """Return the four products of a block (qkv, proj, fc1, fc2), repeated to about `at_least` GFLOP.

    Args:
        kind: see `kind_of`.
        rows: number of tokens.
        width: D.
        hidden: M.
        at_least: arithmetic in GFLOP.
        device: to run on.
    """
    shapes = ((width, 3 * width), (width, width), (width, hidden), (hidden, width))
    calls = [product(kind, rows, inner, outer, device) for inner, outer in shapes]
    gigaflops = 2e-9 * rows * sum(inner * outer for inner, outer in shapes)
    times = max(1, round(at_least / gigaflops))

    def run() -> None:
        for _ in range(times):
            for call in calls:
                call()

    return Ceiling(gigaflops * times, run)


def product(kind: str, rows: int, inner: int, outer: int, device: torch.device | str = "cpu") -> Callable[[], Tensor]:
    """Return a call that computes one product (rows, inner) × (inner, outer) with a bias, of random numbers."""
    library, precision = kind.split("-")
    dtype = DTYPES[precision]
    x = torch.randn(rows, inner, device=device).to(dtype)
    weight, bias = torch.randn(outer, inner, device=device).to(dtype), torch.randn(outer, device=device).to(dtype)
    if library == "native":
        panels = pack_panels(weight, precision)
        return lambda: linear_native(x, panels, bias)
    if precision == "int8":
        return _bytes(x, weight, bias)
    if library == "packed":
        packed = pack_onednn(weight)
        return lambda: linear_onednn(x, packed, bias)
    if precision == "fp8":
        return _eight_bits(x, weight, bias)
    if precision in ("tf32", "fp32") and torch.device(device).type == "cuda":

        def run() -> Tensor:
            with tf32(precision == "tf32"):
                return F.linear(x, weight, bias)

        return run
    return lambda: F.linear(x, weight, bias)


def _eight_bits(x: Tensor, weight: Tensor, bias: Tensor) -> Callable[[], Tensor]:
    """Return a product by `torch._scaled_mm` of e4m3 operands with a scale for each row, in bfloat16."""
    a, b = x.to(torch.float8_e4m3fn), weight.to(torch.float8_e4m3fn).T
    scale_a, scale_b = (torch.ones(size, device=x.device) for size in ((len(x), 1), (1, len(weight))))
    return lambda: torch._scaled_mm(
        a, b, scale_a=scale_a, scale_b=scale_b, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def _bytes(x: Tensor, weight: Tensor, bias: Tensor) -> Callable[[], Tensor]:
    """Return a product by oneDNN of numbers that are quantised beforehand, into bfloat16.

    Numbers of x are u8 with a zero point: with signed ones oneDNN takes hundreds of times as long.
    """
    scale = float(x.abs().max()) / 127
    codes = (x.float() / scale).round().add(128).to(torch.uint8)
    scales = weight.float().abs().amax(1) / 127
    packed = torch.ops.onednn.qlinear_prepack((weight.float() / scales[:, None]).round().to(torch.int8), x.shape)
    zeros, wide = torch.zeros(len(weight), dtype=torch.int64), bias.float()
    return lambda: torch.ops.onednn.qlinear_pointwise(
        *(codes, scale, 128, packed, scales, zeros, wide), 1.0, 0, torch.bfloat16, "none", [], ""
    )


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Allow or forbid float32 products on tensor cores within this context."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def copy(device: torch.device | str = "cpu") -> tuple[float, Callable[[], Tensor]]:
    """Return the gigabytes that a copy larger than any cache reads and writes, and the call."""
    megabytes = 128 if torch.device(device).type == "cpu" else 1024
    source = torch.randn(megabytes << 18, device=device)
    target = torch.empty_like(source)
    return 2e-9 * source.numel() * source.element_size(), lambda: target.copy_(source)
