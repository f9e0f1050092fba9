"""Export the maps of a run: Zarr v3, .npy, pictures, ViRelAy's HDF5.

Every form is written under a temporary name and renamed when it is complete.
"""

from __future__ import annotations

import csv
import hashlib
import os
import shutil
import unicodedata
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from dave_fast.errors import ImageError, InputError, reason_of
from dave_fast.images import drawing, from_config
from dave_fast.models.spec import Link
from dave_fast.run.contents import read_picture
from dave_fast.run.limits import Limits, within
from dave_fast.run.reader import MapRecord, Maps
from dave_fast.run.records import Record, unprintable

Progress = Callable[[int], None]
# Maps in one Zarr shard, which keeps the number of files small.
_ZARR_SHARD = 512
# The endings of a record's pictures.
_PICTURES = (".map.png", ".overlay.png")
# The most bytes of a picture's name, below the usual 255 of file systems by the ending, a hash and what is temporary;
# and of its path.
_PART_BYTES, _PATH_BYTES = 180, 1000
INDEX = ("id", "uri", "target", "prediction", "probability", "seed", "n_samples")


def export(
    maps: Maps,
    to: str,
    out: str | os.PathLike[str],
    progress: Progress = lambda done: None,
    limits: Limits | None = None,
) -> int:
    """Write the maps (rows with status "ok") in another form.

    Args:
        maps: rows of a run.
        to: "zarr", "npy", "png" or "virelay".
        out: a folder (zarr, npy, png) or a file (virelay) that does not exist yet.
        progress: called with the number of rows written so far.
        limits: of an image that is read again; None: the defaults.

    Returns:
        The number of rows that could not be written in full: pictures whose image could not be read again.

    Raises:
        InputError: `out` exists or cannot be written, a package is missing, there is no map, or the maps have several
            sizes and `to` is not "png".
    """
    if to not in FORMS:
        raise InputError(f"cannot export to {to!r}; expected one of {', '.join(FORMS)}.")
    maps = maps.filter(status="ok")
    if not len(maps):
        raise InputError("there is no map to export, only rows with errors or no rows: choose other rows.")
    target = Path(out)
    if os.path.lexists(target):
        raise InputError(f"{target} exists already; choose another --out, or delete it.")
    sizes = set(zip(maps.column("height").tolist(), maps.column("width").tolist(), strict=True))
    if to != "png" and len(sizes) > 1:
        raise InputError(f"the maps have several sizes, {sorted(sizes)}; expected one: only --to png takes several.")
    if to == "png":
        return _png(maps, target, progress, limits or Limits())
    return FORMS[to](maps, target, progress)


def _package(name: str, form: str) -> Any:
    try:
        return __import__(name)
    except ImportError as error:
        raise InputError(f"--to {form} needs the package {name}: pip install 'dave-fast[export]'.") from error


@contextmanager
def _whole(target: Path, *, folder: bool) -> Iterator[Path]:
    """Yield a temporary path; rename it to `target` when the block ends without an error, else delete it."""
    # Of a name that none has used before: a killed export leaves its part behind, and process ids come again.
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        if folder:
            part.mkdir()
        yield part
        os.rename(part, target)
    except OSError as error:
        raise InputError(f"cannot write {target}: {reason_of(error)}.") from error
    finally:
        if folder:
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


def _shapes(maps: Maps) -> dict[str, tuple[int, ...]]:
    """Return the shapes of "map", (N, H, W), and of "raw", (N, 3, H, W), if the run kept it."""
    first = maps[0]
    return {name: (len(maps), *array.shape) for name in ("map", "raw") if (array := getattr(first, name)) is not None}


def _zarr(maps: Maps, target: Path, progress: Progress) -> int:
    """Write a Zarr group: `map` (N, H, W) and `raw` (N, 3, H, W) if kept, float32, one map a chunk; small columns."""
    zarr = _package("zarr", "zarr")
    with _whole(target, folder=True) as folder:
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
            progress(start + len(rows))
    return 0


