"""The native modules on a GPU machine: prebuilt ones if they fit, otherwise compiled there.

    python -m benchmarks.gpu.build                install the tree, with prebuilt/ or by compiling
    python -m benchmarks.gpu.build --prebuilt     compile into prebuilt/, for a machine with the same versions

prebuilt/ has the two modules, the program for compute-sanitizer, the SHA-256 of their sources, their architectures, and
a folder "cache" with kernels that Triton compiled (`benchmarks.gpu.precompile`). Modules of other sources or for
another GPU, or that cannot be imported, are not used, and a line reports it. This module needs only the standard
library, because it runs before anything is installed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PREBUILT = ROOT / "prebuilt"
SMOKE = "cuda_smoke"
# folders of Triton's cache for dave-fast and for the peers, and of the choices of tuning
TRITON, PEERS, CHOICES = "triton", "peers", "choices"
# the largest archive to return from a GPU machine, and the share of it to aim for, since sizes are estimates
MOST_BYTES, AIM = 15 << 20, 0.95
# suffixes of files in Triton's cache that no launch needs
SUFFIXES = (".source", ".ttir", ".ttgir", ".llir", ".ptx")
INTERMEDIATE = tuple(f"*{suffix}" for suffix in SUFFIXES)
# imports the modules and prints the device's compute capability
IMPORTS = """
import sys, torch
sys.path.insert(0, {folder!r})
import _native, _cuda
print("%d%d" % torch.cuda.get_device_capability() if torch.cuda.is_available() else "")
"""


def sources() -> str:
    """Return the SHA-256 of the modules' sources."""
    paths = [ROOT / "CMakeLists.txt", *sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())]
    digest = hashlib.sha256()
    for path in paths:
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


@cache
def why_not_prebuilt(folder: Path = PREBUILT) -> str | None:
    """Return why the prebuilt modules cannot be used, or None; cached."""
    if not folder.is_dir():
        return "nothing prebuilt travelled along"
    made_of = folder / "sources"
    if not made_of.exists() or made_of.read_text().strip() != sources():
        return f"{folder} was made of other sources"
    # torch's OpenMP first, as the package loads them
    tried = subprocess.run(
        [sys.executable, "-c", IMPORTS.format(folder=str(folder))], capture_output=True, text=True, check=False
    )
    if tried.returncode != 0:
        return (tried.stderr.strip().splitlines() or ["it does not import"])[-1]
    made_for = folder / "architectures"
    return why_not_for(made_for.read_text().strip() if made_for.exists() else "", tried.stdout.strip())


def why_not_for(architectures: str, device: str) -> str | None:
    """Return why modules cannot be used on a device, or None.

    Args:
        architectures: that they were made for, as $CUDAARCHS names them: "80;90a-real".
        device: compute capability of the device, "90"; "" where there is none, which anything fits.
    """
    numbers = re.findall(r"\d+", architectures)
    if not device or device in numbers:
        return None
    made_for = " and ".join(f"sm_{number}" for number in numbers) or "an unknown architecture"
    return f"made for {made_for}, not for sm_{device}"


def smoke(work: Path) -> list[list[str]]:
    """Return the commands that put the program for compute-sanitizer at `work`/cuda_smoke."""
    if why_not_prebuilt() is None and (PREBUILT / SMOKE).exists():
        return [["cp", str(PREBUILT / SMOKE), str(work / SMOKE)]]
    return compile_smoke(work)


def compile_smoke(work: Path) -> list[list[str]]:
    """Return the commands that compile the program for compute-sanitizer."""
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
    """Copy missing kernels into a cache of Triton's, only files for launches, with the paths of the new folder."""

    def copy(new: str, old: str) -> None:
        if not Path(old).exists():
            shutil.copy2(new, old)

    ignored = shutil.ignore_patterns(*INTERMEDIATE)
    shutil.copytree(source, target, dirs_exist_ok=True, ignore=ignored, copy_function=copy)
    for group in target.glob("*/__grp__*.json"):
        paths = {name: group.parent / name for name in json.loads(group.read_text())["child_paths"]}
        kept = {name: str(path) for name, path in paths.items() if path.exists()}
        group.write_text(json.dumps({"child_paths": kept}))


