"""A stand-in for a GPU below Triton's JIT: kernels are compiled as for the device, launches are recorded.

    with fake_gpu(arch=90) as launches:
        linear_triton(x, weight)            # CPU tensors; what comes out is uninitialised memory
    launches[0].kernel.resources.registers

All of Triton that runs on the host is its own: specialisation of arguments, compilation, the bundled ptxas, the check
of shared memory, tensor descriptors, the launcher. The CUDA driver below it is replaced: what stands here refuses what
CUDA refuses (grids, threads, descriptors) and records the rest. Nothing of it is left when the context ends.
"""

from __future__ import annotations

import contextlib
import gc
import io
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor, nn
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver as drivers

from benchmarks.ptxas import ARCHITECTURES, Resources
from dave_fast.engine import build as building
from dave_fast.engine import walks as engine
from dave_fast.kernels import _launch
from dave_fast.ops import _registry
from dave_fast.ops.fp8 import TokenScales
from tests.toys import engine_of

# of an H100 and an H200
MULTIPROCESSORS = 132
LARGEST_GRID = (2**31 - 1, 65535, 65535)
# CUtensorMapSwizzle -> most bytes of a box's innermost dimension
SWIZZLED = {0: 2**31, 1: 32, 2: 64, 3: 128}


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel: constants by name, types of the other arguments, and its resources by ptxas."""

    name: str
    arch: int
    constants: tuple[tuple[str, Any], ...]
    types: tuple[tuple[str, str], ...]
    warps: int
    stages: int
    shared: int
    ptx: str
    resources: Resources

    @property
    def resident(self) -> int:
        """Number of programs that a multiprocessor runs at once."""
        return self.resources.resident(self.arch, self.warps, self.shared)


@dataclass(frozen=True)
class Launch:
    """One launch.

    grid: programs along x, y, z · sizes: its integers of one letter, such as T = 5516 · bytes: of all tensors that it
    was given, each counted once.
    """

    kernel: Kernel
    grid: tuple[int, int, int]
    sizes: tuple[tuple[str, int], ...]
    bytes: int

    @property
    def waves(self) -> float:
        """Number of programs divided by that which the device runs at once."""
        return math.prod(self.grid) / (self.kernel.resident * MULTIPROCESSORS)

    @property
    def fill(self) -> float:
        """Number of programs as a share of that of whole waves, in (0, 1]."""
        return self.waves / math.ceil(self.waves)


@contextlib.contextmanager
def fake_gpu(arch: int = 90) -> Iterator[list[Launch]]:
    """Compile for a device of this compute capability within this context; yield the list of launches."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: kernels would be interpreted, not compiled. Unset it.")
    launches: list[Launch] = []
    driver = _Driver(arch, launches)
    changed = {
        # Triton 3.6 compiles its launcher against libcuda, later ones take parts of a module that is linked to it
        nvidia: {
            "library_dirs": list,
            "compile_module_from_src": lambda **_: SimpleNamespace(launch=_no_launch),
            "PyKernelArg": SimpleNamespace,
        },
        _launch: {
            "architecture": lambda device: arch,
            "multiprocessors": lambda device: MULTIPROCESSORS,
            # the first candidate, not one chosen by a measurement on this machine
            "_choose": lambda problem, rows, device, candidates, trial: candidates[0],
            "_taken": {},
        },
        CUDABackend: {"make_cubin": _make_cubin},
        drivers: {"_active": driver},
    }
    backends = _registry.BACKENDS | {"triton": _registry.Backend("triton", ("cpu", "cuda"), lambda: None)}
    with contextlib.ExitStack() as stack:
        stack.enter_context(triton.knobs.cache.scope())
        stack.enter_context(triton.knobs.nvidia.scope())
        # without Triton's cache, whose kernels lack the output of ptxas
        triton.knobs.cache.dir = stack.enter_context(tempfile.TemporaryDirectory())
        triton.knobs.nvidia.dump_ptxas_log = True
        stack.enter_context(mock.patch.object(_registry, "BACKENDS", backends))
        for place, attributes in changed.items():
            for name, value in attributes.items():
                stack.enter_context(mock.patch.object(place, name, value, create=place is nvidia))
        try:
            yield launches
        finally:
            for function in driver.launched:
                function.device_caches.pop(driver, None)
            # kernels are unloaded by the driver that loaded them
            gc.collect()


