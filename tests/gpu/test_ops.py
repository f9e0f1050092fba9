"""Test every op by every backend of this device against float64, on fresh random operands."""

from __future__ import annotations

import pytest
import torch

from dave_fast.bench.agreement import check, loader
from dave_fast.bench.cases import CASES, cases_of
from dave_fast.bench.shapes import Shapes
from dave_fast.ops import _registry
from dave_fast.ops.precision import has_bf16
from tests.gpu.conftest import DEVICE, REHEARSAL

# name -> samples, rows, side, patch, prefix tokens, heads, head dimension, hidden, activation
SIZES = {
    "one-token": (1, 1, 8, 8, 0, 1, 8, 8, "gelu"),
    "odd": (5, 3, 24, 8, 1, 3, 20, 76, "gelu"),
    "two-prefix-tokens": (7, 2, 40, 8, 2, 2, 32, 160, "gelu_tanh"),
    "gated": (3, 2, 24, 8, 1, 2, 16, 88, "silu_glu"),
    "197-tokens": (50, 2, 224, 16, 1, 12, 64, 3072, "gelu"),
    "257-tokens": (33, 1, 224, 14, 1, 6, 64, 1536, "gelu"),
    "785-tokens": (16, 1, 448, 16, 1, 12, 64, 3072, "gelu"),
    "head-dim-128": (9, 1, 96, 8, 1, 2, 128, 512, "quick_gelu"),
    "129-samples": (129, 1, 32, 8, 1, 2, 16, 64, "gelu"),
    "300-samples": (300, 1, 16, 8, 1, 2, 16, 64, "relu"),
}
SMALL = ("one-token", "odd", "two-prefix-tokens", "gated", "129-samples")
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}


def shapes(name: str) -> Shapes:
    samples, rows, side, patch, prefix, heads, head_dim, hidden, activation = SIZES[name]
    return Shapes(
        samples=samples,
        rows=rows,
        image=(3, side, side),
        patch=(patch, patch),
        prefix=prefix,
        width=heads * head_dim,
        heads=heads,
        head_dim=head_dim,
        hidden=hidden,
        activation=activation,
        blocks=1,
        read=1,
    )


def backends() -> list[tuple[str, str]]:
    """Return every (op, backend) that runs on the device, with the forms in PyTorch."""
    return [
        (op, backend)
        for op in CASES
        for backend in _registry.IMPLEMENTATIONS[op]
        if _registry.why_not(op, backend, DEVICE) is None
    ]


# one test for each size: an error of CUDA ends a test and must not hide the other sizes
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("size", SMALL if REHEARSAL else SIZES)
@pytest.mark.parametrize(("op", "backend"), backends())
def test_against_float64(op: str, backend: str, size: str, precision: str, device: str, fresh_seed: int) -> None:
    if precision == "bf16" and not has_bf16(torch.device(device)):
        pytest.skip("this device does not multiply bfloat16")
    if op == "linear_fp8" and precision != "bf16":
        pytest.skip("fp8 has bfloat16 activations")
    for case in cases_of(op, shapes(size)):
        operands = case.operands(torch.Generator(device).manual_seed(fresh_seed), DTYPES[precision])
        agreement, results = check(case, loader(backend, device), operands, DTYPES[precision])
        assert agreement.reason is None, f"{case.op} {case.name}: {agreement.reason}"
        assert all(result.device.type == device for result in results), case.name


@pytest.mark.parametrize("op", CASES)
def test_kernels_of_the_device_load(op: str, device: str) -> None:
    """Test that the device's own kernels load, since otherwise the other tests would test the forms in PyTorch."""
    own = {"cuda": {"cuda", "triton"}, "cpu": {"native"}}[device]
    forms = set(_registry.IMPLEMENTATIONS[op]) & own
    if not forms:
        pytest.skip(f"{op} has only PyTorch's form on {device}")
    reasons = {name: _registry.why_not(op, name, device) for name in forms}
    assert not any(reasons.values()), reasons


@pytest.mark.parametrize(("op", "backend"), backends())
def test_the_same_bits_twice(op: str, backend: str, device: str, fresh_seed: int) -> None:
    """Test that two calls give equal bits: a race would not, and no kernel uses floating-point atomics."""
    for case in cases_of(op, shapes("odd")):
        operands = case.operands(torch.Generator(device).manual_seed(fresh_seed), torch.float32)
        call = case.bind(loader(backend, device), operands, torch.float32)
        first, second = (call() for _ in range(2))
        for a, b in zip(tensors(first), tensors(second), strict=True):
            assert torch.equal(a, b), case.name


def tensors(returned: object) -> list[torch.Tensor]:
    values = returned if isinstance(returned, tuple) else (returned,)
    return [value for value in values if isinstance(value, torch.Tensor)]
