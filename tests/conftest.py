"""What every test of an op gets: fresh buffers that hold NaN, and each form of the op that this machine can run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dave_fast.ops import _ext, _registry
from tests import serial_cuda

INTEGER_POISON, BYTE_POISON = -7, 173

# files that take longest: a process that began one of them at the end would keep the others waiting
LONGEST = (
    *("serve/test_hostile_soak.py", "run/test_survival.py", "ops/test_triton.py", "run/test_ray.py"),
    *("run/test_maps.py", "project/test_build.py", "project/test_arm.py"),
    *("scripts/test_gpu_script.py", "ops/test_perturb.py", "cli/test_cli.py", "ops/test_cuda.py"),
    *("models/test_demo_model.py", "run/test_cli_run.py", "engine/test_memory.py", "bench/test_agreement.py"),
)

# tests are small, and often run side by side; those about threads ask for them
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files of `LONGEST` first."""
    place = {Path(__file__).parent / name: at for at, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


def _poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        fresh = make(*args, **kwargs)
        if fresh.is_floating_point() or fresh.is_complex():
            return fresh.fill_(torch.nan)
        if fresh.dtype in (torch.int8, torch.int16, torch.int32, torch.int64):
            return fresh.fill_(INTEGER_POISON)
        if fresh.dtype == torch.uint8:
            return fresh.fill_(BYTE_POISON)
        return fresh

    return poisoned


@pytest.fixture(autouse=True)
def poisoned_buffers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In tests of ops and kernels a fresh tensor holds NaN (integers: a sentinel), so that none is read by mistake."""
    if {"ops", "kernels"} & set(request.path.parts):
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


def chosen_backend(form: str) -> Iterator[str]:
    """Yield the backend of "torch", or of an instruction set that is in use until the test ends."""
    if form == "torch":
        yield "torch"
        return
    reason = _ext.unavailable()
    if reason is not None:
        pytest.skip(reason)
    native = _ext.module()
    if form not in native.usable_isas():
        pytest.skip(f"this machine has no {form}")
    before = native.isa()
    native.use_isa(form)
    yield "native"
    native.use_isa(before)


# the instruction sets of linear; those that only it has a use for are left out of `backend`
ISAS = ("avx512bf16", "avx512vnni", "avx512", "avx2vnni", "avx2", "neonbf16", "dotprod", "baseline")


@pytest.fixture(params=["torch", "avx512bf16", "avx512", "avx2", "baseline"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each form of an op in turn: PyTorch, and C++ for each instruction set of this machine."""
    yield from chosen_backend(request.param)


@pytest.fixture
def emulated_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accept int8 on a CPU without its instructions, which the C++ form emulates to the bit."""
    monkeypatch.setattr(_ext, "multiplies_bytes", lambda: True)


@pytest.fixture
def serial_cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA kernels' bodies run on the host, for CPU tensors: backend "cuda" without a GPU."""
    reason = serial_cuda.missing()
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setattr(_ext, "cuda_module", serial_cuda.load)
    monkeypatch.setattr(_ext, "queue", lambda device: (0, 0))
    monkeypatch.setitem(_registry.BACKENDS, "cuda", _registry.Backend("cuda", ("cpu",), lambda: None))


@pytest.fixture(params=["torch", "avx512bf16", "avx512", "avx2", "baseline", "cuda"])
def pixel_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each form of a pixel op in turn: those of `backend`, and the CUDA kernels."""
    if request.param == "cuda":
        request.getfixturevalue("serial_cuda_kernels")
        yield "cuda"
    else:
        yield from chosen_backend(request.param)


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """Set up a process group of this process alone, which DistributedDataParallel needs."""
    import torch.distributed as dist

    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()
