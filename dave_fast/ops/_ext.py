"""Load and call the native extensions `dave_fast._native` (host) and `dave_fast._cuda` (GPU).

Each is loaded at its first use; where that fails, the reason is kept and named. DAVE_FAST_ISA in the environment
selects the host kernels of one instruction set instead of the best that the machine has: on x86 avx512bf16, avx512vnni,
avx512, avx2vnni, avx2 or baseline, on Arm neonbf16, dotprod or baseline.
"""

from __future__ import annotations

import os
import shlex
import shutil
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dave_fast.errors import BackendError, InputError
from dave_fast.sampling import Draws

# those of csrc/arguments.h
DTYPE_CODES = dict(
    zip((torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32), range(6), strict=True)
)
CPU = torch.device("cpu")
# A tensor as the extensions take it: address, number of values, dtype code.
Memory = tuple[int, int, int]
# `run_native` or `run_cuda`: a kernel's name and its arguments.
Run = Callable[..., None]
# The oldest GPUs that the CUDA kernels are compiled for.
OLDEST_GPU = (8, 0)


def build_command() -> str | None:
    """Return the command that builds the extensions where this package is; None outside of a checkout.

    Python started in a checkout takes the package from there, also where another one is installed.
    """
    root = Path(__file__).resolve().parents[2]
    return f"pip install -e {shlex.quote(str(root))}" if (root / "csrc" / "bindings.cpp").is_file() else None


def _warn_of_missing_core() -> None:
    """Warn where the core was not built although it can be: in a checkout with a compiler, unless that was chosen."""
    command, chosen = build_command(), os.environ.get("DAVE_FAST_BUILD_EXT") == "0"
    compilers = (os.environ.get("CXX", "").split(" ")[0], "c++", "g++", "clang++")
    if command is not None and not chosen and any(shutil.which(name) for name in compilers if name):
        warnings.warn(
            f"the native core is not built here, and maps on a CPU take several times as long: {command} builds it "
            "(DAVE_FAST_BUILD_EXT=0: without it)",
            RuntimeWarning,
            stacklevel=2,
        )


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
    if isinstance(module, str) and "was not built" in module:
        _warn_of_missing_core()
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
    """Return the instruction set in use, one of the names above; None without the extension."""
    loaded = _load()
    return None if isinstance(loaded, str) else str(loaded.isa())


def multiplies_bytes() -> bool:
    """Return whether an instruction set of this machine multiplies bytes, whichever is in use."""
    return bool(module().multiplies_bytes(True))


def threads() -> int:
    """Return how many threads the host kernels use: as many as PyTorch."""
    return torch.get_num_threads()


def memory(tensor: Tensor, device: torch.device = CPU) -> Memory:
    """Return a contiguous tensor on `device` as kernels take it; raise BackendError or TypeError for any other."""
    if tensor.device != device or not tensor.is_contiguous() or tensor.is_neg():
        raise BackendError(
            f"these kernels read contiguous {str(device).upper()} tensors; got one of shape {tuple(tensor.shape)} and "
            f"strides {tensor.stride()} on {tensor.device}"
        )
    return tensor.data_ptr(), tensor.numel(), _code(tensor)


def strided(tensor: Tensor) -> Memory:
    """Return a CPU tensor of any strides as kernels take it: the memory from its first to its last value."""
    if tensor.device != CPU or tensor.is_neg():
        raise BackendError(f"these kernels read CPU tensors; got one of shape {tuple(tensor.shape)} on {tensor.device}")
    reached = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), reached if tensor.numel() else 0, _code(tensor)


def _code(tensor: Tensor) -> int:
    code = DTYPE_CODES.get(tensor.dtype)
    if code is None:
        raise TypeError(f"these kernels have no form for {tensor.dtype}; give float32, float64, bfloat16 or float16")
    return code


def queue(device: torch.device) -> tuple[int, int]:
    """Return where kernels on `device` are launched: its index, and the address of PyTorch's current stream."""
    if device.type != "cuda":
        raise BackendError(f"CUDA kernels read tensors on a GPU; got one on {device}")
    stream = torch.cuda.current_stream(device)
    return stream.device_index, stream.cuda_stream


def run_native(op: str, *arguments: Any) -> None:
    """Run a host kernel, which checks that all of its arguments fit each other.

    Args:
        op: its name in `dave_fast._native`.
        *arguments: its arguments without the number of threads. A tensor, and every tensor of a Draws, is passed as
            `memory` returns it.

    Raises:
        InputError: sizes, dtypes or values do not fit.
    """
    kernel = getattr(module(), op)
    passed, _kept = _passed(arguments, CPU)
    try:
        kernel(*passed, threads())
    except ValueError as error:
        raise InputError(f"{op}: {error}") from None


def run_cuda(op: str, *arguments: Any) -> None:
    """Run a CUDA kernel on PyTorch's current stream of the device of the first tensor.

    Args:
        op: its name in `dave_fast._cuda`.
        *arguments: its arguments without the device and the stream, passed as `run_native` passes them. Draws that are
            on another device are copied.

    Raises:
        InputError: sizes or dtypes do not fit.
    """
    kernel = getattr(cuda_module(), op)
    device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
    moved = [argument.to(device) if isinstance(argument, Draws) else argument for argument in arguments]
    passed, _kept = _passed(moved, device)
    try:
        kernel(*queue(device), *passed)
    except ValueError as error:
        raise InputError(f"{op}: {error}") from None


def _passed(arguments: Sequence[Any], device: torch.device) -> tuple[list[Any], list[Tensor]]:
    """Return arguments as a kernel takes them, and the tensors made for it, to be kept until it has run."""
    passed: list[Any] = []
    kept: list[Tensor] = []
    for argument in arguments:
        if isinstance(argument, Draws):
            tensors = [tensor.contiguous() for tensor in argument.tensors()]
            kept += tensors
            passed.append([memory(tensor, device) for tensor in tensors])
        else:
            passed.append(memory(argument, device) if isinstance(argument, Tensor) else argument)
    return passed, kept
