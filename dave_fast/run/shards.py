"""Shards: Parquet files of rows, one row a record, that are whole or not there.

| column | type | |
|---|---|---|
| id, uri | string | the record |
| target | int64 | the class that was explained |
| prediction | int64 | the most probable class |
| probability | float32 | softmax of the unperturbed image's output at the target |
| seed, n_samples | int64, int32 | of the draws |
| status, error | string | "ok", or "error" and why; then there is no map |
| height, width, dtype | int32, int32, string | of the map: float16 or uint8, row by row, little-endian |
| map, scale | binary, float32 | values = map × scale, in [0, 1] |
| raw, raw_scale | binary, float32 | with --raw: signed (3, height, width) float16; values = raw × raw_scale |
| output | binary | with --outputs: the model's output (K,) float32 |

Rows go to a hidden temporary file, a row group at a time; committing it is fsync and rename, so a shard exists as a
whole or not at all. The file's metadata holds the run's identity (`identity`) under the key `dave_fast`.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dave_fast.errors import InputError, reason_of
from dave_fast.files import atomically
from dave_fast.run.identity import METADATA_KEY

SUFFIX = ".parquet"
# Temporary files of `files.atomically`.
PART = ".part"
ROW_GROUP = 32
SHARD_ROWS = 10_000
SHARD_BYTES = 256 * 2**20

Row = dict[str, Any]

_COLUMNS: dict[str, pa.DataType] = {
    "id": pa.string(),
    "uri": pa.string(),
    "target": pa.int64(),
    "prediction": pa.int64(),
    "probability": pa.float32(),
    "seed": pa.int64(),
    "n_samples": pa.int32(),
    "status": pa.string(),
    "error": pa.string(),
    "height": pa.int32(),
    "width": pa.int32(),
    "dtype": pa.string(),
    "map": pa.binary(),
    "scale": pa.float32(),
}
_RAW = {"raw": pa.binary(), "raw_scale": pa.float32()}
_OUTPUT = {"output": pa.binary()}
# Everything but the arrays: what an index of a run reads.
SMALL = [name for name in _COLUMNS if name != "map"]


def schema(identity: Mapping[str, Any]) -> pa.Schema:
    """The columns of a run, with its identity as metadata."""
    configuration = identity["configuration"]
    columns = _COLUMNS | (_RAW if configuration["raw"] else {}) | (_OUTPUT if configuration["outputs"] else {})
    return pa.schema(list(columns.items()), metadata={METADATA_KEY: json.dumps(identity).encode()})


def write_options(columns: Iterable[str]) -> dict[str, Any]:
    """How shards are compressed: no dictionaries, statistics for what rows are chosen by only."""
    return {
        "compression": "zstd",
        "compression_level": 1,
        "use_dictionary": False,
        "write_statistics": [name for name in columns if name in ("id", "target", "prediction", "status")],
    }


class ShardWriter:
    """Rows in, shards out: `add` collects, `commit` makes what was added a shard."""

    def __init__(self, path: Path, columns: pa.Schema) -> None:
        self.path = path
        self.rows = 0
        self.bytes = 0
        self._columns = columns
        self._pending: list[Row] = []
        self._stack = ExitStack()
        # Refused before work is done for nothing, where no file can be made.
        self._file = self._stack.enter_context(atomically(path, durable=True))
        self._writer = pq.ParquetWriter(self._file, columns, **write_options(columns.names))

    def add(self, rows: Sequence[Row]) -> None:
        """Add rows; written as soon as they fill a row group."""
        self._pending += rows
        self.rows += len(rows)
        with self._abandoned_on_error():
            while len(self._pending) >= ROW_GROUP:
                self._write_group()

    def commit(self) -> Path:
        """The shard, on the disk and under its name."""
        with self._abandoned_on_error():
            if self._pending:
                self._write_group()
            self._writer.close()
        self._stack.close()
        return self.path

    def abandon(self, error: BaseException | None = None) -> None:
        """Leave nothing behind."""
        error = error or _AbandonedError()
        # Its destructor would write on.
        self._writer.is_open = False
        self._pending = []
        with contextlib.suppress(_AbandonedError):
            self._stack.__exit__(type(error), error, error.__traceback__)

    def _write_group(self) -> None:
        group, self._pending = self._pending[:ROW_GROUP], self._pending[ROW_GROUP:]
        self._writer.write_table(pa.Table.from_pylist(group, schema=self._columns))
        self.bytes = self._file.tell()

    @contextlib.contextmanager
    def _abandoned_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self.abandon(error)
            raise


class _AbandonedError(Exception):
    """Closes the temporary file as a failure does."""


def shard_files(folder: Path) -> list[Path]:
    """The committed shards of a run, sorted by name."""
    return sorted(path for path in folder.glob(f"*{SUFFIX}") if not path.name.startswith("."))


def remove_leftovers(folder: Path) -> int:
    """Delete the temporary files of runs that were killed; how many there were. Only under the folder's lock."""
    leftovers = list(folder.glob(f".*{PART}"))
    for path in leftovers:
        path.unlink(missing_ok=True)
    return len(leftovers)


def read_column(path: Path, *columns: str) -> pa.Table:
    """Columns of one shard. Raises InputError, with its name, for a file that is no shard."""
    try:
        return pq.read_table(path, columns=list(columns), memory_map=False, partitioning=None)
    except (OSError, pa.ArrowInvalid, KeyError) as error:
        raise InputError(
            f"{path} is no readable shard: {reason_of(error)}. Move it away and resume; its maps are made anew."
        ) from error


def committed_ids(folder: Path) -> set[str]:
    """The ids of all rows in committed shards. Raises InputError where one stands in two of them."""
    done: set[str] = set()
    for path in shard_files(folder):
        ids = read_column(path, "id")["id"].to_pylist()
        before = len(done)
        done.update(ids)
        if len(done) - before != len(ids):
            raise InputError(f"{path} holds records that other shards hold too; was it copied here? Move it away.")
    return done


def drop_errors(folder: Path) -> int:
    """Take the rows of failed records out of the shards, so that they are tried again; how many there were.

    Each shard is replaced in one step; one that would be empty is deleted.
    """
    dropped = 0
    for path in shard_files(folder):
        status = read_column(path, "status")["status"].to_pylist()
        failed = status.count("error")
        dropped += failed
        if failed == len(status):
            path.unlink()
        elif failed:
            with pq.ParquetFile(path) as old:
                new = ShardWriter(path, old.schema_arrow)
                for batch in old.iter_batches(ROW_GROUP):
                    new.add([row for row in batch.to_pylist() if row["status"] != "error"])
            new.commit()
    return dropped


def next_name(folder: Path, worker: str) -> Iterator[Path]:
    """Free names for a worker's shards: maps-WORKER-00000.parquet and on."""
    number = 0
    while True:
        path = folder / f"maps-{worker}-{number:05d}{SUFFIX}"
        if not os.path.exists(path):
            yield path
        number += 1
