"""Shards: Parquet files with one row a record, which are written whole or not at all.

| column | type | |
|---|---|---|
| id, uri | string | the record |
| target | int64 | the class that was explained |
| prediction | int64 | the most probable class |
| probability | float32 | the model's probability of the target for the unperturbed image; null: it has none |
| seed, n_samples | int64, int32 | of the draws |
| status, error | string | "ok"; or "error" and why there is no map |
| height, width, dtype | int32, int32, string | of the map: float16 or uint8, row by row, little-endian |
| map, scale | binary, float32 | values = map × scale, in [0, 1] |
| raw, raw_scale | binary, float32 | with --raw: signed (3, height, width) float16; values = raw × raw_scale |
| output | binary | with --outputs: the model's output (K,) float32 |

Rows go to a hidden temporary file, one row group at a time; a commit is fsync and rename, so that no part of a shard
is ever visible. Its pages have checksums, which are verified. The file's metadata holds the run's identity (`identity`)
under the key `dave_fast`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from dave_fast.errors import DaveFastError, InputError, reason_of
from dave_fast.files import atomically, check_file
from dave_fast.run.identity import METADATA_KEY

SUFFIX = ".parquet"
# Temporary files that `files.atomically` makes for a run; others, as those of exports, may be at work.
_LEFTOVER = re.compile(r"\.(run\.json|labels\.json|summary\.json|maps-.+\.parquet)\.\d+\.part")
ROW_GROUP = 32
SHARD_ROWS = 10_000
SHARD_BYTES = 256 * 2**20

# A byte that a disk has changed may still decompress, to another map.
VERIFIED: dict[str, Any] = {"page_checksum_verification": True}

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

_ALL = {*_COLUMNS, *_RAW, *_OUTPUT}
_WITHOUT_GAPS = {"id", "uri", "seed", "n_samples", "status"}


def schema(identity: Mapping[str, Any]) -> pa.Schema:
    """Return the Parquet schema of a run, with its identity as metadata."""
    configuration = identity["configuration"]
    columns = _COLUMNS | (_RAW if configuration["raw"] else {}) | (_OUTPUT if configuration["outputs"] else {})
    return pa.schema(list(columns.items()), metadata={METADATA_KEY: json.dumps(identity).encode()})


class ShardWriter:
    """The writer of one shard's rows; see `new_shard`.

    Args:
        file: the shard's file.
        columns: the schema of the rows.

    Attributes:
        rows: number of rows added.
    """

    def __init__(self, file: IO[bytes], columns: pa.Schema) -> None:
        self.rows = 0
        self._file, self._columns = file, columns
        self._pending: list[ShardRow] = []
        # Statistics of the columns that rows are chosen by.
        statistics = [name for name in columns.names if name in ("id", "target", "prediction", "status")]
        self.parquet = pq.ParquetWriter(
            file,
            columns,
            compression="zstd",
            compression_level=1,
            use_dictionary=False,
            write_statistics=statistics,
            write_page_checksum=True,
        )

    @property
    def bytes(self) -> int:
        """Bytes written so far."""
        return self._file.tell()

    def add(self, rows: Sequence[ShardRow]) -> None:
        """Add rows; each full row group is written."""
        self._pending += rows
        self.rows += len(rows)
        while len(self._pending) >= ROW_GROUP:
            self._write_group()

    def close(self) -> None:
        """Write the remaining rows and the file's metadata."""
        if self._pending:
            self._write_group()
        self.parquet.close()

    def _write_group(self) -> None:
        group, self._pending = self._pending[:ROW_GROUP], self._pending[ROW_GROUP:]
        self.parquet.write_table(pa.Table.from_pylist(group, schema=self._columns))


@contextmanager
def new_shard(path: Path, columns: pa.Schema) -> Iterator[ShardWriter]:
    """Yield the writer of a shard that is committed when the block ends without an exception, and dropped otherwise.

    Args:
        path: of the shard; a shard that is there is replaced.
        columns: the schema of the rows.
    """
    with atomically(path, durable=True) as file:
        writer = ShardWriter(file, columns)
        try:
            yield writer
            writer.close()
        finally:
            # The destructor of an open writer would write to the closed file.
            writer.parquet.is_open = False


def shard_files(folder: Path) -> list[Path]:
    """Return the committed shards of a run, sorted by name."""
    return sorted(path for path in folder.glob(f"*{SUFFIX}") if not path.name.startswith("."))


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files of killed runs. To be called only under the folder's lock."""
    for path in folder.glob(".*.part"):
        if _LEFTOVER.fullmatch(path.name) and path.is_file() and not path.is_symlink():
            path.unlink(missing_ok=True)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raise InputError, with the shard's name, for every error of the block, which reads a shard."""
    try:
        check_file(path)
        yield
    except DaveFastError:
        raise
    # What a flipped byte leads to is of many classes: pyarrow's own, UnicodeDecodeError, MemoryError ...
    except Exception as error:
        raise InputError(
            f"{path} is no readable shard: {reason_of(error)}. Move it away and resume; its maps are made again."
        ) from error


def read_column(path: Path, *columns: str) -> pa.Table:
    """Return columns of one shard.

    Raises:
        InputError: the file is no shard, or cannot be read.
    """
    with reading(path):
        table = pq.read_table(path, columns=list(columns), memory_map=False, partitioning=None, **VERIFIED)
        # A column of another type is found here, text that is no Unicode by `validate`.
        table = table.cast(pa.schema([(name, _COLUMNS[name]) for name in columns]))
        table.validate(full=True)
        for name in _WITHOUT_GAPS.intersection(columns):
            if table[name].null_count:
                raise ValueError(f"a row has no {name}")
        return table


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


def drop_errors(folder: Path) -> None:
    """Remove the rows of failed records from the shards, so that they are tried again.

    Each shard is replaced in one step; one without other rows is deleted.
    """
    for path in shard_files(folder):
        status = read_column(path, "status")["status"].to_pylist()
        if set(status) == {"error"}:
            path.unlink()
        elif "error" in status:
            with reading(path):
                columns = pq.read_schema(path)
                if not set(columns.names) <= _ALL:
                    raise ValueError("it has columns that no run writes")
            with new_shard(path, columns) as new:
                for rows in _groups(path):
                    new.add([row for row in rows if row["status"] != "error"])


def _groups(path: Path) -> Iterator[list[ShardRow]]:
    """Yield the rows of a shard, a group at a time. Its errors are of reading, whatever the rows are written to."""
    with reading(path), pq.ParquetFile(path, **VERIFIED) as file:
        for batch in file.iter_batches(ROW_GROUP):
            yield batch.to_pylist()


def next_name(folder: Path, worker: str) -> Iterator[Path]:
    """Yield unused paths for a worker's shards: maps-WORKER-00000.parquet, maps-WORKER-00001.parquet and so on."""
    paths = (folder / f"maps-{worker}-{number:05d}{SUFFIX}" for number in count())
    return (path for path in paths if not path.exists())
