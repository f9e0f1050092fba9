"""Test the CUDA kernels without a GPU: their registers and PTX, the reasons why they cannot be used, the build, and the
serial run of their bodies on the host."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import dave_fast
from dave_fast.errors import BackendError
from dave_fast.ops import _ext, _registry
from dave_fast.ops import pull_back_mean as tiled
from dave_fast.ops.patches import patchify
from dave_fast.ops.perturb import perturb_cuda
from dave_fast.ops.pull_back import pull_back_cuda, pull_back_ref
from dave_fast.ops.robust_mean import robust_mean, robust_mean_ref
from dave_fast.ops.spread_mean import spread_mean_variance_cuda
from dave_fast.sampling import draw
from scripts import cuda_resources
from tests.ops.test_perturb import image_batch

ROOT = Path(__file__).resolve().parents[2]
MEANS = ("robust_mean", "pull_back_mean", "robust_mean_variance", "pull_back_mean_variance")
PIXEL_OPS = ("perturb", "pull_back", *MEANS, "spread_mean_variance", "shrink", "smooth")

needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
needs_module = pytest.mark.skipif(isinstance(_ext._load_cuda(), str), reason=str(_ext._load_cuda()))
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")


@needs_nvcc
def test_no_kernel_spills_and_the_table_says_what_the_compiler_says():
    kernels = cuda_resources.collect(("sm_90a",))["sm_90a"]
    # 4 run lengths, 4 kinds of cotangents and densities in 2 precisions; 7 networks, 4 selections, 4 variances; 5 steps
    # in 2 precisions
    names = {one.kernel.split("<")[0]: [] for one in kernels}
    for one in kernels:
        names[one.kernel.split("<")[0]].append(one)
    counts = {name: len(found) for name, found in names.items()}
    assert counts == {
        "Perturb": 8,
        "PullBack": 8,
        "Spread": 2,
        "SortInOne": 7,
        "SortInTwo": 2,
        "Select": 4,
        "ChannelVariance": 4,
        "Detail": 2,
        "Shrink": 2,
        "Blend": 2,
        "Bilateral": 2,
        "Normalise": 2,
    }
    assert [one for one in kernels if one.spilled or one.local] == []
    assert all(one.registers for one in kernels)
    if "V13.0." in subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout:
        page = cuda_resources.PAGE.read_text(encoding="utf-8")
        table = page.split(cuda_resources.BEGIN)[1].split(cuda_resources.END)[0].strip().splitlines()
        head, _, *rows = ([cell.strip() for cell in line.split("|")] for line in table)
        column = head.index("sm_90a")
        assert {row[1].strip("`"): row[column] for row in rows} == {one.kernel: str(one.registers) for one in kernels}


@pytest.mark.slow
@needs_nvcc
def test_no_kernel_spills_on_any_architecture_but_one():
    found = cuda_resources.collect(cuda_resources.ARCHITECTURES)
    spilling = {
        (a, one.kernel): one.spilled for a, kernels in found.items() for one in kernels if one.spilled or one.local
    }
    # docs/cuda.md names it
    assert spilling.keys() <= {("sm_100", "SortInTwo<float, 128, 129>")}
    assert sum(spilling.values()) <= 108


def test_a_spilling_kernel_is_detected():
    text = (
        "ptxas info    : Compiling entry function '_ZN4dave8portable9run_blockINS0_7PerturbIfLi4EEEEEvT_' for 'sm_90'\n"
        "    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads\n"
        "ptxas info    : Used 40 registers, used 1 barriers, 64 bytes smem, 8 bytes cmem[2]\n"
    )
    (one,) = cuda_resources.parse(text)
    assert one == cuda_resources.Resources("Perturb<float, 4>", registers=40, spilled=12, local=16, shared=64)
    assert "| 40, 12 B spilled, 16 B local |" in cuda_resources.table({"sm_90a": [one]})


@needs_nvcc
@pytest.mark.parametrize(("source", "count"), [("perturb", 8), ("pull_back", 10), ("shrink", 4)])
def test_nothing_is_fused_where_bits_are_promised(source, count, tmp_path):
    ptx = tmp_path / "kernels.ptx"
    command = ["nvcc", *cuda_resources.FLAGS, "-arch=sm_90a", "-ptx", "-o", ptx, ROOT / "csrc" / f"{source}.cu"]
    subprocess.run(command, check=True, capture_output=True)
    kernels = ptx.read_text().split(".entry")[1:]
    assert len(kernels) == count
    for body in kernels:
        # fused operations would round once where the host rounds twice
        assert "fma" not in body
        assert "mul.rn.f32" in body or "mul.rn.f64" in body


@pytest.fixture
def forgotten() -> Iterator[None]:
    """Clear the caches about the CUDA module before and after the test."""
    caches = [_ext._load_cuda, _registry.BACKENDS["cuda"].unavailable]
    for function in caches:
        function.cache_clear()
    yield
    for function in caches:
        function.cache_clear()


def gpu(monkeypatch: pytest.MonkeyPatch, *, capability: tuple[int, int] = (9, 0), why_not: str = "") -> None:
    """Fake a machine with one GPU and a CUDA module whose `why_not` returns a given reason."""
    monkeypatch.setattr(_ext, "import_module", lambda name: SimpleNamespace(why_not=lambda index: why_not))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: capability)


def assert_unusable(message: str) -> None:
    for op in PIXEL_OPS:
        assert re.search(message, str(_registry.why_not(op, "cuda", "cuda")))
        assert _registry.choose(op, "auto", "cuda") == "torch"
        with pytest.raises(BackendError, match=f"'cuda' was asked for and cannot run '{op}': .*{message}"):
            _registry.choose(op, "cuda", "cuda")


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize(
    ("error", "message"),
    [(ModuleNotFoundError("gone"), "_cuda was not built; .*nvcc"), (ImportError("no symbol"), "no symbol")],
    ids=["not-built", "not-loadable"],
)
def test_without_the_module(monkeypatch, error, message):
    gpu(monkeypatch)

    def fail(name: str) -> None:
        raise error

    monkeypatch.setattr(_ext, "import_module", fail)
    assert_unusable(message)
    with pytest.raises(BackendError, match=message):
        _ext.cuda_module()


@pytest.mark.usefixtures("forgotten")
def test_without_a_gpu(monkeypatch):
    gpu(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert_unusable("finds no CUDA device")


@pytest.mark.usefixtures("forgotten")
def test_with_a_gpu_that_is_too_old(monkeypatch):
    gpu(monkeypatch, capability=(7, 5))
    assert_unusable(r"compute capability 8\.0 or later; cuda:0 \(a card\) has 7\.5")


@pytest.mark.usefixtures("forgotten")
def test_with_a_build_for_other_gpus(monkeypatch):
    gpu(monkeypatch, why_not="cudaErrorNoKernelImageForDevice, no kernel image is available")
    assert_unusable(r"cuda:0 \(a card\): cudaErrorNoKernelImageForDevice")


@pytest.mark.usefixtures("forgotten")
def test_auto_chooses_cuda_kernels_where_usable(monkeypatch):
    gpu(monkeypatch)
    for op in PIXEL_OPS:
        assert _registry.choose(op, "auto", "cuda") == "cuda"
        assert _registry.bind(op, "auto", "cuda").__name__ == f"{op}_cuda"


def test_images_on_the_cpu_are_refused_by_name():
    with pytest.raises(BackendError, match=r"'cuda' was asked for and cannot run 'robust_mean'.*on cuda, not on cpu"):
        robust_mean(torch.zeros(1, 2, 3), backend="cuda")
    with pytest.raises(BackendError, match="'cuda' was asked for"):
        dave_fast.DAVE("demo", device="cpu", backend="cuda")
    with pytest.raises(BackendError, match="on a GPU; got one on cpu"):
        _ext.queue(torch.device("cpu"))


@needs_module
@needs_no_gpu
def test_the_module_loads_without_a_driver_and_names_the_error():
    code = """
