"""What csrc/tests/smoke.cpp prints, where every instruction set passes."""

from __future__ import annotations

import re

import torch

from dave_fast.ops.int8 import linear_int8_ref, pack_int8_ref


def check_smoke(printed: str, *isas: str) -> None:
    """Assert that the smoke test has passed in these instruction sets, with the products in bytes of the definition."""
    lines = re.findall(r"^(\w+) passed, products in bytes: (\w+)$", printed, re.MULTILINE)
    assert {isa for isa, _ in lines} >= set(isas), printed
    assert {words for _, words in lines} == {f"{products_in_bytes():08x}"}, printed
    assert "\nsmoke test passed" in printed


def products_in_bytes() -> int:
    """Return the sum over the bits of 7 × 21 products in eight-bit integers that smoke.cpp prints."""
    rows, ins, outs = 7, 1100, 21
    x, matrix = _numbers(rows * ins, 3).view(rows, ins), _numbers(outs * ins, 7).view(outs, ins)
    # float32, and every bit kept, also the sign of a zero
    nothing = torch.full((rows, outs), -0.0)
    total = 0
    for bits in linear_int8_ref(x, pack_int8_ref(matrix), residual=nothing).view(torch.int32).flatten().tolist():
        total = (31 * total + bits) % 2**32
    return total


def _numbers(n: int, step: int) -> torch.Tensor:
    i = torch.arange(n)
    return (i * i * step % 8191 - 4095).float() / 1024
