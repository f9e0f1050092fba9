"""Compile ViT-B/16's Triton kernels without a GPU, for the cache of a GPU machine with the same version of Triton.

    python -m benchmarks.gpu.precompile FOLDER [--candidates] [--arch 90]

Both walks run on the stand-in GPU of tests/fake_gpu.py with the micro-batches that scripts/gpu measures. The cache has
only cubins and their metadata. --candidates adds the candidates of tuning in bf16.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import triton

from benchmarks.gpu.build import adopt
from dave_fast.bench.shapes import build_model
from dave_fast.kernels import _launch
from tests.fake_gpu import build, fake_gpu, walk

MODEL = "vit_base_patch16_224"
PRECISIONS = ("bf16", "fp8", "fp32")
# 1 and 8 for unperturbed images; numbers that 16 divides are specialised by Triton
ROWS = (28, 112, 1, 8, 14, 50, 56)
# precisions and rows of the stage "tune"
TUNED = {("bf16", 28), ("bf16", 112)}
# keys of a kernel's metadata that only the stand-in writes
OWN_KEYS = ("ptx", "ptxas_log")


def compile_all(folder: Path, arch: int, *, candidates: bool) -> int:
    """Compile the kernels into a new folder; return their number."""
    with tempfile.TemporaryDirectory() as whole, fake_gpu(arch) as launches:
        triton.knobs.cache.dir = whole
        model = build_model(MODEL)
        for precision in PRECISIONS:
            engine = build(model, precision)
            for rows in ROWS:
                choose = _every if candidates and (precision, rows) in TUNED else _first
                with mock.patch.object(_launch, "_choose", choose), mock.patch.object(_launch, "_taken", {}):
                    walk(engine, rows)
                print(f"{precision}, {rows} rows: {len(list(Path(whole).iterdir()))} in all", flush=True)
        assert launches
        shutil.rmtree(folder, ignore_errors=True)
        for metadata in Path(whole).glob("*/*_kernel.json"):
            if not metadata.name.startswith("__grp__"):
                known = json.loads(metadata.read_text())
                metadata.write_text(json.dumps({key: value for key, value in known.items() if key not in OWN_KEYS}))
        adopt(Path(whole), folder)
    return len(list(folder.glob("*/*.cubin")))


def _first(problem: str, rows: int, device: Any, candidates: Sequence[Any], trial: Callable[[Any], Any]) -> Any:
    return candidates[0]


def _every(problem: str, rows: int, device: Any, candidates: Sequence[Any], trial: Callable[[Any], Any]) -> Any:
    """Compile the candidates of tuning; those without room on the device are left out there, too."""
    for each in candidates:
        if isinstance(each, triton.Config):
            with suppress(triton.runtime.errors.OutOfResources):
                trial(each)
    return candidates[0]


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("folder", type=Path, help="emptied beforehand")
    made.add_argument("--candidates", action="store_true", help="also what tuning tries")
    made.add_argument("--arch", type=int, default=90, choices=(80, 90, 100))
    return made


if __name__ == "__main__":
    args = parser().parse_args()
    print(f"{compile_all(args.folder, args.arch, candidates=args.candidates)} kernels")
