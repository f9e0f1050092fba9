"""Build the native core and the CUDA kernels with CMake; everything else is in pyproject.toml.

DAVE_FAST_BUILD_EXT=auto (default) builds the core where there are CMake and a C++ compiler, and the CUDA kernels where
there is nvcc too; one line says what is left out and why. 1 makes any failure fatal, 0 builds nothing. CUDAARCHS names
other CUDA architectures than those of CMakeLists.txt: "90a-real" alone builds in a fifth of the time.

The two modules are configured and built separately, so that a failing CUDA toolkit does not affect the core.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
VARIABLE = "DAVE_FAST_BUILD_EXT"


class CMakeExtension(Extension):
    """An extension that CMake builds from CMakeLists.txt.

    Args:
        name: of the module.
        what: subject and verb of the message where it is not built.
        options: for CMake.
        optional: whether a failure is a warning.
    """

    def __init__(self, name: str, *, what: str, options: tuple[str, ...] = (), optional: bool) -> None:
        super().__init__(name, sources=[], optional=optional)
        self.what, self.options = what, options


class CMakeBuild(build_ext):
    """The command that builds with CMake and puts the module where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        """Build one extension; raise CompileError where that fails."""
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        module = ext.name.rsplit(".", 1)[-1]
        try:
            self.configure_and_build(Path(self.build_temp).resolve() / module, target.parent, module, ext.options)
        except (OSError, subprocess.CalledProcessError) as error:
            # The only error that setuptools turns into a warning where the extension is optional.
            raise CompileError(f"{ext.what} not built ({error}); {VARIABLE}=0 asks for pure Python") from error

    def configure_and_build(self, build: Path, output: Path, module: str, more: tuple[str, ...]) -> None:
        """Run CMake for one module.

        Args:
            build: CMake's build folder.
            output: the folder of the module.
            module: the target.
            more: further options.
        """
        import pybind11

        options = [
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            *more,
        ]
        if shutil.which("ninja") and not (build / "CMakeCache.txt").exists():
            options += ["-G", "Ninja"]
        subprocess.run(["cmake", "-S", str(ROOT), "-B", str(build), *options], check=True)
        jobs = ["--parallel", str(self.parallel or os.cpu_count() or 1)]
        subprocess.run(["cmake", "--build", str(build), "--target", module, *jobs], check=True)


def extensions() -> list[Extension]:
    """Return the extensions to build, as DAVE_FAST_BUILD_EXT and this machine's tools decide."""
    choice = os.environ.get(VARIABLE, "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"{VARIABLE} must be auto, 1 or 0; it is {choice!r}")
    if choice == "0":
        return []
    compilers = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    missing = [
        name
        for name, found in (("CMake", shutil.which("cmake")), ("a C++ compiler", any(map(shutil.which, compilers))))
        if not found
    ]
    if missing and choice == "auto":
        print(
            f"dave-fast: no {' and no '.join(missing)}: installing without the native core, in pure Python",
            file=sys.stderr,
        )
        return []
    optional = choice == "auto"
    core = CMakeExtension("dave_fast._native", what="the native core was", optional=optional)
    nvcc = find_nvcc()
    if nvcc is None:
        print("dave-fast: no nvcc: installing without the CUDA kernels", file=sys.stderr)
        return [core]
    options = ("-DDAVE_FAST_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}")
    return [core, CMakeExtension("dave_fast._cuda", what="the CUDA kernels were", options=options, optional=optional)]


def find_nvcc() -> str | None:
    """Return nvcc: $CUDACXX, else that on PATH, else that of CUDA_HOME or of the installer's default folder."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    named = [os.environ.get("CUDACXX"), "nvcc", f"{home}/bin/nvcc"]
    return next((found for name in named if name and (found := shutil.which(name))), None)


setup(
    packages=[*find_packages(include=["dave_fast", "dave_fast.*"]), "dave_fast.kernels"],
    package_dir={"dave_fast.kernels": "kernels"},
    package_data={
        "dave_fast": ["py.typed"],
        "dave_fast.evaluate": ["page.html"],
        "dave_fast.models.demo": ["*.npz", "*.safetensors", "*.md"],
        "dave_fast.run.export": ["*.html", "*.css", "*.js"],
        "dave_fast.serve.page": ["*.html", "*.css", "*.js"],
    },
    ext_modules=extensions(),
    cmdclass={"build_ext": CMakeBuild},
)
