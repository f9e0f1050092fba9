"""The machine's highest rates: matrix products at a model's shapes, and copying memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dave_fast.ops import _registry
from dave_fast.ops.linear import before_avx512, linear_onednn, pack_onednn
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


def kind_of(precision: str, device: str) -> str:
    """Return the kind of ceiling of a precision on a device: a library and the precision of its products.

    "mkl" and "cublas" are F.linear, "packed" is oneDNN with weights packed beforehand, taken where it packs the dtype
    and is not the slower one.
    """
    if device == "cuda":
        return f"cublas-{precision}"
    if precision == "fp8":
        # CPUs have no products in e4m3, and the reference multiplies in float32
        precision = "fp32"
    packs = precision != "fp64" and _registry.why_not("linear", "onednn", "cpu") is None
    return f"packed-{precision}" if packs and not (precision == "fp32" and before_avx512()) else f"mkl-{precision}"


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
