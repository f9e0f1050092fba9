"""The Ray engine: the same steps as a streaming Ray Data pipeline over a cluster, and the same shards.

    read + decode   tasks on CPUs: records -> 8-bit crops (a quarter of the bytes of the model's input)
    engine          one actor a device, the model loaded once: crops -> rows
    write           tasks: rows -> a shard, committed as the local engine does it

Exactly once: what has a row is left out before the pipeline begins; a map depends on its record alone, so that a task
that Ray runs again makes the same rows; and a shard is named by the ids in it, so that writing it again replaces it.
A *board* (an actor of no cost) gathers the accounts and carries the order to stop: then what is under way runs dry
without being computed, and what was computed is written.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from dave_fast.errors import DaveFastError, InputError, RunError
from dave_fast.images import Preprocessing, decode_image, from_config
from dave_fast.run.contents import read_content
from dave_fast.run.folder import RunFolder
from dave_fast.run.lock import Fence
from dave_fast.run.mapper import Setup
from dave_fast.run.progress import Report, Tally
from dave_fast.run.records import Record, printable
from dave_fast.run.shards import ShardWriter, schema
from dave_fast.run.stopping import stop_in_order

if TYPE_CHECKING:
    from dave_fast.run.local import Machine

SHARD_ROWS = 1000
# Records of one read task, and crops of one block between the stages.
_PART = 512
_BLOCK_BYTES = 8 * 2**20
_STORE_BYTES = 2**30
_DECODE_BATCH = 16
_TICK_S = 0.5
_ALIVE_S = 5.0

Part = list[Record] | Callable[[], Iterator[Record]]

_CROPS = pa.schema(
    [
        ("id", pa.string()),
        ("uri", pa.string()),
        ("target", pa.int64()),
        ("seed", pa.int64()),
        ("crop", pa.large_binary()),
        ("error", pa.string()),
    ]
)


def run_ray(begun: RunFolder, setup: Setup, machine: Machine, report: Report) -> Tally:
    """As `dave_fast.run.local.run_local`, on the Ray cluster that RAY_ADDRESS names, or one of this machine's own.

    Raises InputError where Ray is missing or has too few slots.
    """
    ray = _ray()
    with _cluster(ray, machine) as (actors, gpus):
        device = "cuda" if gpus else next((d for d in machine.devices if d), None)
        load = ray.remote(num_cpus=1, num_gpus=int(gpus))(_probe)
        probed = ray.get(load.remote(setup, device))
        if isinstance(probed, DaveFastError):
            raise probed
        configuration, weights, notes = probed
        for note in notes:
            report.note(note)
        identity = begun.check(configuration, weights)
        fence = Fence.renew(begun.folder)
        board = ray.remote(num_cpus=0)(_Board).remote()
        run = _RayRun(ray, board, setup, device, actors, gpus, identity, report, machine.watchdog_s)
        sink = _sink(begun.folder.resolve(), identity, fence, machine.shard_rows or SHARD_ROWS, board)
        return run.run(begun, sink)


def _ray() -> Any:
    try:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        import ray
        import ray.data
    except ImportError as error:
        raise InputError("--engine ray needs Ray: pip install 'dave-fast[ray]'.") from error
    return ray


# ---- the cluster ----


@contextlib.contextmanager
def _cluster(ray: Any, machine: Machine) -> Iterator[tuple[int, bool]]:
    """A cluster with room for the engine: (number of actors, whether they have a GPU each)."""
    ours = not ray.is_initialized()
    if ours:
        quiet: dict[str, Any] = {"logging_level": logging.CRITICAL, "log_to_driver": False}
        if os.environ.get("RAY_ADDRESS"):
            ray.init(**quiet)
        else:
            # Never one that happens to run here: it may be someone else's, or that of a run that was just killed.
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
    """CPU slots that a pipeline needs: one an actor, one for decoding, one for writing. With fewer it hangs."""
    return actors + 2


def preflight(resources: dict[str, float], devices: Sequence[str | None]) -> tuple[int, bool]:
    """(actors, whether each takes a GPU) for devices as named by the user; None alone is all GPUs of the cluster.

    Raises InputError where the cluster has not the slots that the pipeline needs to make progress.
    """
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
    chosen = list(devices) == [None]
    on_gpu = gpus > 0 if chosen else any(str(device).startswith("cuda") for device in devices)
    actors = gpus if chosen and gpus else len(devices)
    if on_gpu and actors > gpus:
        raise InputError(f"{actors} GPUs were asked for, and the Ray cluster has {gpus}.")
    if cpus < _slots(actors):
        raise InputError(
            f"the Ray cluster has {cpus} CPU slots, and {actors} engine actors need {_slots(actors)}: one each, one to "
            "decode and one to write; with fewer the run would hang. Add nodes, or start Ray with a larger --num-cpus."
        )
    return actors, on_gpu


def _probe(setup: Setup, device: str | None) -> Any:
    """What the maps will be made of, found out where they are made."""
    try:
        mapper = setup.mapper(device)
        mapper.warm_up()
    except DaveFastError as error:
        return error
    return mapper.configuration, mapper.weights, mapper.notes


class _Board:
    """An actor: accounts of the engine's actors, and the order to stop."""

    def __init__(self) -> None:
        self._news: list[tuple[int, float, list[tuple[str, str]]]] = []
        self._commits: list[tuple[int, int]] = []
        self._stopping = False
        self._failure: str | None = None

    def mapped(self, records: int, busy_s: float, errors: list[tuple[str, str]]) -> bool:
        self._news.append((records, busy_s, errors))
        return self._stopping

    def committed(self, rows: int, size: int) -> None:
        self._commits.append((rows, size))

    def fail(self, reason: str) -> None:
        self._failure = self._failure or reason
        self._stopping = True

    def stop(self) -> None:
        self._stopping = True

    def stopping(self) -> bool:
        return self._stopping

    def news(self) -> tuple[list[Any], list[Any], str | None]:
        news, self._news = self._news, []
        commits, self._commits = self._commits, []
        return news, commits, self._failure


