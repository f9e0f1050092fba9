"""Compile ViT-B/16's Triton kernels without a GPU, for the cache of a GPU machine with the same version of Triton.

    python -m benchmarks.gpu.precompile FOLDER [--candidates] [--arch 90]

Both walks run behind the stand-in GPU of tests/fake_gpu.py at the micro-batches that scripts/gpu measures. Only what is
launched is kept: cubins and their metadata. --candidates adds what tuning tries in bf16.
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
# one row and eight: the images themselves; numbers that 16 divides have forms of their own
ROWS = (28, 112, 1, 8, 14, 50, 56)
# what the stage "tune" tries
TUNED = {("bf16", 28), ("bf16", 112)}
# what only the stand-in writes into a kernel's metadata
OWN_KEYS = ("ptx", "ptxas_log")


def compile_all(folder: Path, arch: int, *, candidates: bool) -> int:
    """Fill a new folder; return the number of kernels."""
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
    """Compile what tuning would time; what the device has no room for is no candidate there either."""
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