import torch
from dave_fast.ops import _ext
from dave_fast.ops.robust_mean import robust_mean
module = _ext.cuda_module()
assert "libcuda.so" not in open("/proc/self/maps").read()
print("why not:", module.why_not(0))
try:
    module.robust_mean(0, 0, (8, 12, 0), 1, 3, 4, (256, 4, 0))
except module.Error as error:
    print("raised:", error)
assert isinstance(module.Error(), RuntimeError)
assert torch.equal(robust_mean(torch.ones(1, 3, 4)), torch.ones(1, 4))
print("unavailable:", _ext.cuda_unavailable())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"why not: cudaError(NoDevice|InsufficientDriver), \w+", done.stdout)
    assert re.search(r"raised: .*: cudaError(NoDevice|InsufficientDriver), \w+", done.stdout)
    assert "unavailable: PyTorch" in done.stdout


def setup_says(*, path: str, **environment: str) -> str:
    """Return what setup.py prints about what it will build."""
    clean = {k: v for k, v in os.environ.items() if k not in ("CUDACXX", "CUDA_PATH")} | {"CUDA_HOME": "/nowhere"}
    done = subprocess.run(
        [sys.executable, "setup.py", "--name"],
        cwd=ROOT,
        env=clean | {"PATH": path} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("choice", ["auto", "1"])
def test_missing_nvcc_is_reported_in_one_line(choice, tmp_path):
    for tool in ("cmake", "c++"):
        (tmp_path / tool).symlink_to(shutil.which(tool) or pytest.skip(f"no {tool}"))
    line = "dave-fast: no nvcc: installing without the CUDA kernels"
    assert setup_says(path=str(tmp_path), DAVE_FAST_BUILD_EXT=choice).count(line) == 1
    assert line not in setup_says(path=str(tmp_path), DAVE_FAST_BUILD_EXT="0")
    nvcc = tmp_path / "toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.touch(mode=0o755)
    assert line not in setup_says(path=str(tmp_path), CUDA_HOME=str(tmp_path / "toolkit"))
    assert line not in setup_says(path=str(tmp_path), CUDACXX=str(nvcc))


@pytest.mark.usefixtures("serial_cuda_kernels")
def test_small_tiles_give_the_result_of_large_ones(monkeypatch):
    images = image_batch(3, 24, 40, torch.float32)
    draws = draw(6, height=24, width=40, image_keys=[1, 2])
    tokens = patchify(image_batch(3, 24, 40, torch.float32, count=12), 8)
    whole = tiled.pull_back_mean_cuda(tokens, images, draws, 8, 6)
    variance = tiled.pull_back_mean_variance_cuda(tokens, images, draws, 8, 6)[1]
    spread = spread_mean_variance_cuda(tokens[..., 0], draws, (24, 40), 8, 6)
    sizes = []
    given = _ext.cuda_module()
    # 960 pixels: seven tiles of the smallest size and a half
    monkeypatch.setattr(tiled, "SCRATCH_BYTES", 1)
    module = SimpleNamespace(
        pull_back_mean=lambda *sent: (sizes.append(sent[-3]), given.pull_back_mean(*sent)),
        pull_back_mean_variance=lambda *sent: (sizes.append(sent[-4]), given.pull_back_mean_variance(*sent)),
        spread_mean_variance=lambda *sent: (sizes.append(sent[-4]), given.spread_mean_variance(*sent)),
    )
    monkeypatch.setattr(_ext, "cuda_module", lambda: module)
    assert torch.equal(tiled.pull_back_mean_cuda(tokens, images, draws, 8, 6), whole)
    again = tiled.pull_back_mean_variance_cuda(tokens, images, draws, 8, 6)
    assert torch.equal(again[0], whole) and torch.equal(again[1], variance)
    again = spread_mean_variance_cuda(tokens[..., 0], draws, (24, 40), 8, 6)
    assert torch.equal(again[0], spread[0]) and torch.equal(again[1], spread[1])
    assert sizes == [tiled.SMALLEST_TILE] * 3


@pytest.mark.usefixtures("serial_cuda_kernels")
def test_rows_of_no_image_are_nan_and_read_nothing():
    """The host does not read draws on a device, so that a wrong image index must be found by the kernel."""
    images = image_batch(3, 8, 12, torch.float32)
    draws = draw(2, height=8, width=12, image_keys=[1, 2])
    wrong = dataclasses.replace(draws, image_index=torch.tensor([0, -1, 1, 2]))
    tokens = perturb_cuda(images, wrong, 4)
    right = perturb_cuda(images, draws, 4)
    assert tokens.isnan().all(dim=(1, 2)).tolist() == [False, True, False, True]
    assert torch.equal(tokens[[0, 2]], right[[0, 2]])
    contributions = pull_back_cuda(right, images, wrong, 4)
    assert contributions.isnan().all(dim=(1, 2, 3)).tolist() == [False, True, False, True]


@pytest.mark.usefixtures("serial_cuda_kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("samples", [300, 513])
def test_selection_beyond_the_networks(dtype, samples):
    generator = torch.Generator().manual_seed(samples)
    values = (torch.randn(2, samples, 9, generator=generator, dtype=torch.float64) ** 3).to(dtype)
    values[:, :, 0] = values[:, :, 0].round()
    values[0, 4, 1], values[0, 5, 2] = torch.nan, -torch.nan
    values[1, :3, 3], values[1, :7, 4] = torch.inf, -torch.inf
    found, expected = robust_mean(values, backend="cuda"), robust_mean_ref(values)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())


@pytest.mark.usefixtures("serial_cuda_kernels")
def test_more_channels_than_share_a_weight():
    images = image_batch(9, 8, 12, torch.float64)
    draws = draw(3, height=8, width=12, image_keys=[1, 2])
    tokens = patchify(image_batch(9, 8, 12, torch.float64, count=6), 4)
    torch.testing.assert_close(
        pull_back_cuda(tokens, images, draws, 4), pull_back_ref(tokens, images, draws, 4), rtol=1e-12, atol=1e-14
    )


@pytest.mark.usefixtures("serial_cuda_kernels")
def test_the_whole_method_runs_on_cuda_kernels():
    """The CUDA kernels' bodies give the raw attribution of the host's kernels to the bit, and its map to rounding."""
    images = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    found, expected = (
        dave_fast.DAVE("demo", device="cpu", precision="fp32", backend=name).explain(images, 3, 3)
        for name in ("cuda", "auto")
    )
    assert torch.equal(found.raw, expected.raw)
    torch.testing.assert_close(found.maps, expected.maps, rtol=0, atol=1e-6)