# ---- the driver ----


class _RayRun:
    def __init__(
        self,
        ray: Any,
        board: Any,
        setup: Setup,
        device: str | None,
        actors: int,
        gpus: bool,
        identity: dict[str, Any],
        report: Report,
        watchdog_s: float,
    ) -> None:
        self.ray, self.board, self.report, self.watchdog_s = ray, board, report, watchdog_s
        self.setup, self.device, self.actors, self.gpus, self.identity = setup, device, actors, gpus, identity
        self.tally = Tally(workers=actors)
        self.stopped_by: int | None = None

    def run(self, begun: RunFolder, sink: Any) -> Tally:
        """The pipeline in a task of its own; accounts, signals and watchdog here."""
        parts = list(_parts(begun))
        if not parts:
            self.report.begin(self.tally)
            return self.tally
        left = begun.left() if begun.source.shards is not None else None
        given = parts, left, self.board, sink, self.setup, self.device, self.identity, self.actors, self.gpus
        with stop_in_order(self):
            self.report.begin(self.tally)
            task = self.ray.remote(num_cpus=0, max_retries=0)(_pipeline).remote(*given)
            failure = self._watch(task)
        self.tally.stopped_by = self.stopped_by
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
        """Until the pipeline has ended; why it failed in an actor's eyes."""
        told = False
        while True:
            ended, _ = self.ray.wait([task], timeout=_TICK_S)
            news, commits, failure = self.ray.get(self.board.news.remote())
            for records, busy_s, errors in news:
                self.tally.mapped("", records, busy_s, errors)
                for record_id, reason in errors:
                    self.report.failed(record_id, reason)
            for rows, size in commits:
                self.tally.committed(rows, size)
            self.report.update(self.tally)
            if ended:
                return None if failure is None else str(failure)
            if self.stopped_by is not None and not told:
                told = True
                self.board.stop.remote()
            silent_s = time.monotonic() - self.tally.last_progress
            if silent_s > self.watchdog_s:
                self.ray.cancel(task, force=True)
                raise RunError(
                    f"no progress for {silent_s:.0f} s on Ray ({self.actors} actors). What is committed is kept: see "
                    "`ray status` for missing resources, and resume. Give --watchdog if this is no fault."
                )


