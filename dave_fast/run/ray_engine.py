"""The Ray runner: the steps of the local runner as a streaming Ray Data pipeline over a cluster, and the same shards.

    read + decode   tasks on CPUs: records -> 8-bit crops (a quarter of the bytes of the model's input)
    explain         one actor a device, which loads the model once: crops -> rows
    write           tasks: rows -> a shard, committed as the local runner does it

Each record gets one row: records with a row are left out before the pipeline begins; a map depends on its record
alone, so that a task that Ray repeats makes the same rows; and a shard is named by the ids in it, so that writing it
again replaces it. A board (an actor that takes no CPU) gathers the counts and carries the order to stop: records that
are under way then pass through the pipeline without being explained, and finished rows are written.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from dave_fast.errors import DaveFastError, InputError, RunError, needs
from dave_fast.run.folder import RunFolder
from dave_fast.run.lock import Fence
from dave_fast.run.mapper import MapSettings
from dave_fast.run.progress import Report, Tally
from dave_fast.run.ray_tasks import DECODE_BATCH, Board, Part, RayPipeline, execute, probe
from dave_fast.run.stopping import stop_in_order

if TYPE_CHECKING:
    from dave_fast.run.local import Machine

SHARD_ROWS = 1000
# The most records of one read task.
_PART = 512
_STORE_BYTES = 2**30
_TICK_S = 0.5


def run_ray(run_folder: RunFolder, settings: MapSettings, machine: Machine, report: Report) -> Tally:
    """Explain the records that have no row yet, on the cluster that RAY_ADDRESS names, else on this machine.

    Args:
        run_folder: the run's folder and source.
        settings: the settings of the maps.
        machine: devices and shard size.
        report: shows progress.

    Returns:
        The counts of the run.

    Raises:
        InputError: Ray is missing or has too few slots, a setting is wrong, or the folder holds another run.
        RunError: the run stopped early; what was committed is kept.
    """
    ray = _ray()
    with _cluster(ray, machine) as (actors, gpus):
        device = "cuda" if gpus else next((d for d in machine.devices if d), None)
        load = ray.remote(num_cpus=1, num_gpus=int(gpus))(probe)
        loading = load.remote(settings, device)
        while not ray.wait([loading], timeout=1.0)[0]:
            report.update(Tally(workers=actors))
        probed = ray.get(loading)
        if isinstance(probed, DaveFastError):
            raise probed
        configuration, weights, notes, names = probed
        for note in notes:
            report.note(note)
        identity = run_folder.check(configuration, weights, names)
        pipeline = RayPipeline(
            parts=_parts(run_folder),
            limit=None if run_folder.source.shards is None else run_folder.left(),
            settings=settings,
            device=device,
            actors=actors,
            gpus=gpus,
            identity=identity,
            folder=run_folder.folder.resolve(),
            fence=Fence.renew(run_folder.folder),
            shard_rows=machine.shard_rows or SHARD_ROWS,
            board=ray.remote(num_cpus=0)(Board).remote(),
        )
        return _RayRun(ray, pipeline, report, machine.watchdog_s).run()


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    with needs("ray", "--engine ray"):
        import ray
        import ray.data
    return ray


@contextlib.contextmanager
def _cluster(ray: Any, machine: Machine) -> Iterator[tuple[int, bool]]:
    """Connect to a cluster or start one; yield (number of actors, whether each takes a GPU)."""
    ours = not ray.is_initialized()
    if ours:
        quiet: dict[str, Any] = {"logging_level": logging.CRITICAL, "log_to_driver": False}
        if os.environ.get("RAY_ADDRESS"):
            ray.init(**quiet)
        else:
            # Not a cluster that happens to run here, which may belong to another user or to a run that was killed.
            cores = max(os.cpu_count() or 1, _slots(len(machine.devices)))
            ray.init(
                address="local",
                num_cpus=cores,
                object_store_memory=_STORE_BYTES,
                include_dashboard=False,
                **quiet,
            )
    try:
        yield preflight(ray.cluster_resources(), machine.devices)
    finally:
        if ours:
            ray.shutdown()


def _slots(actors: int) -> int:
    """Return the CPU slots that a pipeline needs: one an actor, one to decode, one to write. With fewer it hangs."""
    return actors + 2


def preflight(resources: dict[str, float], devices: Sequence[str | None]) -> tuple[int, bool]:
    """Return the number of actors, and whether each takes a GPU.

    Args:
        resources: the cluster's resources, as Ray counts them.
        devices: names of devices, one actor each; None alone is all GPUs of the cluster.

    Raises:
        InputError: the cluster has too few GPUs, or too few CPU slots for the pipeline to make progress.
    """
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
    chosen = list(devices) == [None]
    on_gpu = gpus > 0 if chosen else any(str(device).startswith("cuda") for device in devices)
    actors = gpus if chosen and gpus else len(devices)
    if on_gpu and actors > gpus:
        raise InputError(f"{actors} devices are given and the Ray cluster has {gpus} GPUs: give fewer.")
    if cpus < _slots(actors):
        raise InputError(
            f"the Ray cluster has {cpus} CPU slots, and {actors} actors need {_slots(actors)}: one each, one to "
            "decode and one to write; with fewer the run would hang. Add nodes, or start Ray with a larger --num-cpus."
        )
    return actors, on_gpu


class _RayRun:
    """The driver of a run: starts the pipeline, and takes care of counts, signals and watchdog."""

    def __init__(self, ray: Any, pipeline: RayPipeline, report: Report, watchdog_s: float) -> None:
        self.ray, self.pipeline, self.report, self.watchdog_s = ray, pipeline, report, watchdog_s
        self.tally = Tally(workers=pipeline.actors)

    def run(self) -> Tally:
        """Run the pipeline in a task of its own and return the counts."""
        self.tally.begin()
        if not self.pipeline.parts:
            return self.tally
        with stop_in_order(self.tally, self.report):
            task = self.ray.remote(num_cpus=0, max_retries=0)(execute).remote(self.pipeline)
            failure = self._watch(task)
        try:
            self.ray.get(task)
        except self.ray.exceptions.RayError as error:
            cause = _first_cause(error)
            reason = " ".join(str(cause).split())[:500].rstrip(".")
            raise RunError(
                f"Ray could not finish the run: {type(cause).__name__}: {reason}. What is committed is kept: resume it."
            ) from error
        if failure is not None:
            raise RunError(failure)
        return self.tally

    def _watch(self, task: Any) -> str | None:
        """Wait for the end of the pipeline; return the failure that an actor reported, if any."""
        stop_sent = False
        while True:
            ended, _ = self.ray.wait([task], timeout=_TICK_S)
            news, failure = self.ray.get(self.pipeline.board.news.remote())
            for rows in news:
                self.tally.mapped("", rows)
            self.report.update(self.tally)
            if ended:
                return failure
            if self.tally.stopped_by is not None and not stop_sent:
                stop_sent = True
                self.pipeline.board.stop.remote()
            silent_s = time.monotonic() - self.tally.last_progress
            if silent_s > self.watchdog_s:
                self.ray.cancel(task, force=True)
                raise RunError(
                    f"no progress for {silent_s:.0f} s on Ray ({self.pipeline.actors} actors). What is committed is "
                    "kept: see `ray status` for missing resources, and resume. Give --watchdog if this is no fault."
                )


def _first_cause(error: BaseException) -> BaseException:
    """Return the error that was raised first, inside of the tasks' errors."""
    while isinstance(cause := getattr(error, "cause", None), BaseException):
        error = cause
    return error


def _parts(run_folder: RunFolder) -> list[Part]:
    """Return the parts of the read tasks: lists of records, or functions that read a tar without the done records."""
    source, left = run_folder.source, run_folder.left()
    if source.shards is not None:
        done = _by_shard(run_folder.done, source.shards)
        return [partial(read, done[name].__contains__) for name, read in source.shards.items()] if left != 0 else []
    records = list(itertools.islice(source.records(run_folder.done.__contains__), left))
    # Small enough that all processors decode, large enough that tasks are worth their cost.
    size = min(_PART, max(DECODE_BATCH, len(records) // (8 * (os.cpu_count() or 1))))
    return [records[start : start + size] for start in range(0, len(records), size)]


def _by_shard(done: Iterable[str], shards: Iterable[str]) -> dict[str, set[str]]:
    """Return the ids by the shard whose name they begin with."""
    found: dict[str, set[str]] = {name: set() for name in shards}
    for record_id in done:
        for end in (n for n, character in enumerate(record_id) if character == "/"):
            if record_id[:end] in found:
                found[record_id[:end]].add(record_id)
    return found
