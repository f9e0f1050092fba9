"""The Triton kernels run here: on a GPU, or by Triton's interpreter in a process with TRITON_INTERPRET=1.

`tests/test_triton.py` starts that process: the variable must be set before Triton is imported, and would keep every
other test of the process from compiling.
"""

from __future__ import annotations

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if not INTERPRETED and not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def device() -> str:
    """Where kernels run."""
    return "cpu" if INTERPRETED else "cuda"
