"""The native extensions `dave_fast._native` (host) and `dave_fast._cuda` (GPU): loaded when first wanted, with the
reason kept where they cannot be.

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

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
# the oldest GPUs that the CUDA kernels are compiled for
OLDEST_GPU = (8, 0)


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


def _contiguous(draws: Draws) -> tuple[Tensor, ...]:
    """The six tensors of a Draws, contiguous; TypeError for other dtypes than it documents."""
    tensors = tuple(tensor.contiguous() for tensor in draws.tensors())
    expected = (torch.int64, torch.float64, torch.float64, torch.float64, torch.int64, torch.int64)
    if tuple(tensor.dtype for tensor in tensors) != expected:
        raise TypeError("draws must have the dtypes that dave_fast.sampling.Draws documents")
    return tensors


class NativeDraws:
    """A Draws as the extension takes it: six addresses, kept alive by this object."""

    def __init__(self, draws: Draws) -> None:
        self._tensors = _contiguous(draws)
        self.addresses = [address(tensor) for tensor in self._tensors]
        self.rows = len(draws)


@cache
def _load_cuda() -> ModuleType | str:
    """The CUDA module, or the reason why there is none; it loads without a GPU and without a driver."""
    try:
        return import_module("dave_fast._cuda")
    except ModuleNotFoundError:
        return (
            "the extension dave_fast._cuda was not built; install where nvcc is on PATH, with DAVE_FAST_BUILD_EXT=1 to "
            "see why"
        )
    except ImportError as error:
        return f"the extension dave_fast._cuda cannot be loaded: {error}"


def cuda_unavailable() -> str | None:
    """Why the CUDA kernels cannot be used; None when they can."""
    loaded = _load_cuda()
    if isinstance(loaded, str):
        return loaded
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        return f"PyTorch ({built}) finds no CUDA device"
    for index in range(torch.cuda.device_count()):
        name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
        if capability < OLDEST_GPU:
            needed, found = (".".join(map(str, version)) for version in (OLDEST_GPU, capability))
            return f"the CUDA kernels need compute capability {needed} or later; cuda:{index} ({name}) has {found}"
        reason = loaded.why_not(index)
        if reason:
            return f"the CUDA kernels cannot run on cuda:{index} ({name}): {reason}"
    return None


def cuda_module() -> ModuleType:
    """The CUDA module; BackendError with the reason where there is none."""
    loaded = _load_cuda()
    if isinstance(loaded, str):
        raise BackendError(loaded)
    return loaded


def queue(device: torch.device) -> tuple[int, int]:
    """Where kernels for tensors on `device` are launched: its number, and the address of PyTorch's current stream."""
    if device.type != "cuda":
        raise BackendError(f"CUDA kernels read tensors on a GPU; got one on {device}")
    stream = torch.cuda.current_stream(device)
    return stream.device_index, stream.cuda_stream


def device_address(tensor: Tensor, device: torch.device) -> int:
    """The address of a contiguous tensor on `device`, as the CUDA module takes it."""
    if tensor.device != device or not tensor.is_contiguous():
        raise BackendError(f"CUDA kernels read contiguous tensors on one device, {device}; got one on {tensor.device}")
    return tensor.data_ptr()


class DeviceDraws:
    """A Draws on a device as the CUDA module takes it: six addresses, kept alive by this object.

    Draws that are on the device already are taken as they are; others are copied there.
    """

    def __init__(self, draws: Draws, device: torch.device) -> None:
        self._tensors = _contiguous(draws.to(device))
        self.addresses = [device_address(tensor, device) for tensor in self._tensors]
        self.rows = len(draws)
