"""Read the maps of a run: by id or number, as NumPy arrays, as a torch Dataset.

Opening a run reads the small columns of every shard; maps are read when they are used, one row group at a time.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from dave_fast.errors import InputError
from dave_fast.explain.depth import name_of
from dave_fast.images.drawing import Style, draw_over
from dave_fast.images.geometry import Geometry
from dave_fast.models.labels import Labels
from dave_fast.models.spec import class_names
from dave_fast.run.contents import read_picture
from dave_fast.run.identity import RUN_FILE, load_identity, load_labels
from dave_fast.run.records import Record, unprintable
from dave_fast.run.shards import SMALL, VERIFIED, read_column, reading, shard_files

if TYPE_CHECKING:
    import torch

# Row groups in the cache, of 32 maps each.
_CACHED_GROUPS = 8


@dataclass(frozen=True)
class MapRecord:
    """The row of a record.

    Attributes:
        id: the record's id.
        uri: path or URL of the image.
        target: the class that was explained, None without a map.
        prediction: the most probable class, None without a map.
        probability: of the target for the unperturbed image, None without a map and for a model without probabilities.
        seed: seed of the draws.
        n_samples: samples of the map.
        status: "ok" or "error".
        error: why there is no map, or None.
        map: (H, W) float32 in [0, 1], None if the status is "error".
        raw: signed contributions (3, H, W) float32, None if the run did not keep them.
        output: the model's output (K,) float32, None if the run did not keep it.
    """

    id: str
    uri: str
    target: int | None
    prediction: int | None
    probability: float | None
    seed: int
    n_samples: int
    status: str
    error: str | None
    map: np.ndarray | None
    raw: np.ndarray | None = None
    output: np.ndarray | None = None


def open_maps(folder: str | os.PathLike[str]) -> Maps:
    """Open the rows that a run has committed to `folder`; the run may still be at work.

    Raises:
        InputError: the folder holds no run, or one that has not committed anything yet.
    """
    path = Path(folder)
    identity = load_identity(path)
    if identity is None:
        raise InputError(f"{path} holds no run of dave-fast (there is no {RUN_FILE} in it).")
    files = shard_files(path)
    tables = []
    for number, file in enumerate(files):
        table = read_column(file, *SMALL)
        rows = pa.array(np.arange(table.num_rows))
        where = pa.array(np.full(table.num_rows, number))
        tables.append(table.append_column("_shard", where).append_column("_row", rows))
    if not tables:
        raise InputError(f"{path} holds a run that has not committed anything yet; wait for its first shard.")
    return Maps(identity, _Shards(files), pa.concat_tables(tables), load_labels(path, identity))


class Maps:
    """Rows of a run, read lazily, as a sequence that can be pickled for the workers of a DataLoader.

    `maps["id"]` and `maps[7]` are a `MapRecord`; a slice, or a list of ids or numbers, gives `Maps` again.

    Attributes:
        identity: the content of the run's `run.json`.
        labels: the classes, with their names where the model has some.
    """

    def __init__(self, identity: dict[str, Any], shards: _Shards, table: pa.Table, labels: Labels) -> None:
        self.identity, self.labels = identity, labels
        self._shards = shards
        self._table = table

    def __repr__(self) -> str:
        failed, asked = int((self.column("status") == "error").sum()), self.identity["configuration"]
        return (
            f"Maps of {len(self)} records{f', {failed} of them with errors' if failed else ''}, by "
            f"{asked.get('model', 'a model')}, at {name_of(self.depth)}\n"
            '  maps["ID"] or maps[0] is a record with .map, maps.overlay("ID") its picture; maps[:10], '
            '.filter(status="ok"), .column("probability")'
        )

    def __len__(self) -> int:
        return self._table.num_rows

    def __iter__(self) -> Iterator[MapRecord]:
        return (self[number] for number in range(len(self)))

    def __contains__(self, record_id: object) -> bool:
        return record_id in self._numbers

    @property
    def depth(self) -> str | int:
        """The depth of the maps: "pixels", or the number of the block whose tokens they are made of."""
        return self.identity["configuration"]["depth"]

    @cached_property
    def geometry(self) -> Geometry:
        """How the model resizes and crops photographs."""
        return Geometry.from_config(self.identity["configuration"]["preprocessing"])

    @cached_property
    def ids(self) -> list[str]:
        """The ids, in the order of the rows."""
        return self._table["id"].to_pylist()

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {record_id: number for number, record_id in enumerate(self.ids)}

    def overlay(self, which: int | str, **style: Any) -> Image.Image:
        """Return the map of a record over its photograph, which is read again, in the photograph's own size.

        Args:
            which: the id or the number of the record.
            style: keywords of `dave_fast.images.drawing.Style`.

        Raises:
            KeyError: there is no such id.
            IndexError: there is no such number.
            InputError: the record has no map.
            ImageError: the photograph cannot be read.
        """
        row = self._row(self._number(which))
        if row.map is None:
            raise InputError(f"the record {row.id} has no map: {row.error}")
        photograph = read_picture(Record(row.id, unprintable(row.uri)))
        return draw_over(photograph, row.map, self.geometry.seen(*photograph.size), Style(**style))

    def column(self, name: str) -> np.ndarray:
        """Return a small column, such as target, probability or status: (N,); missing integers are −1."""
        if name not in SMALL:
            raise InputError(f"there is no column {name!r}; expected one of {', '.join(SMALL)}.")
        column = self._table[name]
        if pa.types.is_integer(column.type):
            column = column.fill_null(-1)
        return column.to_numpy()

    def filter(
        self,
        *,
        status: str | None = None,
        target: int | Sequence[int] | None = None,
        prediction: int | Sequence[int] | None = None,
        where: Callable[[dict[str, np.ndarray]], np.ndarray] | None = None,
    ) -> Maps:
        """Return the rows that meet all given conditions.

        Args:
            status: "ok" or "error".
            target: the explained class, or several.
            prediction: the most probable class, or several.
            where: function of the small columns by name, (N,) each, to a boolean array (N,), as in
                `lambda c: c["probability"] > 0.9`.
        """
        keep = np.ones(len(self), bool)
        if status is not None:
            if status not in ("ok", "error"):
                raise InputError(f"status is {status!r}; expected 'ok' or 'error'.")
            keep &= self.column("status") == status
        for name, wanted in (("target", target), ("prediction", prediction)):
            if wanted is not None:
                keep &= np.isin(self.column(name), np.atleast_1d(np.asarray(wanted)))
        if where is not None:
            chosen = np.asarray(where({name: self.column(name) for name in SMALL}))
            if chosen.shape != keep.shape or chosen.dtype != bool:
                raise InputError(f"`where` gave {chosen.dtype} {chosen.shape}; expected bool ({len(self)},).")
            keep &= chosen
        return self._of(self._table.filter(pa.array(keep)))

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            key = range(*key.indices(len(self)))
        if isinstance(key, str) or not isinstance(key, Sequence | np.ndarray):
            return self._row(self._number(key))
        numbers = [self._number(each) for each in key]
        return self._of(self._table.take(pa.array(numbers, pa.int64())))

    def named(self, names: str | os.PathLike[str] | Sequence[str]) -> Maps:
        """Return the same rows with other class names.

        Args:
            names: K names, or a file of them as `ModelSpec.labels` has it.

        Raises:
            InputError: the file cannot be read, or there are others than K.
        """
        found, count = class_names(names), self.labels.count
        if count not in (None, len(found)):
            raise InputError(f"there are {len(found)} class names; expected {count}, as many as the model has classes.")
        return Maps(self.identity, self._shards, self._table, Labels(count, found))

    def _of(self, table: pa.Table) -> Maps:
        return Maps(self.identity, self._shards, table, self.labels)

    def numpy(self) -> np.ndarray:
        """Return the maps of all rows, (N, H, W) float32.

        Raises:
            InputError: a row has no map, or sizes differ.
        """
        arrays: list[np.ndarray] = []
        for row in self:
            if row.map is None:
                raise InputError(f"{row.id} has no map; choose with .filter(status='ok').")
            if arrays and row.map.shape != arrays[0].shape:
                raise InputError(f"maps differ in size: {arrays[0].shape} and {row.map.shape} ({row.id}).")
            arrays.append(row.map)
        if not arrays:
            configured = self.identity["configuration"]["preprocessing"]["input_size"]
            return np.empty((0, *configured[1:]), np.float32)
        return np.stack(arrays)

    def torch(self) -> torch.utils.data.Dataset[dict[str, Any]]:
        """Return a map-style Dataset of dictionaries with id, map, target, prediction, probability and raw if kept."""
        return cast("torch.utils.data.Dataset[dict[str, Any]]", MapDataset(self))

    def _number(self, key: Any) -> int:
        if isinstance(key, str):
            if key not in self._numbers:
                raise KeyError(f"no row has the id {key!r}")
            return self._numbers[key]
        number = operator.index(key)
        if not -len(self) <= number < len(self):
            raise IndexError(f"row {number} of {len(self)}")
        return number % len(self)

    def _row(self, number: int) -> MapRecord:
        (row,) = self._table.slice(number, 1).to_pylist()
        shard, place, height, width, dtype, scale = (
            row.pop(name) for name in ("_shard", "_row", "height", "width", "dtype", "scale")
        )
        if row["status"] != "ok":
            return MapRecord(**row, map=None)
        with reading(self._shards.files[shard]):
            large = self._shards.row(shard, place)
            stored = np.frombuffer(large["map"], np.dtype(dtype).newbyteorder("<")).reshape(height, width)
            raw = output = None
            if large.get("raw") is not None:
                raw = np.frombuffer(large["raw"], "<f2").reshape(3, height, width).astype(np.float32)
                raw *= np.float32(large["raw_scale"])
            if large.get("output") is not None:
                output = np.frombuffer(large["output"], "<f4").astype(np.float32)
            return MapRecord(**row, map=stored.astype(np.float32) * np.float32(scale), raw=raw, output=output)


class MapDataset:
    """The maps of a run as a map-style dataset of dictionaries, which torch's default collation accepts.

    `torch.utils.data.DataLoader` needs only `__len__` and `__getitem__`; torch is imported with the first item.
    """

    def __init__(self, maps: Maps) -> None:
        self.maps = maps

    def __len__(self) -> int:
        return len(self.maps)

    def __getitem__(self, index: int) -> dict[str, Any]:
        import torch

        row = self.maps[index]
        if row.map is None:
            raise InputError(f"{row.id} has no map; choose with maps.filter(status='ok').torch().")
        item = {
            "id": row.id,
            "map": torch.from_numpy(row.map),
            "target": row.target,
            "prediction": row.prediction,
            # the default collation takes no None
            "probability": float("nan") if row.probability is None else row.probability,
        }
        return item if row.raw is None else item | {"raw": torch.from_numpy(row.raw)}


class _Shards:
    """The shards of a run: open files, and a cache of the row groups that were used last.

    Attributes:
        files: the paths.
    """

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        # Functions without self: a cycle of references would keep the files open after the last use of the maps.
        self._opened = cache(lambda shard: _open(files[shard]))
        self._group = lru_cache(_CACHED_GROUPS)(partial(_read_group, self._opened))

    def __reduce__(self) -> Any:
        return _Shards, (self.files,)

    def row(self, shard: int, row: int) -> dict[str, Any]:
        """Return the large columns of one row."""
        _, starts = self._opened(shard)
        group = int(np.searchsorted(starts, row, side="right")) - 1
        (found,) = self._group(shard, group).slice(row - int(starts[group]), 1).to_pylist()
        return found


def _open(file: Path) -> tuple[pq.ParquetFile, np.ndarray]:
    """Return a shard's file, and the first row of each group and the number of rows."""
    shard = pq.ParquetFile(file, **VERIFIED)
    sizes = [shard.metadata.row_group(g).num_rows for g in range(shard.num_row_groups)]
    return shard, np.cumsum([0, *sizes])


def _read_group(opened: Callable[[int], tuple[pq.ParquetFile, np.ndarray]], shard: int, group: int) -> pa.Table:
    file, _ = opened(shard)
    large = [name for name in file.schema_arrow.names if name not in SMALL]
    return file.read_row_group(group, columns=large)
