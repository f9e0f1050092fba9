"""Test the build: sanitizer builds of the kernels; and, slow, wheels with and without the extension and the sdist,
installed and run outside of the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.smoke import check_smoke

ROOT = Path(__file__).resolve().parents[2]
TRACKED = (
    *("csrc", "dave_fast", "kernels", "CMakeLists.txt", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in"),
    *("README.md", "pyproject.toml", "setup.py"),
)
DEMO = (
    "dave_fast/models/demo/weights.safetensors",
    "dave_fast/models/demo/digits.npz",
    "dave_fast/models/demo/CARD.md",
)

needs_compiler = pytest.mark.skipif(
    not shutil.which("c++") or not shutil.which("cmake"), reason="no C++ compiler or CMake"
)


def run(*command: object, cwd: Path | None = None, **environment: str) -> str:
    """Return what a command printed; where it fails, fail with its output."""
    everything = os.environ | environment
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=everything, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@needs_compiler
def test_the_kernels_of_every_instruction_set_run_under_sanitizers(tmp_path):
    out = run(ROOT / "scripts" / "sanitize", tmp_path, PYTHON=sys.executable)
    check_smoke(out, "baseline")
    assert "cuda smoke test passed" in out and "fuzz passed" in out


@pytest.mark.slow
@needs_compiler
def test_many_operands_that_do_not_fit_under_sanitizers(tmp_path):
    out = run(ROOT / "scripts" / "sanitize", tmp_path, PYTHON=sys.executable, DAVE_FAST_FUZZ="20000")
    assert "fuzz passed" in out


@pytest.fixture
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of what is packaged, so that builds neither change the working tree nor see each other's files."""
    copy = tmp_path_factory.mktemp("source")
    for name in TRACKED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, copy / name)
    return copy


def wheel_of(source: Path, to: Path, choice: str, **environment: str) -> tuple[Path, set[str], str]:
    pip = (sys.executable, "-m", "pip", "wheel", "--verbose", "--no-deps", "--no-build-isolation", "-w", to, source)
    # one GPU architecture: all of them would take minutes and show no more
    out = run(*pip, DAVE_FAST_BUILD_EXT=choice, CUDAARCHS="90a-real", **environment)
    (wheel,) = to.glob("*.whl")
    return wheel, set(zipfile.ZipFile(wheel).namelist()), out


def assert_no_more_than_the_package(wheel: Path, names: set[str]) -> None:
    """Fail unless an archive has the package and its metadata alone, with the README as the description."""
    (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
    assert {name.split("/")[0] for name in names} == {"dave_fast", metadata.split("/")[0]}
    readme = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()[0]
    assert readme in zipfile.ZipFile(wheel).read(metadata).decode()


def assert_it_explains(archive: Path, tmp_path: Path, *, native: bool) -> None:
    """Install an archive in an environment of its own, and run the demo there, outside of the checkout."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # this environment's packages, by a path alone: files in it that would add the checkout are not run
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = (sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--no-build-isolation", "--target", site)
    run(*pip, archive, DAVE_FAST_BUILD_EXT="1" if native else "0", CUDAARCHS="90a-real")
    away = tmp_path / "away"
    away.mkdir()
    # neither the checkout on a path nor a choice for this session's own tests
    clean = {"PYTHONPATH": "", "DAVE_FAST_ISA": ""}
    found = run(
        python, "-c", "from dave_fast.ops import _ext; print(_ext.__file__, _ext.isa())", cwd=away, **clean
    ).split()
    assert Path(found[0]).is_relative_to(site)
    assert (found[1] != "None") == native
    assert "dave-fast" in run(python, "-m", "dave_fast", "info", cwd=away, **clean)
    few = ("--n-samples", "2", "--device", "cpu")
    run(python, "-m", "dave_fast", "explain", "--demo", *few, "--out", "maps", cwd=away, **clean)
    written = sorted(path.name for path in (away / "maps").iterdir())
    assert any(name.endswith(".figure.png") for name in written)
    for ending in (".overlay.png", ".map.png", ".npz"):
        assert sum(name.endswith(ending) for name in written) == 2, written
    assert all(path.stat().st_size for path in (away / "maps").iterdir())


@pytest.mark.slow
def test_a_wheel_of_pure_python(source, tmp_path):
    wheel, names, _ = wheel_of(source, tmp_path, "0")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not any(name.endswith(".so") for name in names)
    assert {"dave_fast/kernels/__init__.py", "dave_fast/py.typed", *DEMO} <= names
    assert_no_more_than_the_package(wheel, names)
    assert_it_explains(wheel, tmp_path, native=False)


@pytest.mark.slow
@needs_compiler
def test_a_wheel_with_the_extension(source, tmp_path):
    wheel, names, _ = wheel_of(source, tmp_path, "1")
    assert "none-any" not in wheel.name
    assert any(name.startswith("dave_fast/_native") for name in names)
    assert any(name.startswith("dave_fast/_cuda") for name in names) == bool(shutil.which("nvcc"))
    assert set(DEMO) <= names
    assert_no_more_than_the_package(wheel, names)
    assert_it_explains(wheel, tmp_path, native=True)


@pytest.mark.slow
def test_a_compiler_that_fails_is_forgiven_by_auto_alone(source, tmp_path):
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    _, names, out = wheel_of(source, tmp_path / "wheel", "auto", CXX=str(broken))
    assert not any(name.endswith(".so") for name in names)
    assert "the native core was not built" in out
    with pytest.raises(AssertionError, match="the native core was not built"):
        wheel_of(source, tmp_path / "fatal", "1", CXX=str(broken))


@pytest.mark.slow
@needs_compiler
def test_a_cuda_toolkit_that_fails_leaves_the_core_whole(source, tmp_path):
    broken = tmp_path / "nvcc"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    _, names, out = wheel_of(source, tmp_path / "wheel", "auto", CUDACXX=str(broken))
    assert any(name.startswith("dave_fast/_native") for name in names)
    assert not any(name.startswith("dave_fast/_cuda") for name in names)
    assert "the CUDA kernels were not built" in out
    with pytest.raises(AssertionError, match="the CUDA kernels were not built"):
        wheel_of(source, tmp_path / "fatal", "1", CUDACXX=str(broken))


@pytest.mark.slow
def test_the_sdist_holds_what_a_build_needs(source, tmp_path):
    code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {
        "csrc/perturb.h",
        "csrc/bindings.cpp",
        "csrc/robust_mean.cu",
        "csrc/robust_mean.cuh",
        "CMakeLists.txt",
        "setup.py",
        "kernels/__init__.py",
        "LICENSE",
        "README.md",
        *DEMO,
    } <= names
    assert not any(name.endswith((".so", ".pyc")) for name in names)
    assert_it_explains(sdist, tmp_path, native=bool(shutil.which("c++") and shutil.which("cmake")))
