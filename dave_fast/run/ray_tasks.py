"""The tasks and actors of a run on a Ray cluster: reading, explaining, writing."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dave_fast.errors import DaveFastError, InputError
from dave_fast.images import Preprocessing, from_config
from dave_fast.run.contents import prepared
from dave_fast.run.limits import Limits, within
from dave_fast.run.lock import Fence
from dave_fast.run.mapper import MapSettings
from dave_fast.run.messages import Mapped
from dave_fast.run.records import Record, printable, unprintable
from dave_fast.run.shards import new_shard, schema

# Records that a read task decodes at a time.
DECODE_BATCH = 16
_BLOCK_BYTES = 8 * 2**20
_ALIVE_S = 5.0
# Tells the watchdog that work goes on, without rows.
PROGRESS = Mapped(0, 0.0, [])

# The records of one read task, or a function that yields them.
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


def probe(settings: MapSettings, device: str | None) -> Any:
    """Load the model where the maps will be made; return (configuration, weights, notes, class names), or the error."""
    try:
        mapper = settings.mapper(device)
    except DaveFastError as error:
        return error
    return mapper.configuration, mapper.weights, mapper.notes, mapper.labels.names


class Board:
    """An actor without work of its own: it gathers the counts of the others, and tells them to stop."""

    def __init__(self) -> None:
        self._mapped: list[Mapped] = []
        self._stopping = False
        self._failure: str | None = None

    def mapped(self, rows: Mapped) -> bool:
        """Add rows that were made, `PROGRESS` for other progress; return whether the run is to stop."""
        self._mapped.append(rows)
        return self._stopping

    def fail(self, failure: str) -> None:
        """Let the run fail at its end; the first failure is kept."""
        self._failure = self._failure or failure

    def stop(self, failure: str | None = None) -> None:
        """Stop the run; the first failure is kept."""
        self._failure = self._failure or failure
        self._stopping = True

    def stopping(self) -> bool:
        """Return whether the run is to stop."""
        return self._stopping

    def news(self) -> tuple[list[Mapped], str | None]:
        """Return the rows that were added since the last call, and the reason of a failure."""
        mapped, self._mapped = self._mapped, []
        return mapped, self._failure


@dataclass(frozen=True)
class RayPipeline:
    """The settings of a run's pipeline, which can be pickled.

    Attributes:
        parts: the records, one part a read task.
        limit: the most records, None if `parts` are bounded themselves.
        settings: the settings of the maps.
        device: name of the actors' device, None for the best there is.
        actors: number of actors, one a device.
        gpus: whether each actor takes a GPU.
        identity: the run's identity.
        folder: the run's folder.
        fence: the folder's fence.
        shard_rows: rows of a shard.
        board: handle of the `Board`.
    """

    parts: list[Part]
    limit: int | None
    settings: MapSettings
    device: str | None
    actors: int
    gpus: bool
    identity: dict[str, Any]
    folder: Path
    fence: Fence
    shard_rows: int
    board: Any


def execute(pipeline: RayPipeline) -> None:
    """Read, explain and write all records. A task of its own, so that the driver can cancel a pipeline that hangs."""
    from ray import data

    context = data.DataContext.get_current()
    context.target_max_block_size = _BLOCK_BYTES
    context.enable_progress_bars = False
    context.enable_rich_progress_bars = False
    context.print_on_execution_start = False
    # The errors that Ray logs are raised too.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    crops = data.read_datasource(_datasource(pipeline), override_num_blocks=len(pipeline.parts))
    if pipeline.limit is not None:
        crops = crops.limit(pipeline.limit)
    crops.map_batches(
        _MapActor,
        fn_constructor_args=(pipeline.settings, pipeline.device, pipeline.identity, pipeline.board),
        batch_size=pipeline.settings.batch_size or (16 if pipeline.gpus else 4),
        batch_format="pyarrow",
        compute=data.ActorPoolStrategy(size=pipeline.actors),
        num_cpus=1,
        num_gpus=int(pipeline.gpus),
    ).write_datasink(_sink(pipeline))


def _datasource(pipeline: RayPipeline) -> Any:
    """Return the source of the records.

    Ray neither fuses a source with the actors that follow, nor moves a limit before it, as it may with `map_batches`.
    """
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask

    config = pipeline.identity["configuration"]["preprocessing"]

    class Records(Datasource):
        """Read tasks, one a part."""

        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(self, parallelism: int, *given: Any, **more: Any) -> list[Any]:
            tasks = []
            for part in pipeline.parts:
                count = len(part) if isinstance(part, list) else None
                metadata = BlockMetadata(num_rows=count, size_bytes=None, input_files=None, exec_stats=None)
                read = partial(_read, part, pipeline.board, config, pipeline.settings.limits)
                tasks.append(ReadTask(read, metadata, schema=_CROPS))
            return tasks

    return Records()


def _read(part: Part, board: Any, config: dict[str, Any], limits: Limits) -> Iterator[pa.Table]:
    """Yield records with their crops, or the reason why there is none, until the run is to stop."""
    import ray

    def until_damage() -> Iterator[Record]:
        try:
            yield from part if isinstance(part, list) else part()
        # The other parts are read first.
        except InputError as error:
            ray.get(board.fail.remote(str(error)))

    prepare = from_config(config)
    # One by one: a record of a tar holds its encoded image, which may be large.
    rows = (_decoded(prepare, record, limits) for record in until_damage())
    while not ray.get(board.stopping.remote()) and (some := list(itertools.islice(rows, DECODE_BATCH))):
        yield pa.Table.from_pylist(some, schema=_CROPS)


def _decoded(prepare: Preprocessing, record: Record, limits: Limits) -> dict[str, Any]:
    row = {"id": record.id, "uri": printable(record.uri), "target": record.target, "seed": record.seed}
    try:
        crop = within(limits.seconds, partial(prepared, record, prepare.crop, limits))
        return row | {"crop": crop.tobytes()}
    except InputError as error:
        return row | {"error": str(error).encode("utf-8", "backslashreplace").decode()}


class _MapActor:
    """The actor of one device: crops to rows.

    After a failure that is not due to a single image it stops the run and returns no more rows.
    """

    def __init__(self, settings: MapSettings, device: str | None, identity: dict[str, Any], board: Any) -> None:
        import ray

        self._ray, self._board = ray, board
        self._schema = schema(identity)
        self._stopping = False
        self._last_alive = time.monotonic()
        self._mapper = settings.mapper(device)
        made = json.loads(json.dumps([self._mapper.configuration, self._mapper.weights]))
        if made != [identity["configuration"], identity["weights"]]:
            board.stop.remote(f"an actor on {device} would make other maps than the run's: give --precision.")
            self._stopping = True

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows: list[Any] = []
        if not self._stopping and batch.num_rows:
            try:
                rows = self._rows(batch.to_pylist())
            except (MemoryError, DaveFastError) as error:
                self._fail(str(error))
            except Exception as error:
                self._fail(f"an actor failed: {type(error).__name__}: {error}")
        return pa.Table.from_pylist(rows, schema=self._schema)

    def _fail(self, reason: str) -> None:
        self._stopping = True
        self._board.stop.remote(f"{reason.rstrip('.')}. What is committed is kept: resume the run.")

    def _rows(self, given: list[dict[str, Any]]) -> list[Any]:
        records = [Record(row["id"], unprintable(row["uri"]), row["target"], row["seed"]) for row in given]
        loads = [partial(self._input, row) for row in given]
        rows, message = self._mapper.rows(list(zip(records, loads, strict=True)), self._alive)
        self._stopping = self._ray.get(self._board.mapped.remote(message))
        return rows

    def _input(self, row: dict[str, Any]) -> Any:
        """Return the model's input for a crop (3, H, W); raise InputError if there is none."""
        if row["error"] is not None:
            raise InputError(row["error"])
        prepare = self._mapper.prepare
        return prepare.normalised(np.frombuffer(row["crop"], np.uint8).reshape(*prepare.size, 3))

    def _alive(self, done: int, rows: int) -> None:
        """Report progress to the watchdog during a long batch, at most every few seconds."""
        now = time.monotonic()
        if now - self._last_alive > _ALIVE_S:
            self._last_alive = now
            self._board.mapped.remote(PROGRESS)


def _sink(pipeline: RayPipeline) -> Any:
    from ray.data.datasource import Datasink

    class Shards(Datasink):
        """Rows to shards, each named by the ids in it, so that a repeated task replaces its shard."""

        @property
        def min_rows_per_write(self) -> int:
            return pipeline.shard_rows

        def write(self, blocks: Iterable[pa.Table], ctx: Any) -> None:
            tables = [pa.table(block) for block in blocks if len(block)]
            if not tables:
                return
            table = pa.concat_tables(tables, promote_options="default")
            ids = hashlib.blake2b("\n".join(table["id"].to_pylist()).encode(), digest_size=12).hexdigest()
            path = pipeline.folder / f"maps-{ids}.parquet"
            with pipeline.fence.inside(), new_shard(path, schema(pipeline.identity)) as writer:
                writer.add(table.to_pylist())
            pipeline.board.mapped.remote(PROGRESS)

    return Shards()
