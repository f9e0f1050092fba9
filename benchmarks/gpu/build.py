"""The native modules on a GPU machine: those that travelled along where they fit, else a build.

    python -m benchmarks.gpu.build                install the tree, with prebuilt/ or by compiling
    python -m benchmarks.gpu.build --prebuilt     compile into prebuilt/, for a machine with the same versions

prebuilt/ holds the two modules, the program that compute-sanitizer watches, the SHA-256 of the sources they were made
of, and a folder "cache" with what Triton compiled (`benchmarks.gpu.precompile`). What was made of other sources, or
does not import, is not used, and a line says so. Standard library alone: nothing is installed yet.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PREBUILT = ROOT / "prebuilt"
SMOKE = "cuda_smoke"
# what Triton compiled, and what tuning chose; the largest file that a GPU machine may give back, with room to spare
CACHES, MOST_BYTES = ("triton", "choices"), 15 << 20
# of what Triton keeps of a kernel, what no launch needs
SUFFIXES = (".source", ".ttir", ".ttgir", ".llir", ".ptx")
INTERMEDIATE = tuple(f"*{suffix}" for suffix in SUFFIXES)


def sources() -> str:
    """Return the SHA-256 of everything that the modules are compiled from."""
    paths = [ROOT / "CMakeLists.txt", *sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())]
    digest = hashlib.sha256()
    for path in paths:
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def why_not_prebuilt(folder: Path = PREBUILT) -> str | None:
    """Return why the prebuilt modules cannot be used; None where they can."""
    if not folder.is_dir():
        return "nothing prebuilt travelled along"
    made_of = folder / "sources"
    if not made_of.exists() or made_of.read_text().strip() != sources():
        return f"{folder} was made of other sources"
    # torch's OpenMP first, as the package loads them
    code = f"import sys, torch; sys.path.insert(0, {str(folder)!r}); import _native, _cuda"
    tried = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return None if tried.returncode == 0 else (tried.stderr.strip().splitlines() or ["it does not import"])[-1]


def smoke(work: Path) -> list[list[str]]:
    """Return the commands that leave the program for compute-sanitizer at `work`/cuda_smoke."""
    if why_not_prebuilt() is None and (PREBUILT / SMOKE).exists():
        return [["cp", str(PREBUILT / SMOKE), str(work / SMOKE)]]
    build = str(work / "smoke")
    pybind11 = subprocess.run(
        [sys.executable, "-m", "pybind11", "--cmakedir"], capture_output=True, text=True, check=False
    ).stdout.strip()
    options = ["-DDAVE_FAST_CUDA=ON", "-DCMAKE_BUILD_TYPE=Release", f"-DPython_EXECUTABLE={sys.executable}"]
    options.append(f"-Dpybind11_DIR={pybind11}")
    return [
        ["cmake", "-S", str(ROOT), "-B", build, "-G", "Ninja", *options],
        ["cmake", "--build", build, "--target", SMOKE, "--parallel"],
        ["cp", f"{build}/{SMOKE}", str(work / SMOKE)],
    ]


def adopt(source: Path, target: Path) -> None:
    """Copy a cache of Triton's, the launchable part of it: it names its files by their absolute paths."""
    shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*INTERMEDIATE))
    for group in target.glob("*/__grp__*.json"):
        paths = {name: group.parent / name for name in json.loads(group.read_text())["child_paths"]}
        kept = {name: str(path) for name, path in paths.items() if path.exists()}
        group.write_text(json.dumps({"child_paths": kept}))


def adopt_caches(cache: Path) -> None:
    """Copy what travelled along in prebuilt/cache into the cache of this machine."""
    for name in CACHES:
        if (PREBUILT / "cache" / name).is_dir():
            adopt(PREBUILT / "cache" / name, cache / name)


def keep_caches(cache: Path, archive: Path) -> str:
    """Pack the caches, to be unpacked into prebuilt/cache for the next machine; return what became of it."""
    with tarfile.open(archive, "w:gz") as packed:
        for name in CACHES:
            if (cache / name).is_dir():
                packed.add(cache / name, name, filter=lambda each: None if each.name.endswith(SUFFIXES) else each)
    size = archive.stat().st_size
    if size > MOST_BYTES:
        archive.unlink()
    return f"{archive.name}: {size / 2**20:.1f} MiB" + (", too large to be kept" if size > MOST_BYTES else "")


def install() -> int:
    """Install the tree, editable; return the exit code of pip."""
    reason = why_not_prebuilt()
    print("building:" if reason else f"taking the modules of {PREBUILT}", reason or "", flush=True)
    if reason is None:
        for module in PREBUILT.glob("_*.so"):
            shutil.copy2(module, ROOT / "dave_fast")
    # whatever fails to compile, the rest is installed: the stage's rows then say what is missing
    environment = os.environ | {"DAVE_FAST_BUILD_EXT": "auto" if reason else "0", "PIP_BREAK_SYSTEM_PACKAGES": "1"}
    command = [sys.executable, "-m", "pip", "install", "-v", "--no-deps", "--no-build-isolation", "-e", str(ROOT)]
    return subprocess.run(command, env=environment, check=False).returncode


def prebuild(more: list[str]) -> int:
    """Compile into prebuilt/; return 0, or raise CalledProcessError. more: options of `benchmarks.gpu.precompile`."""
    work = ROOT / "build" / "prebuild"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    PREBUILT.mkdir(exist_ok=True)
    environment = {"CUDAARCHS": "90a-real"} | os.environ | {"DAVE_FAST_BUILD_EXT": "1"}
    # setup.py knows how to build; the modules are left in a folder of their own
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(work / "lib"), "--build-temp", str(work)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    for made in smoke(work):
        subprocess.run(made, cwd=ROOT, env=environment, check=True)
    for path in [*(work / "lib" / "dave_fast").glob("_*.so"), work / SMOKE]:
        shutil.copy2(path, PREBUILT)
    (PREBUILT / "sources").write_text(sources() + "\n")
    kernels = [sys.executable, "-m", "benchmarks.gpu.precompile", str(PREBUILT / "cache" / "triton"), *more]
    subprocess.run(kernels, cwd=ROOT, check=True)
    print(f"{PREBUILT}: {why_not_prebuilt() or 'imports here'}")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prebuilt", action="store_true", help="compile into prebuilt/")
    parser.add_argument("--candidates", action="store_true", help="also the kernels that tuning tries")
    args = parser.parse_args()
    sys.exit(prebuild(["--candidates"] * args.candidates) if args.prebuilt else install())