def build(model: nn.Module, precision: str, size: tuple[int, int] | None = None) -> engine.Engine:
    """Build an engine on the stand-in, in fp32, bf16 or fp8."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}[precision]
    # scales of e4m3 are calibrated by PyTorch's ops; no test here reads their values
    scales = SimpleNamespace(of=lambda *weights: TokenScales(1.0, 0.5, 197, 1) if weights else None)
    with mock.patch.object(building, "calibrate", return_value=scales):
        return engine_of(model, dtype=dtype, size=size, backend="triton", narrow="fp8" if precision == "fp8" else None)


def walk(built: engine.Engine, rows: int) -> None:
    """Launch the kernels of a micro-batch of this many rows, forward and VJP."""
    plan = built.plan
    inputs = plan.channels * math.prod(plan.patch_size)
    output, saved = built.forward(torch.empty(rows, plan.position.shape[0], inputs, dtype=plan.dtype))
    built.vjp(saved, torch.ones_like(output))


_real_make_cubin = CUDABackend.make_cubin


def _make_cubin(self: CUDABackend, src: str, metadata: dict[str, Any], *arguments: Any) -> bytes:
    """Return the cubin, and store the output of ptxas in the metadata for the launcher."""
    with contextlib.redirect_stdout(io.StringIO()) as log:
        cubin = _real_make_cubin(self, src, metadata, *arguments)
    metadata["ptxas_log"], metadata["ptx"] = log.getvalue(), src
    return cubin


def _no_launch(*_: Any) -> None:
    """Do nothing, in place of the compiled launcher."""


class _Utils:
    """A replacement of Triton's module that is linked to libcuda; it raises the errors of CUDA."""

    launch = staticmethod(_no_launch)

    def __init__(self, arch: int) -> None:
        self._properties = {
            "max_shared_mem": ARCHITECTURES[arch][2],
            "multiprocessor_count": MULTIPROCESSORS,
            "max_num_regs": ARCHITECTURES[arch][0],
            "warpSize": 32,
        }

    def get_device_properties(self, _device: Any) -> dict[str, int]:
        return self._properties

    def load_binary(self, _name: str, _binary: bytes, _shared: int, _device: Any) -> tuple[Any, ...]:
        # module, function, registers, spills, threads; the launcher has the last three from ptxas
        return object(), object(), 0, 0, 1024

    def unload_module(self, _module: Any) -> None:
        """Do nothing: no module was loaded."""

    def build_signature_metadata(self, types: list[str]) -> list[str]:
        return [nvidia.ty_to_cpp(each) for each in types]

    def fill_tma_descriptor(
        self, address: int, swizzle: int, itemsize: int, _type: int, box: list[int], shape: list[int],
        strides: list[int], _padding: int,
    ) -> object:  # fmt: skip
        """Raise RuntimeError where cuTensorMapEncodeTiled would return CUDA_ERROR_INVALID_VALUE."""
        demands = {
            "the address is a multiple of 16": address % 16 == 0,
            "strides are multiples of 16 bytes below 2⁴⁰": all(
                s * itemsize % 16 == 0 and s * itemsize < 2**40 for s in strides[:-1]
            ),
            "sizes are 1 to 2³²": all(1 <= n <= 2**32 for n in shape),
            "box sizes are 1 to 256": all(1 <= n <= 256 for n in box),
            "a box's rows are multiples of 16 bytes": box[-1] * itemsize % 16 == 0,
            "a box's rows fit the swizzle": box[-1] * itemsize <= SWIZZLED[swizzle],
        }
        broken = [what for what, holds in demands.items() if not holds]
        if broken:
            raise RuntimeError(f"tensor descriptor {shape=} {strides=} {box=} {itemsize=} {swizzle=}: not {broken}")
        return object()

    fill_tma_descriptor_tiled = fill_tma_descriptor


class _Driver:
    """A replacement of `CudaDriver`, and its own device, so that kernels of other devices are not reused."""

    def __init__(self, arch: int, launches: list[Launch]) -> None:
        self.arch = arch
        self.launches = launches
        self.launched: set[Any] = set()
        self.utils = _Utils(arch)

    def launcher_cls(self, source: Any, metadata: Any) -> _Launcher:
        self.launched.add(source.fn)
        return _Launcher(self, source, metadata)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> _Driver:
        return self

    def get_current_stream(self, _device: Any) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class _Launcher(nvidia.CudaLauncher):
    """A replacement of Triton's launcher that checks and records launches."""

    def __init__(self, driver: _Driver, source: Any, metadata: Any) -> None:
        super().__init__(source, metadata)
        names = source.fn.arg_names
        constants = {names[path[0]]: value for path, value in source.constants.items()}
        types = {name: kind for name, kind in source.signature.items() if kind != "constexpr"}
        resources = Resources.read(metadata.ptxas_log)
        self._names = names
        self._launches = driver.launches
        self._kernel = Kernel(
            *(source.fn.fn.__name__, driver.arch, tuple(constants.items()), tuple(types.items())),
            *(metadata.num_warps, metadata.num_stages, metadata.shared, metadata.ptx, resources),
        )

    def __call__(self, *arguments: Any) -> None:
        super().__call__(*arguments)
        grid, kernel = arguments[:3], self._kernel
        given = dict(zip(self._names, arguments[9:], strict=True))
        if any(n > most for n, most in zip(grid, LARGEST_GRID, strict=True)):
            raise RuntimeError(f"{kernel.name}: grid {grid} is larger than CUDA's {LARGEST_GRID}")
        if 32 * kernel.warps > kernel.resources.most_threads:
            raise RuntimeError(f"{kernel.name}: {kernel.warps} warps of {kernel.resources.registers} registers")
        sizes = tuple((name, n) for name, n in given.items() if len(name) == 1 and isinstance(n, int))
        tensors = [t for t in given.values() if isinstance(t, Tensor)]
        self._launches.append(Launch(kernel, grid, sizes, sum(t.numel() * t.itemsize for t in tensors)))
