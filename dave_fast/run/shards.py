"""Shards: Parquet files with one row a record, which are written whole or not at all.

| column | type | |
|---|---|---|
| id, uri | string | the record |
| target | int64 | the class that was explained |
| prediction | int64 | the most probable class |
| probability | float32 | softmax of the unperturbed image's output at the target |
| seed, n_samples | int64, int32 | of the draws |
| status, error | string | "ok"; or "error" and why there is no map |
| height, width, dtype | int32, int32, string | of the map: float16 or uint8, row by row, little-endian |
| map, scale | binary, float32 | values = map × scale, in [0, 1] |
| raw, raw_scale | binary, float32 | with --raw: signed (3, height, width) float16; values = raw × raw_scale |
| output | binary | with --outputs: the model's output (K,) float32 |

Rows go to a hidden temporary file, one row group at a time; a commit is fsync and rename, so that no part of a shard
is ever visible. The file's metadata holds the run's identity (`identity`) under the key `dave_fast`.
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

ShardRow = dict[str, Any]

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
# All columns but the arrays, from which rows are chosen.
SMALL = [name for name in _COLUMNS if name != "map"]


def schema(identity: Mapping[str, Any]) -> pa.Schema:
    """Return the Parquet schema of a run, with its identity as metadata."""
    configuration = identity["configuration"]
    columns = _COLUMNS | (_RAW if configuration["raw"] else {}) | (_OUTPUT if configuration["outputs"] else {})
    return pa.schema(list(columns.items()), metadata={METADATA_KEY: json.dumps(identity).encode()})


def write_options(columns: Iterable[str]) -> dict[str, Any]:
    """Return the writer's options: compression, no dictionaries, statistics of the columns that rows are chosen by."""
    return {
        "compression": "zstd",
        "compression_level": 1,
        "use_dictionary": False,
        "write_statistics": [name for name in columns if name in ("id", "target", "prediction", "status")],
    }


class ShardWriter:
    """The writer of one shard: `add` rows, then `commit` or `abandon`.

    Args:
        path: the shard's path; it exists after `commit`.
        columns: the schema of the rows.

    Attributes:
        rows: number of rows added.
        bytes: bytes written so far.
    """

    def __init__(self, path: Path, columns: pa.Schema) -> None:
        self.path = path
        self.rows = 0
        self.bytes = 0
        self._columns = columns
        self._pending: list[ShardRow] = []
        self._stack = ExitStack()
        # Opened at once, so that a folder that cannot be written to is found before anything is computed.
        self._file = self._stack.enter_context(atomically(path, durable=True))
        self._writer = pq.ParquetWriter(self._file, columns, **write_options(columns.names))

    def add(self, rows: Sequence[ShardRow]) -> None:
        """Add rows; each full row group is written."""
        self._pending += rows
        self.rows += len(rows)
        with self._abandoned_on_error():
            while len(self._pending) >= ROW_GROUP:
                self._write_group()

    def commit(self) -> Path:
        """Write the remaining rows, sync and rename the file; return the shard's path."""
        with self._abandoned_on_error():
            if self._pending:
                self._write_group()
            self._writer.close()
        self._stack.close()
        return self.path

    def abandon(self, error: BaseException | None = None) -> None:
        """Close and delete the temporary file."""
        error = error or _AbandonedError()
        # The destructor of an open writer would write to the closed file.
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
    """Raised into `atomically` to have the temporary file deleted."""


def shard_files(folder: Path) -> list[Path]:
    """Return the committed shards of a run, sorted by name."""
    return sorted(path for path in folder.glob(f"*{SUFFIX}") if not path.name.startswith("."))


def remove_leftovers(folder: Path) -> int:
    """Delete the temporary files of killed runs and return their number. To be called only under the folder's lock."""
    leftovers = list(folder.glob(f".*{PART}"))
    for path in leftovers:
        path.unlink(missing_ok=True)
    return len(leftovers)


def read_column(path: Path, *columns: str) -> pa.Table:
    """Return columns of one shard.

    Raises:
        InputError: the file is no shard, or cannot be read.
    """
    try:
        return pq.read_table(path, columns=list(columns), memory_map=False, partitioning=None)
    except (OSError, pa.ArrowInvalid, KeyError) as error:
        raise InputError(
            f"{path} is no readable shard: {reason_of(error)}. Move it away and resume; its maps are made again."
        ) from error


def committed_ids(folder: Path) -> set[str]:
    """Return the ids of all rows in committed shards.

    Raises:
        InputError: an id is in two shards, or a shard cannot be read.
    """
    done: set[str] = set()
    for path in shard_files(folder):
        ids = read_column(path, "id")["id"].to_pylist()
        before = len(done)
        done.update(ids)
        if len(done) - before != len(ids):
            raise InputError(f"{path} holds records that other shards hold too; was it copied here? Move it away.")
    return done


def drop_errors(folder: Path) -> int:
    """Remove the rows of failed records from the shards, so that they are tried again; return their number.

    Each shard is replaced in one step; one without other rows is deleted.
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
    """Yield unused paths for a worker's shards: maps-WORKER-00000.parquet, maps-WORKER-00001.parquet and so on."""
    number = 0
    while True:
        path = folder / f"maps-{worker}-{number:05d}{SUFFIX}"
        if not os.path.exists(path):
            yield path
        number += 1
