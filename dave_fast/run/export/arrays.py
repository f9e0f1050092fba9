"""The maps of a run as arrays: Zarr v3, .npy."""

from __future__ import annotations

import csv

import numpy as np

from dave_fast.run.export.job import Job, package, whole
from dave_fast.run.reader import Maps

# Maps in one Zarr shard, which keeps the number of files small.
_ZARR_SHARD = 512
_INDEX = ("id", "uri", "target", "prediction", "probability", "seed", "n_samples")


def write_zarr(job: Job) -> int:
    """Write a Zarr group: `map` (N, H, W) and `raw` (N, 3, H, W) if kept, float32, one map a chunk; small columns."""
    zarr, maps = package("zarr", "zarr"), job.maps
    with whole(job.target, folder=True) as folder:
        group = zarr.open_group(folder, mode="w", zarr_format=3)
        group.attrs["dave_fast"] = maps.identity
        group.attrs["id"], group.attrs["uri"] = maps.ids, maps.column("uri").tolist()
        for name in ("target", "prediction", "probability", "seed", "n_samples"):
            column = maps.column(name)
            group.create_array(name, shape=column.shape, dtype=column.dtype, dimension_names=["record"])[:] = column
        arrays = {
            name: group.create_array(
                name,
                shape=shape,
                chunks=(1, *shape[1:]),
                shards=(min(_ZARR_SHARD, len(maps)), *shape[1:]),
                dtype=np.float32,
                dimension_names=["record", "channel", "y", "x"] if name == "raw" else ["record", "y", "x"],
            )
            for name, shape in _shapes(maps).items()
        }
        for start in range(0, len(maps), _ZARR_SHARD):
            rows = list(maps[start : start + _ZARR_SHARD])
            for name, array in arrays.items():
                array[start : start + len(rows)] = np.stack([getattr(row, name) for row in rows])
            job.progress(start + len(rows))
    return 0


def write_npy(job: Job) -> int:
    """Write maps.npy (N, H, W) and raw.npy (N, 3, H, W) if kept, float32, and index.csv in the same order.

    The index also says whether the run's maps are shrunk, and their depth.
    """
    files, maps = {"map": "maps.npy", "raw": "raw.npy"}, job.maps
    with whole(job.target, folder=True) as folder:
        arrays = {
            name: np.lib.format.open_memmap(folder / files[name], "w+", np.float32, shape)
            for name, shape in _shapes(maps).items()
        }
        for number, row in enumerate(maps):
            for name, array in arrays.items():
                array[number] = getattr(row, name)
            job.progress(number + 1)
        for array in arrays.values():
            array.flush()
        with open(folder / "index.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow((*_INDEX, "shrink", "depth"))
            # NaN is a missing probability, an empty field in a table
            rows = zip(*(maps.column(name).tolist() for name in _INDEX), strict=True)
            of_all = job.configuration["shrink"], maps.depth
            writer.writerows([*(None if value != value else value for value in row), *of_all] for row in rows)
    return 0


def _shapes(maps: Maps) -> dict[str, tuple[int, ...]]:
    """Return the shapes of "map", (N, H, W), and of "raw", (N, 3, H, W), if the run kept it."""
    first = maps[0]
    return {name: (len(maps), *array.shape) for name in ("map", "raw") if (array := getattr(first, name)) is not None}