def adopt_caches(cache: Path) -> None:
    """Copy the files of prebuilt/cache that are not in the cache of this machine."""
    for name in (CHOICES, TRITON):
        if (PREBUILT / "cache" / name).is_dir():
            adopt(PREBUILT / "cache" / name, cache / name)


def choices_of(cache: Path) -> list[Path]:
    """Return the files of the choices of tuning."""
    return sorted((cache / CHOICES).glob("choices-*.json"))


def keep_choices(cache: Path, out: Path) -> None:
    """Copy the choices of tuning into the results."""
    for path in choices_of(cache):
        shutil.copy2(path, out)


def keep_caches(cache: Path, archive: Path) -> str:
    """Pack the caches, to be unpacked into prebuilt/cache on the next machine; return a note for the table.

    What tuning chose comes first. Of the kernels the largest are left out, as many as the archive has no room for.
    """
    kernels = {path: _bytes(path) for path in (cache / TRITON).glob("*") if path.is_dir()}
    smallest = sorted(kernels, key=kernels.__getitem__)
    choices = choices_of(cache)
    while (size := _pack(cache, archive, [*choices, *smallest])) > MOST_BYTES and smallest:
        # what is packed shrinks about as what is read
        room = AIM * MOST_BYTES / size * sum(map(kernels.__getitem__, smallest))
        smallest.pop()
        while smallest and sum(map(kernels.__getitem__, smallest)) > room:
            smallest.pop()
    left_out = len(kernels) - len(smallest)
    note = f"{archive.name}: {size / 2**20:.1f} MiB, {len(choices)} files of choices, {len(smallest)} kernels"
    return note + (f"; the {left_out} largest had no room" if left_out else "")


def _pack(cache: Path, archive: Path, paths: list[Path]) -> int:
    """Write the archive of these files and folders; return its size."""
    with tarfile.open(archive, "w:gz", compresslevel=6) as packed:
        for path in paths:
            name = str(path.relative_to(cache))
            packed.add(path, name, filter=lambda each: None if each.name.endswith(SUFFIXES) else each)
    return archive.stat().st_size


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if not path.name.endswith(SUFFIXES))


def install() -> int:
    """Install the tree in editable mode; return the exit code of pip."""
    reason = why_not_prebuilt()
    print("building:" if reason else f"taking the modules of {PREBUILT}", reason or "", flush=True)
    if reason is None:
        for module in PREBUILT.glob("_*.so"):
            shutil.copy2(module, ROOT / "dave_fast")
    # a module that fails to compile does not stop the installation; the stage's rows report it
    environment = os.environ | {"DAVE_FAST_BUILD_EXT": "auto" if reason else "0", "PIP_BREAK_SYSTEM_PACKAGES": "1"}
    command = [sys.executable, "-m", "pip", "install", "-v", "--no-deps", "--no-build-isolation", "-e", str(ROOT)]
    return subprocess.run(command, env=environment, check=False).returncode


def prebuild(more: list[str]) -> int:
    """Compile into prebuilt/ with options of `benchmarks.gpu.precompile` and return 0; may raise CalledProcessError."""
    work = ROOT / "build" / "prebuild"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    PREBUILT.mkdir(exist_ok=True)
    environment = {"CUDAARCHS": "90a-real"} | os.environ | {"DAVE_FAST_BUILD_EXT": "1"}
    # built by setup.py into a separate folder
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(work / "lib"), "--build-temp", str(work)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    for made in compile_smoke(work):
        subprocess.run(made, cwd=ROOT, env=environment, check=True)
    for path in [*(work / "lib" / "dave_fast").glob("_*.so"), work / SMOKE]:
        shutil.copy2(path, PREBUILT)
    (PREBUILT / "sources").write_text(sources() + "\n")
    (PREBUILT / "architectures").write_text(environment["CUDAARCHS"] + "\n")
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
