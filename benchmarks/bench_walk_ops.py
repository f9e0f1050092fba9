"""The ops of the two walks at ViT-B/16's shapes, every backend beside the others.

    pytest benchmarks/bench_walk_ops.py [-k "attention and bfloat16"] [--benchmark-columns min,median,iqr]

Four rows of 197 tokens: 788 tokens, 12 heads of 64, width 768, hidden width 3072.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dave_fast.ops import _registry

ROWS, TOKENS, HEADS, HEAD_DIM, WIDTH, HIDDEN = 4, 197, 12, 64, 768, 3072
DTYPES = [torch.float32, torch.bfloat16]


def numbers(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def load(op: str, backend: str) -> Any:
    reason = _registry.why_not(op, backend, "cpu")
    if reason is not None:
        pytest.skip(reason)
    return _registry.load(op, backend)


@pytest.mark.parametrize("backend", ["torch", "onednn", "native"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("epilogue", ["plain", "scale", "activation", "gate", "residual"])
def test_linear(benchmark: Any, backend: str, dtype: torch.dtype, epilogue: str) -> None:
    linear, pack = load("linear", backend), load("pack_weight", backend)
    x, weight = numbers(ROWS * TOKENS, WIDTH, dtype=dtype), pack(numbers(HIDDEN, WIDTH, dtype=dtype))
    other = numbers(ROWS * TOKENS, HIDDEN, dtype=dtype)
    settings = {
        "plain": {},
        "scale": {"row_scale": torch.rand(ROWS * TOKENS) + 0.5},
        "activation": {"activation": "gelu"},
        "gate": {"gate": other},
        "residual": {"residual": other},
    }[epilogue]
    benchmark(lambda: linear(x, weight, **settings))


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("walk", ["forward", "vjp"])
def test_attention(benchmark: Any, backend: str, dtype: torch.dtype, walk: str) -> None:
    forward, vjp = load("attention", backend), load("attention_vjp", backend)
    q, k, v = numbers(ROWS, TOKENS, 3, HEADS, HEAD_DIM, dtype=dtype).unbind(2)
    out, saved = forward(q, k, v, 0.125)
    benchmark((lambda: forward(q, k, v, 0.125)) if walk == "forward" else (lambda: vjp(saved, out)))


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_rstd(benchmark: Any, backend: str, dtype: torch.dtype) -> None:
    x, row_rstd = numbers(ROWS * TOKENS, WIDTH, dtype=dtype), load("row_rstd", backend)
    benchmark(lambda: row_rstd(x, 1e-6, centred=True))
