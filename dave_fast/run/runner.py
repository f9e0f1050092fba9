"""A run from opening its source to its summary, with either runner."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from dave_fast.errors import InputError
from dave_fast.files import atomically, check_writable
from dave_fast.run.folder import RunFolder
from dave_fast.run.local import Machine, run_local
from dave_fast.run.lock import FENCE_FILE, LOCK_FILE, Lock
from dave_fast.run.mapper import LABEL, MapSettings
from dave_fast.run.progress import Report, Tally
from dave_fast.run.shards import committed_ids, shard_files
from dave_fast.run.sources import open_source

ENGINES = ("local", "ray")
SUMMARY_FILE = "summary.json"
# Makes the report of a run: from the number of records (None: unknown), and how many were done before.
Reporter = Callable[[int | None, int], AbstractContextManager[Report]]


@dataclass(frozen=True)
class RunSummary:
    """The result of a run.

    Attributes:
        records: records with a row, those of earlier runs included.
        images: records explained by this run.
        errors: records without a map in this run.
        seconds: since the devices were ready.
        images_per_second: `images` over `seconds`.
        device_share: share of `seconds` in which the devices computed, in [0, 1].
        devices: number of devices.
        shards: committed shards in the folder.
        bytes: bytes of these shards.
        stopped: name of the signal that stopped the run, or None.
        first_errors: (id, reason) of the first failures.
        doubles: the first ids that occurred twice in the source.
    """

    records: int
    images: int
    errors: int
    seconds: float
    images_per_second: float
    device_share: float
    devices: int
    shards: int
    bytes: int
    stopped: str | None = None
    first_errors: list[tuple[str, str]] = field(default_factory=list)
    doubles: list[str] = field(default_factory=list)


def run_dataset(
    place: str,
    out: str | Path,
    settings: MapSettings,
    machine: Machine | None = None,
    *,
    engine: str = "local",
    limit: int | None = None,
    retry_errors: bool = False,
    reporter: Reporter = lambda total, before: nullcontext(Report()),
) -> RunSummary:
    """Explain every record of a source that has no row in `out` yet. See `docs/datasets.md`.

    Args:
        place: the source, see `dave_fast.run.sources`.
        out: the folder of the run; made if missing, continued if it holds the same run.
        settings: the settings of the maps.
        machine: devices, threads and shard size; None: the defaults.
        engine: "local" or "ray".
        limit: the most rows in all, those of earlier runs included.
        retry_errors: whether records whose row is an error are explained again.
        reporter: makes the report that shows progress.

    Raises:
        InputError: the source or a setting is wrong, or `out` holds another run.
        RunError: the run stopped before its end; what was committed is kept.
    """
    if engine not in ENGINES:
        raise InputError(f"engine is {engine!r}; expected one of {', '.join(ENGINES)}.")
    folder = Path(out)
    check_writable(folder)
    source = open_source(place, labels=settings.target == LABEL, leave_out=folder, limits=settings.limits)
    created = not os.path.lexists(folder)
    lock = Lock.take(folder)
    try:
        run_folder = RunFolder(folder, lock, source, limit=limit, retry_errors=retry_errors)
        total = min((number for number in (source.count, limit) if number is not None), default=None)
        with reporter(total, len(run_folder.done)) as report:
            run = run_local
            if engine == "ray":
                from dave_fast.run.ray_engine import run_ray

                run = run_ray
            tally = run(run_folder, settings, machine or Machine(), report)
        summary = _summary(folder, tally)
        with atomically(folder / SUMMARY_FILE) as file:
            file.write(json.dumps(asdict(summary), indent=2, ensure_ascii=False).encode() + b"\n")
        return summary
    finally:
        lock.release()
        if created:
            _remove_if_unused(folder)


def _summary(folder: Path, tally: Tally) -> RunSummary:
    shards = shard_files(folder)
    return RunSummary(
        records=len(committed_ids(folder)),
        images=tally.images,
        errors=tally.errors,
        seconds=round(tally.elapsed_s, 3),
        images_per_second=round(tally.images / tally.elapsed_s, 4) if tally.elapsed_s > 0 else 0.0,
        device_share=round(tally.device_share, 4),
        devices=tally.workers,
        shards=len(shards),
        bytes=sum(path.stat().st_size for path in shards),
        stopped=None if tally.stopped_by is None else signal.Signals(tally.stopped_by).name,
        first_errors=tally.first_errors,
        doubles=tally.doubles[:10],
    )


def _remove_if_unused(folder: Path) -> None:
    """Remove the folder again if nothing was written to it and no other run has begun: the run was refused."""
    try:
        lock = Lock.take(folder, 0.0)
    except InputError:
        return
    try:
        if {path.name for path in folder.iterdir()} <= {LOCK_FILE, FENCE_FILE}:
            # The lock is the last: who then makes a new one owns the folder and its fence.
            (folder / FENCE_FILE).unlink(missing_ok=True)
            (folder / LOCK_FILE).unlink()
            with suppress(OSError):
                folder.rmdir()
    finally:
        lock.release()