def _pipeline(
    parts: list[Part],
    limit: int | None,
    board: Any,
    sink: Any,
    setup: Setup,
    device: str | None,
    identity: dict[str, Any],
    actors: int,
    gpus: bool,
) -> None:
    """Read, compute, write: to the end. In a process of its own, so that one that hangs can be given up."""
    from ray import data

    context = data.DataContext.get_current()
    context.target_max_block_size = _BLOCK_BYTES
    context.enable_progress_bars = False
    context.enable_rich_progress_bars = False
    context.print_on_execution_start = False
    # What it would tell of an error is in the error.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    crops = data.read_datasource(
        _datasource(parts, board, identity["configuration"]["preprocessing"]), override_num_blocks=len(parts)
    )
    if limit is not None:
        crops = crops.limit(limit)
    crops.map_batches(
        _MapActor,
        fn_constructor_args=(setup, device, identity, board),
        batch_size=setup.batch_size or (16 if gpus else 4),
        batch_format="pyarrow",
        compute=data.ActorPoolStrategy(size=actors),
        num_cpus=1,
        num_gpus=int(gpus),
    ).write_datasink(sink)


def _first_cause(error: BaseException) -> BaseException:
    """What failed in a task, of a task, ..., as it was there."""
    while isinstance(cause := getattr(error, "cause", None), BaseException):
        error = cause
    return error


# ---- reading ----