def _npy(maps: Maps, target: Path, progress: Progress) -> int:
    """Write maps.npy (N, H, W) and raw.npy (N, 3, H, W) if kept, float32, and index.csv in the same order.

    The index also says whether the run's maps are shrunk, and their depth.
    """
    files = {"map": "maps.npy", "raw": "raw.npy"}
    with _whole(target, folder=True) as folder:
        arrays = {
            name: np.lib.format.open_memmap(folder / files[name], "w+", np.float32, shape)
            for name, shape in _shapes(maps).items()
        }
        for number, row in enumerate(maps):
            for name, array in arrays.items():
                array[number] = getattr(row, name)
            progress(number + 1)
        for array in arrays.values():
            array.flush()
        with open(folder / "index.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow((*INDEX, "shrink", "depth"))
            # NaN is a missing probability, an empty field in a table
            rows = zip(*(maps.column(name).tolist() for name in INDEX), strict=True)
            of_all = maps.identity["configuration"]["shrink"], maps.depth
            writer.writerows([*(None if value != value else value for value in row), *of_all] for row in rows)
    return 0


def _png(maps: Maps, target: Path, progress: Progress, limits: Limits) -> int:
    """Write ID.map.png and ID.overlay.png of each record, whose image is read again; return how many were not found."""
    prepare = from_config(maps.identity["configuration"]["preprocessing"])
    missing, first = 0, ""
    names = _file_names(maps.ids)
    with _whole(target, folder=True) as folder:
        for number, (name, row) in enumerate(zip(names, maps, strict=True)):
            heat = row.map
            assert heat is not None
            drawing.save_picture(drawing.plain_map(heat), folder / f"{name}.map.png")
            try:
                record = Record(row.id, unprintable(row.uri))
                image = within(limits.seconds, partial(read_picture, record, limits))
                drawing.save_picture(drawing.overlay(prepare.crop(image), heat), folder / f"{name}.overlay.png")
            except ImageError as error:
                missing, first = missing + 1, first or str(error)
            progress(number + 1)
        if missing == len(maps):
            raise InputError(f"no image could be read again, so there is nothing to lay the maps over: {first}")
    return missing


def _file_names(ids: Sequence[str]) -> list[str]:
    """Return a relative path for each id, of which no two make one file, whatever the file system takes to be equal.

    It is the id as far as that can name a file. Where another id has made the file before, or makes a folder of that
    name, a hash of the id follows.
    """
    plain = [_file_name(record_id) for record_id in ids]
    taken = {_folded(str(folder)) for name in plain for folder in PurePosixPath(name).parents}
    names = []
    for record_id, name in zip(ids, plain, strict=True):
        unique, number = name, 0
        while not taken.isdisjoint(files := {_folded(f"{unique}{ending}") for ending in _PICTURES}):
            unique, number = f"{name}-{_hash(record_id * (number + 1))}", number + 1
        taken |= files
        names.append(unique)
    return names


def _file_name(record_id: str) -> str:
    """Return an id as a relative path that cannot leave its folder, and that every file system takes."""
    parts = [part for part in record_id.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    name = "/".join(_cut(part.replace("\0", "").replace(":", "_"), _PART_BYTES) for part in parts) or "_"
    # A path has a limit too.
    return name if len(name.encode()) <= _PATH_BYTES else f"{_cut(parts[-1], _PART_BYTES)}-{_hash(record_id)}"


def _cut(part: str, limit: int) -> str:
    """Return a name of at most so many bytes: the end of a longer one, and a hash of it."""
    content = part.encode()
    return part if len(content) <= limit else f"{content[20 - limit :].decode(errors='ignore')}-{_hash(part)}"


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def _folded(path: str) -> str:
    """Return what is equal for paths that are one file where case or the form of accents does not count."""
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", path).casefold())


def _virelay(maps: Maps, target: Path, progress: Progress) -> int:
    """Write ViRelAy's attribution database: index, attribution (N, C, H, W), label, prediction (N, K).

    The attribution is the signed contributions if the run kept them (--raw), else the map with C = 1. The prediction
    is the probabilities of the outputs if the run kept them (--outputs), or the outputs of a model without
    probabilities; else the explained class's probability, NaN where there is none, and zeros.
    """
    h5py = _package("h5py", "virelay")
    configuration = maps.identity["configuration"]
    # runs of earlier versions hold softmax probabilities
    classes, link = configuration["classes"], configuration.get("link", "softmax")
    first = maps[0]
    if first.output is not None:
        classes = len(first.output)
    if classes is None:
        raise InputError("the model does not say how many classes it has: run with --outputs to export to ViRelAy.")
    shape = first.map.shape if first.raw is None else first.raw.shape[1:]
    channels = 1 if first.raw is None else len(first.raw)
    with _whole(target, folder=False) as path, h5py.File(path, "w") as book:
        book.attrs["dave_fast"] = repr(maps.identity)
        attribution = book.create_dataset(
            "attribution", (len(maps), channels, *shape), np.float32, chunks=(1, channels, *shape), compression="gzip"
        )
        prediction = book.create_dataset("prediction", (len(maps), classes), np.float32)
        book["index"] = np.arange(len(maps), dtype=np.uint32)
        book["label"] = maps.column("target").astype(np.uint32)
        book.create_dataset("id", data=maps.ids, dtype=h5py.string_dtype())
        for number, row in enumerate(maps):
            attribution[number] = row.map if row.raw is None else row.raw
            prediction[number] = _prediction(row, classes, link)
            progress(number + 1)
    return 0


def _prediction(row: MapRecord, classes: int, link: Link) -> np.ndarray:
    if row.output is None:
        found = np.zeros(classes, np.float32)
        found[row.target] = np.nan if row.probability is None else row.probability
        return found
    if link == "softmax":
        exponents = np.exp(row.output - row.output.max())
        return exponents / exponents.sum()
    return row.output if link is None else 1 / (1 + np.exp(-row.output))


FORMS: dict[str, Callable[..., int]] = {"zarr": _zarr, "npy": _npy, "png": _png, "virelay": _virelay}
