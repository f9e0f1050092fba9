"""Runs without a model: mappers that a worker can import, and a program that a test can kill.

`python run_stubs.py PLACE OUT SETTINGS(JSON)` is a run with `Stub`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from dave_fast.errors import DaveFastError, InputError
from dave_fast.images import decode_image
from dave_fast.models.labels import Labels
from dave_fast.run.contents import read_content
from dave_fast.run.local import Machine
from dave_fast.run.mapper import Mapper, Setup, _record_columns, packed_map
from dave_fast.run.records import Record, image_key
from dave_fast.run.runner import run_dataset

SIDE = 8
PARENT = "DAVE_FAST_TEST_PARENT"


def expected_map(record_id: str, seed: int = 0) -> np.ndarray:
    """What the stub makes of a record: numbers that depend on its id and seed alone."""
    return np.random.default_rng([image_key(record_id), seed]).random((SIDE, SIDE), np.float32)


class Stub(Mapper):
    """Takes `seconds` an image and gives maps that a test can foretell.

    seconds: of the device, an image. fault: (what to do, after how many images), see FAULTS.
    """

    def __init__(
        self, setup: Setup, device: str | None, *, seconds: float = 0.0, decode: str = "bytes", fault: Any = None
    ) -> None:
        self.setup, self.device, self.seconds, self._decode = setup, device or "stub", seconds, decode
        self.notes: list[str] = []
        self.target = None
        self.weights = "stub"
        self.prepare = SimpleNamespace(size=(SIDE, SIDE), normalised=lambda crop: crop)  # type: ignore[assignment]
        self.batch_size = setup.batch_size or 4
        self.labels = Labels(10)
        self.fault = fault
        self.images = 0
        if fault and fault[0].startswith("commit:"):
            kill_at_commit(fault[0].partition(":")[2], fault[1])
        if fault and fault[0].startswith("disk:"):
            fill_disk(fault[0].partition(":")[2], fault[1])
        if fault and fault[0] == "load":
            raise InputError("no such model")

    def warm_up(self) -> None:
        pass

    @property
    def configuration(self) -> dict[str, Any]:
        setup = self.setup
        size = {"input_size": (3, SIDE, SIDE), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic"}
        size |= {"crop_pct": 1.0, "crop_mode": "center"}
        return {
            "model": "stub",
            "n_samples": setup.n_samples,
            "seed": setup.seed,
            "precision": "fp32",
            "preprocessing": size,
            "classes": 10,
            "map_dtype": setup.map_dtype,
            "raw": setup.raw,
            "outputs": setup.outputs,
        }

    @property
    def input_bytes(self) -> int:
        return 4 * 3 * 224 * 224

    def decode(self, record: Record) -> Any:
        content = read_content(record)
        return content if self._decode == "bytes" else decode_image(content, record.uri)

    def explain(self, records: Any, inputs: Any, progress: Any) -> list[dict[str, Any]]:
        rows = []
        for record in self._resolved(records):
            self._befall()
            time.sleep(self.seconds)
            self.images += 1
            progress(len(rows), len(records))
            row = _record_columns(record, self.setup.n_samples) | packed_map(
                expected_map(record.id, record.seed or 0), self.setup.map_dtype
            )
            rows.append(row | {"target": 1, "prediction": 1, "probability": 0.5, "status": "ok"})
        return rows

    def _befall(self) -> None:
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
    """Kill the run, parent first, at a step of the commit after `commits` of them: fsync, replace, folder, write."""
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

    # It would be counted as the shard's own; nothing here outlives a power cut anyway.
    def folder(*names: Any) -> None:
        if step == "folder" and seen > commits:
            kill()

    files.os = SimpleNamespace(**{**vars(os), "fsync": fsync, "replace": replace})  # type: ignore[assignment]
    files.sync_folder = folder


def fill_disk(step: str, commits: int) -> None:
    """No space is left, at a step of the commit after `commits` of them."""
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


def setup_of(settings: dict[str, Any]) -> Setup:
    """The setup of a stub run."""
    stub = {name: settings[name] for name in ("seconds", "decode", "fault") if name in settings}
    plain = {name: settings[name] for name in ("n_samples", "seed", "map_dtype") if name in settings}
    return Setup(make=partial(Stub, **stub), **plain)


def run(place: str, out: str | Path, **settings: Any) -> Any:
    """A stub run in this process."""
    machine = Machine(
        settings.get("devices", (None,)),
        settings.get("workers", 2),
        settings.get("shard_rows", 7),
        settings.get("commit_s", 0.5),
        # only tests of the watchdog are about it: starting Ray's actors takes minutes on a busy machine
        settings.get("watchdog_s", 600.0),
    )
    more = {name: settings[name] for name in ("engine", "limit", "retry_errors", "reporter") if name in settings}
    return run_dataset(str(place), out, setup_of(settings), machine, **more)


def main() -> None:
    os.environ[PARENT] = str(os.getpid())
    try:
        summary = run(sys.argv[1], sys.argv[2], **json.loads(sys.argv[3]))
    except DaveFastError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(json.dumps({"records": summary.records, "images": summary.images, "stopped": summary.stopped}))


if __name__ == "__main__":
    # Workers find `Stub` under this module's own name.
    import run_stubs

    run_stubs.main()