def _parts(begun: RunFolder) -> list[Part]:
    """What the read tasks are given: records, or tars with the ids in them that are done."""
    source, left = begun.source, begun.left()
    if source.shards is not None:
        done = _by_shard(begun.done, source.shards)
        return [partial(read, done[name].__contains__) for name, read in source.shards.items()] if left != 0 else []
    records = list(itertools.islice(source.records(begun.skip), left))
    # Small enough that all processors decode, large enough that tasks are worth their cost.
    size = min(_PART, max(_DECODE_BATCH, len(records) // (8 * (os.cpu_count() or 1))))
    return [records[start : start + size] for start in range(0, len(records), size)]


def _by_shard(done: Iterable[str], shards: Iterable[str]) -> dict[str, set[str]]:
    """Ids by the shard that they begin with."""
    found: dict[str, set[str]] = {name: set() for name in shards}
    for record_id in done:
        for end in (n for n, character in enumerate(record_id) if character == "/"):
            if record_id[:end] in found:
                found[record_id[:end]].add(record_id)
    return found


def _read(part: Part, board: Any, config: dict[str, Any]) -> Iterator[pa.Table]:
    """Records with their crops, or the reason why there is none; no more of them once the run is to stop."""
    import ray

    prepare = from_config(config)
    records = iter(part) if isinstance(part, list) else part()
    while some := list(itertools.islice(records, _DECODE_BATCH)):
        if ray.get(board.stopping.remote()):
            return
        yield pa.Table.from_pylist([_decoded(prepare, record) for record in some], schema=_CROPS)


def _decoded(prepare: Preprocessing, record: Record) -> dict[str, Any]:
    row = {"id": record.id, "uri": printable(record.uri), "target": record.target, "seed": record.seed}
    try:
        return row | {"crop": prepare.crop(decode_image(read_content(record), record.uri)).tobytes()}
    except InputError as error:
        return row | {"error": str(error)}


def _datasource(parts: list[Part], board: Any, config: dict[str, Any]) -> Any:
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask

    class Records(Datasource):
        """Read tasks, one a part."""

        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(self, parallelism: int, *given: Any, **more: Any) -> list[Any]:
            tasks = []
            for part in parts:
                count = len(part) if isinstance(part, list) else None
                metadata = BlockMetadata(num_rows=count, size_bytes=None, input_files=None, exec_stats=None)
                tasks.append(ReadTask(partial(_read, part, board, config), metadata, schema=_CROPS))
            return tasks

    return Records()


# ---- the engine ----


class _MapActor:
    """The actor: crops to rows. After a failure that is no image's fault it stops the run, and gives no more rows."""

    def __init__(self, setup: Setup, device: str | None, identity: dict[str, Any], board: Any) -> None:
        import ray

        self._ray, self._board = ray, board
        self._schema = schema(identity)
        self._stopping = False
        self._told = time.monotonic()
        self._mapper = setup.mapper(device)
        self._mapper.warm_up()
        found = self._mapper.configuration, self._mapper.weights
        # JSON knows no tuples.
        if _plain(found) != _plain((identity["configuration"], identity["weights"])):
            board.fail.remote(f"an actor on {device} would make other maps than the run's: give --precision.")
            self._stopping = True

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows: list[Any] = []
        if not self._stopping and batch.num_rows:
            try:
                rows = self._rows(batch.to_pylist())
            except MemoryError as error:
                self._fail(str(error))
            except DaveFastError as error:
                self._fail(str(error))
            except Exception as error:
                self._fail(f"an engine actor failed: {type(error).__name__}: {error}")
        return pa.Table.from_pylist(rows, schema=self._schema)

    def _fail(self, reason: str) -> None:
        self._stopping = True
        self._board.fail.remote(f"{reason.rstrip('.')}. What is committed is kept: resume the run.")

    def _rows(self, given: list[dict[str, Any]]) -> list[Any]:
        mapper = self._mapper
        height, width = mapper.prepare.size
        failed: dict[str, Any] = {}
        records, inputs = [], []
        for row in given:
            record = Record(row["id"], row["uri"], row["target"], row["seed"])
            try:
                if row["error"] is not None:
                    raise InputError(row["error"])
                mapper.refuse_target(record)
                crop = np.frombuffer(row["crop"], np.uint8).reshape(height, width, 3)
                inputs.append(mapper.prepare.normalised(crop))
                records.append(record)
            except InputError as error:
                failed[record.id] = mapper.error_row(record, error)
        start = time.perf_counter()
        made = {row["id"]: row for row in mapper.explain(records, inputs, self._alive)} if records else {}
        busy_s = time.perf_counter() - start if records else 0.0
        rows = [(made | failed)[row["id"]] for row in given]
        errors = [(row["id"], row["error"]) for row in rows if row["status"] == "error"]
        self._stopping = self._ray.get(self._board.mapped.remote(len(rows), busy_s, errors))
        return rows

    def _alive(self, done: int, rows: int) -> None:
        """Tell the watchdog, now and then, that a long batch is being computed."""
        now = time.monotonic()
        if now - self._told > _ALIVE_S:
            self._told = now
            self._board.mapped.remote(0, 0.0, [])


def _plain(value: Any) -> Any:
    import json

    return json.loads(json.dumps(value))


# ---- writing ----


def _sink(folder: Path, identity: dict[str, Any], fence: Fence, shard_rows: int, board: Any) -> Any:
    from ray.data.datasource import Datasink

    class Shards(Datasink):
        """Rows to shards, each named by the ids that it holds."""

        @property
        def min_rows_per_write(self) -> int:
            return shard_rows

        def write(self, blocks: Iterable[pa.Table], ctx: Any) -> None:
            tables = [pa.table(block) for block in blocks if len(block)]
            if not tables:
                return
            table = pa.concat_tables(tables, promote_options="default")
            ids = hashlib.blake2b("\n".join(table["id"].to_pylist()).encode(), digest_size=12).hexdigest()
            with fence.inside():
                writer = ShardWriter(folder / f"maps-{ids}.parquet", schema(identity))
                writer.add(table.to_pylist())
                path = writer.commit()
            board.committed.remote(writer.rows, path.stat().st_size)

    return Shards()
