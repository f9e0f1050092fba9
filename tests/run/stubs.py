"""Make runs without a model: a stub mapper that workers can import, and a program that a test can kill.

`python -m tests.run.stubs PLACE OUT SETTINGS(JSON)` makes a run with `Stub`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from dave_fast.errors import DaveFastError, InputError
from dave_fast.images import decode_image
from dave_fast.models.labels import Labels
from dave_fast.run.contents import read_content
from dave_fast.run.local import Machine
from dave_fast.run.mapper import Mapper, MapSettings, _record_columns, packed_map
from dave_fast.run.records import Record, image_key
from dave_fast.run.runner import run_dataset

SIDE = 8
PARENT = "DAVE_FAST_TEST_PARENT"


def expected_map(record_id: str, seed: int = 0) -> np.ndarray:
    """Return the stub's map of a record: random numbers (SIDE, SIDE) float32 that depend on its id and seed alone."""
    return np.random.default_rng([image_key(record_id), seed]).random((SIDE, SIDE), np.float32)


class Stub(Mapper):
    """A mapper that takes a fixed time an image and makes the maps of `expected_map`.

    Args:
        settings: the settings of the maps.
        device: any text.
        seconds: seconds an image.
        decode: "bytes" to leave images encoded, else they are decoded.
        fault: (name, number of images or commits before it, and for "die-once" a file that is made), or None.
    """

    def __init__(
        self,
        settings: MapSettings,
        device: str | None,
        *,
        seconds: float = 0.0,
        decode: str = "bytes",
        fault: Any = None,
    ) -> None:
        self.settings, self.device, self.seconds, self._decode = settings, device or "stub", seconds, decode
        self.notes: list[str] = []
        self.target = None
        self.weights = "stub"
        self.prepare = SimpleNamespace(size=(SIDE, SIDE), normalised=lambda crop: crop)  # type: ignore[assignment]
        self.batch_size = settings.batch_size or 4
        self.labels = Labels(10)
        self.fault = fault
        self.images = 0
        if fault and fault[0].startswith("commit:"):
            kill_at_commit(fault[0].partition(":")[2], fault[1])
        if fault and fault[0].startswith("disk:"):
            fill_disk(fault[0].partition(":")[2], fault[1])
        if fault and fault[0] == "load":
            raise InputError("no such model")

    @property
    def configuration(self) -> dict[str, Any]:
        """A configuration with the fields of a model's."""
        settings = self.settings
        size = {"input_size": (3, SIDE, SIDE), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic"}
        size |= {"crop_pct": 1.0, "crop_mode": "center"}
        return {
            "model": "stub",
            "n_samples": settings.n_samples,
            "seed": settings.seed,
            "precision": "fp32",
            "shrink": settings.options.get("shrink", True),
            "depth": settings.depth,
            "preprocessing": size,
            "classes": 10,
            "map_dtype": settings.map_dtype,
            "raw": settings.raw,
            "outputs": settings.outputs,
        }

    @property
    def input_bytes(self) -> int:
        """Bytes of an input of 224×224 pixels."""
        return 4 * 3 * 224 * 224

    def decode(self, record: Record) -> Any:
        """Return a record's image, encoded or decoded."""
        if self.fault and self.fault[0] == "slow" and record.uri.startswith("slow:"):
            threading.Event().wait()
        content = read_content(record, self.settings.limits)
        return content if self._decode == "bytes" else decode_image(content, record.uri)

    def explain(self, records: Any, inputs: Any, progress: Any) -> list[dict[str, Any]]:
        """Return a row for each record."""
        rows = []
        for record in map(self._resolved, records):
            self._inject_fault()
            time.sleep(self.seconds)
            self.images += 1
            progress(len(rows), len(records))
            row = _record_columns(record, self.settings.n_samples) | packed_map(
                expected_map(record.id, record.seed or 0), self.settings.map_dtype
            )
            rows.append(row | {"target": 1, "prediction": 1, "probability": 0.5, "status": "ok"})
        return rows

    def _inject_fault(self) -> None:
        if self.fault is None or self.images != self.fault[1]:
            return
        what = self.fault[0]
        if what == "die-once" and not os.path.exists(self.fault[2]):
            Path(self.fault[2]).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "hang":
            threading.Event().wait()
        elif what == "memory":
            raise MemoryError("out of memory with one image at a time: ask for less.")
        elif what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        elif what == "raise":
            raise ZeroDivisionError("in the mapper")


def kill_at_commit(step: str, commits: int) -> None:
    """Patch `files` to kill the run, parent first, at a step of the commit: fsync, replace or folder.

    Args:
        step: the step.
        commits: number of commits that succeed before.
    """
    from dave_fast import files

    seen = 0
    real_fsync, real_replace = os.fsync, os.replace

    def kill() -> None:
        os.kill(int(os.environ[PARENT]), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    def fsync(handle: int) -> None:
        nonlocal seen
        seen += 1
        if step == "fsync" and seen > commits:
            kill()
        real_fsync(handle)

    def replace(*names: Any) -> None:
        if step == "replace" and seen > commits:
            kill()
        real_replace(*names)

    # The real function calls fsync, which would be counted as the shard's.
    def folder(*names: Any) -> None:
        if step == "folder" and seen > commits:
            kill()

    files.os = SimpleNamespace(**{**vars(os), "fsync": fsync, "replace": replace})  # type: ignore[assignment]
    files.sync_folder = folder


def fill_disk(step: str, commits: int) -> None:
    """Patch `files` to fail for lack of space at a step of the commit, fsync or replace, after `commits` commits."""
    from dave_fast import files

    seen = 0
    real = {"fsync": os.fsync, "replace": os.replace}

    def full(name: str) -> Callable[..., None]:
        def call(*given: Any) -> None:
            nonlocal seen
            seen += name == "fsync"
            if name == step and seen > commits:
                raise OSError(28, "No space left on device")
            real[name](*given)

        return call

    files.sync_folder = lambda folder: None  # type: ignore[assignment]
    files.os = SimpleNamespace(**{**vars(os), "fsync": full("fsync"), "replace": full("replace")})  # type: ignore[assignment]


@dataclass(frozen=True)
class StubSettings(MapSettings):
    """Settings of maps that `Stub` makes, with its keywords."""

    stub: dict[str, Any] = field(default_factory=dict)

    def mapper(self, device: str | None, threads: int | None = None) -> Mapper:
        """Return a stub."""
        return Stub(self, device, **self.stub)


def map_settings(settings: dict[str, Any]) -> MapSettings:
    """Return the settings of a stub run."""
    stub = {name: settings[name] for name in ("seconds", "decode", "fault") if name in settings}
    plain = {
        name: settings[name] for name in ("n_samples", "seed", "map_dtype", "depth", "options") if name in settings
    } | ({"limits": settings["limits"]} if "limits" in settings else {})
    return StubSettings(stub=stub, **plain)


def run(place: str, out: str | Path, **settings: Any) -> Any:
    """Make a stub run in this process."""
    machine = Machine(
        settings.get("devices", (None,)),
        settings.get("workers", 2),
        settings.get("shard_rows", 7),
        settings.get("commit_s", 0.5),
        # Starting Ray's actors takes minutes on a busy machine; tests of the watchdog set a shorter time.
        settings.get("watchdog_s", 600.0),
    )
    more = {name: settings[name] for name in ("engine", "limit", "retry_errors", "reporter") if name in settings}
    return run_dataset(str(place), out, map_settings(settings), machine, **more)


def main() -> None:
    """Make the run of the command line."""
    os.environ[PARENT] = str(os.getpid())
    try:
        summary = run(sys.argv[1], sys.argv[2], **json.loads(sys.argv[3]))
    except DaveFastError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(json.dumps({"records": summary.records, "images": summary.images, "stopped": summary.stopped}))


if __name__ == "__main__":
    # Workers import `Stub` by this module's name, not from __main__.
    from tests.run import stubs

    stubs.main()
