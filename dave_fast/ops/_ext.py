"""Load and call the native extensions `dave_fast._native` (host) and `dave_fast._cuda` (GPU).

Each is loaded at its first use; where that fails, the reason is kept and named. DAVE_FAST_ISA=avx512bf16|avx512|avx2|
baseline in the environment selects the host kernels of one instruction set instead of the best that the machine has.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dave_fast.errors import BackendError
from dave_fast.sampling import Draws

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
# Of a Draws' tensors, in the order of its fields.
DRAWS_DTYPES = [torch.int64, torch.float64, torch.float64, torch.float64, torch.int64, torch.int64]
CPU = torch.device("cpu")
# `run_native` or `run_cuda`: a kernel's name and its arguments.
Run = Callable[..., None]
# The oldest GPUs that the CUDA kernels are compiled for.
OLDEST_GPU = (8, 0)


def _imported(name: str, needs: str) -> ModuleType | str:
    """Import an extension; return the reason where it cannot be imported."""
    try:
        return import_module(name)
    except ModuleNotFoundError:
        return f"the extension {name} was not built; install {needs} DAVE_FAST_BUILD_EXT=1 to see why"
    except ImportError as error:
        return f"the extension {name} cannot be loaded: {error}"


@cache
def _load() -> ModuleType | str:
    # torch is imported above, so that the module finds torch's libgomp loaded and shares it
    module = _imported("dave_fast._native", "with a C++ compiler and")
    wanted = os.environ.get("DAVE_FAST_ISA")
    if wanted and not isinstance(module, str):
        try:
            module.use_isa(wanted)
        except ValueError as error:
            raise BackendError(f"DAVE_FAST_ISA: {error}; unset it to take the best") from None
    return module


@cache
def _load_cuda() -> ModuleType | str:
    # needs neither a GPU nor a driver
    return _imported("dave_fast._cuda", "where nvcc is on PATH, with")


def _loaded(found: ModuleType | str) -> ModuleType:
    if isinstance(found, str):
        raise BackendError(found)
    return found


def module() -> ModuleType:
    """Return the host extension; raise BackendError with the reason where it is missing."""
    return _loaded(_load())


def cuda_module() -> ModuleType:
    """Return the CUDA extension; raise BackendError with the reason where it is missing."""
    return _loaded(_load_cuda())


def unavailable() -> str | None:
    """Return why the host extension cannot be used; None when it can."""
    loaded = _load()
    return loaded if isinstance(loaded, str) else None


def cuda_unavailable() -> str | None:
    """Return why the CUDA kernels cannot be used; None when they can."""
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


def isa() -> str | None:
    """Return the instruction set in use ("avx512bf16", "avx512", "avx2", "baseline"); None without the extension."""
    loaded = _load()
    return None if isinstance(loaded, str) else str(loaded.isa())


def threads() -> int:
    """Return how many threads the host kernels use: as many as PyTorch."""
    return torch.get_num_threads()


def address(tensor: Tensor, device: torch.device = CPU) -> int:
    """Return the address of a contiguous tensor on `device`; raise BackendError for any other."""
    if tensor.device != device or not tensor.is_contiguous():
        raise BackendError(
            f"these kernels read contiguous {str(device).upper()} tensors; got one of shape {tuple(tensor.shape)} and "
            f"strides {tensor.stride()} on {tensor.device}"
        )
    return tensor.data_ptr()


def queue(device: torch.device) -> tuple[int, int]:
    """Return where kernels on `device` are launched: its index, and the address of PyTorch's current stream."""
    if device.type != "cuda":
        raise BackendError(f"CUDA kernels read tensors on a GPU; got one on {device}")
    stream = torch.cuda.current_stream(device)
    return stream.device_index, stream.cuda_stream


def coded(tensor: Tensor) -> tuple[Tensor, int]:
    """Return a tensor and its dtype code, two of a kernel's arguments."""
    return tensor, DTYPE_CODES[tensor.dtype]


def run_native(op: str, *arguments: Any) -> None:
    """Run a host kernel.

    Args:
        op: its name in `dave_fast._native`.
        *arguments: its arguments without the number of threads. A tensor is passed as its address, None as 0, and a
            Draws as the addresses of its tensors and its number of rows.
    """
    kernel = getattr(module(), op)
    passed, _kept = _passed(arguments, CPU)
    kernel(*passed, threads())


def run_cuda(op: str, *arguments: Any) -> None:
    """Run a CUDA kernel on PyTorch's current stream of the device of the first tensor.

    Args:
        op: its name in `dave_fast._cuda`.
        *arguments: its arguments without the device and the stream, passed as `run_native` passes them. Draws that are
            on another device are copied.
    """
    kernel = getattr(cuda_module(), op)
    device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
    moved = [argument.to(device) if isinstance(argument, Draws) else argument for argument in arguments]
    passed, _kept = _passed(moved, device)
    kernel(*queue(device), *passed)


def _passed(arguments: Sequence[Any], device: torch.device) -> tuple[list[Any], list[Tensor]]:
    """Return arguments as a kernel takes them, and the tensors made for it, to be kept until it has run."""
    passed: list[Any] = []
    kept: list[Tensor] = []
    for argument in arguments:
        if isinstance(argument, Draws):
            tensors = [tensor.contiguous() for tensor in argument.tensors()]
            if [tensor.dtype for tensor in tensors] != DRAWS_DTYPES:
                raise TypeError("draws must have the dtypes that dave_fast.sampling.Draws documents")
            kept += tensors
            passed += [[address(tensor, device) for tensor in tensors], len(argument)]
        elif isinstance(argument, Tensor):
            passed.append(address(argument, device))
        else:
            passed.append(0 if argument is None else argument)
    return passed, kept
