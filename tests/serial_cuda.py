"""dave_fast._cuda with its kernels run block by block and thread by thread on the host: built once, for tests."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "serial_cuda"


def missing() -> str | None:
    """Return why the module cannot be built, or None."""
    tools = [name for name in ("cmake", "c++") if not shutil.which(name)]
    return f"no {' and no '.join(tools)}" if tools else None


@cache
def load() -> ModuleType:
    """Return the module; raise RuntimeError with the compiler's output if it does not compile."""
    import pybind11

    BUILD.mkdir(parents=True, exist_ok=True)
    # of the processes of a parallel test run one builds, and the others wait for it
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        options = ["-DDAVE_FAST_SERIAL=ON", f"-DPython_EXECUTABLE={sys.executable}"]
        options += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", *(["-GNinja"] if shutil.which("ninja") else [])]
        for command in (
            ["cmake", "-S", ROOT, "-B", BUILD / "cmake", *options],
            ["cmake", "--build", BUILD / "cmake", "--parallel", "2", "--target", "_cuda"],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(done.stdout + done.stderr)
    (path,) = (file for file in (BUILD / "cmake").glob("_cuda*") if file.name.endswith(tuple(EXTENSION_SUFFIXES)))
    spec = spec_from_file_location("_cuda", path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
