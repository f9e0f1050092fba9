"""Run the tests of the Triton kernels on a GPU, or by Triton's interpreter in a process with TRITON_INTERPRET=1.

`tests/ops/test_triton.py` starts that process: the variable must be set before Triton is imported, and would keep every
other test of the process from compiling.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.tolerances import LOW_PRECISION_RATIO

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# the interpreter multiplies bfloat16's bits: it is left to PyTorch there
DTYPES = [torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16])]

if not INTERPRETED and not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]


def pytest_configure(config: pytest.Config) -> None:
    """Let NumPy, by which the interpreter computes, warn where a kernel means its infinities and NaN."""
    if INTERPRETED:
        config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning")


@pytest.fixture
def device() -> str:
    """Return the type of the device that kernels run on."""
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture
def numbers(device: str) -> Callable[..., Tensor]:
    """Return a function that draws normal deviates on the device: numbers(*shape, dtype=, seed=)."""

    def make(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(device)

    return make


def error(found: Tensor, expected: Tensor) -> float:
    """Return the relative error, by Euclidean norms."""
    return ((found.double() - expected).norm() / expected.norm()).item()


def assert_as_good(found: Tensor, plain: Tensor, expected: Tensor) -> None:
    """Fail unless a kernel's error is within the bound beside plain PyTorch's in the same precision."""
    assert found.shape == expected.shape and found.dtype == plain.dtype and found.device == plain.device
    assert found.isfinite().all()
    limit = LOW_PRECISION_RATIO * max(error(plain, expected), torch.finfo(found.dtype).eps)
    assert error(found, expected) <= limit
