"""The native extension `dave_fast._native`: loaded when first wanted, with the reason kept where it cannot be.

DAVE_FAST_ISA=avx512bf16|avx512|avx2|baseline in the environment takes the kernels of one instruction set; without it
the best that the machine has is taken.
"""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from dave_fast.errors import BackendError
from dave_fast.sampling import Draws

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}


@cache
def _load() -> ModuleType | str:
    """The module, or the reason why there is none."""
    # torch is imported above, so that the module finds torch's libgomp loaded and shares it
    try:
        module = import_module("dave_fast._native")
    except ModuleNotFoundError:
        return (
            "the extension dave_fast._native was not built; install with a C++ compiler and DAVE_FAST_BUILD_EXT=1 "
            "to see why"
        )
    except ImportError as error:
        return f"the extension dave_fast._native cannot be loaded: {error}"
    wanted = os.environ.get("DAVE_FAST_ISA")
    if wanted:
        try:
            module.use_isa(wanted)
        except ValueError as error:
            raise BackendError(f"DAVE_FAST_ISA: {error}; unset it to take the best") from None
    return module


def unavailable() -> str | None:
    """Why the extension cannot be used; None when it can."""
    loaded = _load()
    return loaded if isinstance(loaded, str) else None


def module() -> ModuleType:
    """The extension; BackendError with the reason where there is none."""
    loaded = _load()
    if isinstance(loaded, str):
        raise BackendError(loaded)
    return loaded


def isa() -> str | None:
    """The instruction set in use ("avx512bf16", "avx512", "avx2", "baseline"); None without the extension."""
    loaded = _load()
    return None if isinstance(loaded, str) else str(loaded.isa())


def threads() -> int:
    """How many threads the kernels use: as many as PyTorch."""
    return torch.get_num_threads()


def address(tensor: Tensor) -> int:
    """The address of a contiguous CPU tensor, as the extension takes it."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise BackendError(f"native kernels read contiguous CPU tensors; got one on {tensor.device}")
    return tensor.data_ptr()


class NativeDraws:
    """A Draws as the extension takes it: six addresses, kept alive by this object."""

    def __init__(self, draws: Draws) -> None:
        self._tensors = (
            draws.image_index.contiguous(),
            draws.matrices.contiguous(),
            draws.signal.contiguous(),
            draws.noise.contiguous(),
            draws.keys.contiguous(),
            draws.samples.contiguous(),
        )
        expected = (torch.int64, torch.float64, torch.float64, torch.float64, torch.int64, torch.int64)
        if tuple(tensor.dtype for tensor in self._tensors) != expected:
            raise TypeError("draws must have the dtypes that dave_fast.sampling.Draws documents")
        self.addresses = [address(tensor) for tensor in self._tensors]
        self.rows = len(draws)
