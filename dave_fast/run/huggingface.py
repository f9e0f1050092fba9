"""Hugging Face datasets as a source, saved on disk (`save_to_disk`) or on the hub, read by the package `datasets`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from dave_fast.errors import InputError, needs, reason_of
from dave_fast.run.limits import check_bytes
from dave_fast.run.members import read_uri
from dave_fast.run.records import Record, RecordSource, Skip, as_int64, count_unique
from dave_fast.run.texts import checked_text

_COLUMNS = ("id", "target", "seed", "label")
_ROWS = 4096


def is_saved_dataset(place: str) -> bool:
    """Return whether a folder was written by `save_to_disk` of `datasets`."""
    return any(os.path.exists(os.path.join(place, name)) for name in ("dataset_dict.json", "state.json"))


def dataset_source(place: str, *, labels: bool) -> RecordSource:
    """Return the rows of a dataset as a source; ids are those of the column `id`, else SPLIT/ROW.

    Args:
        place: hf://NAME[:SPLIT], NAME a folder or a name on the hub.
        labels: whether the column `label` gives the targets, instead of `target`.

    Raises:
        InputError: the dataset cannot be opened, has no images or no labels, or an id occurs twice.
    """
    dataset, _, name, split = _opened(place)
    if labels and "label" not in dataset.column_names:
        raise InputError(
            f"--target label: {place} has no column 'label'; its columns are {', '.join(dataset.column_names)}."
        )
    identity = {"kind": "dataset", "records": len(dataset), "digest": dataset._fingerprint, "labels": labels}
    present = [c for c in _COLUMNS if c in dataset.column_names]
    if "id" in present:
        ids = enumerate(dataset["id"])
        count_unique((checked_text(value, f"{place}: the id of row {row}") for row, value in ids), place)

    def read(skip: Skip) -> Iterator[Record]:
        # Images are not read here: workers read them by the uri.
        small = dataset.select_columns(present) if present else None
        for start in range(0, len(dataset), _ROWS):
            stop = min(start + _ROWS, len(dataset))
            columns = small[start:stop] if small is not None else {}
            for row in range(start, stop):
                given = {name: values[row - start] for name, values in columns.items()}
                record_id = str(given["id"]) if "id" in given else f"{split}/{row}"
                if not skip(record_id):
                    target = as_int64(given.get("label" if labels else "target"), f"{record_id}: target")
                    seed = as_int64(given.get("seed"), f"{record_id}: seed")
                    yield Record(record_id, f"hf://{name}:{split}#{row}", target, seed)

    return RecordSource(place, identity, len(dataset), read)


def row_content(uri: str, limit: int) -> bytes:
    """Return the encoded image of one row, hf://NAME:SPLIT#ROW.

    Raises:
        TooLargeError: it has more than `limit` bytes.
    """
    place, _, row = uri.rpartition("#")
    pictures, column = _pictures(place)
    return _bytes(pictures[int(row)][column], limit)


def _bytes(cell: Any, limit: int) -> bytes:
    """Return the bytes of an undecoded image, or of the file that it names; b"" for an empty cell."""
    if not cell:
        return b""
    if cell.get("bytes") is None:
        return read_uri(cell["path"], limit)
    check_bytes(len(cell["bytes"]), limit)
    return cell["bytes"]


@lru_cache(maxsize=4)
def _pictures(place: str) -> tuple[Any, str]:
    """Return a dataset of the encoded images alone, and their column: of a whole row all images would be decoded."""
    dataset, column, _, _ = _opened(place)
    return dataset.select_columns([column]), column


@lru_cache(maxsize=4)
def _opened(place: str) -> tuple[Any, str, str, str]:
    """Return the dataset with its images left encoded, their column, its name and its split."""
    with needs("datasets", place):
        import datasets
    name, split = place.removeprefix("hf://"), ""
    if not os.path.exists(name) and ":" in name:
        name, _, split = name.rpartition(":")
    try:
        if os.path.exists(name):
            name = os.path.abspath(name)
            loaded = datasets.load_from_disk(name)
        else:
            loaded = datasets.load_dataset(name)
    except Exception as error:
        raise InputError(f"cannot open the dataset {name}: {reason_of(error)}.") from error
    if isinstance(loaded, dict):
        if not split and len(loaded) == 1:
            split = next(iter(loaded))
        if split not in loaded:
            raise InputError(
                f"{place} has the splits {', '.join(loaded)}: name one, as in hf://{name}:{next(iter(loaded))}."
            )
        loaded = loaded[split]
    split = split or str(loaded.split or "all")
    images = [c for c, feature in loaded.features.items() if isinstance(feature, datasets.Image)]
    if not images:
        raise InputError(f"{place} has no column of images; its columns are {', '.join(loaded.column_names)}.")
    column = "image" if "image" in images else images[0]
    return loaded.cast_column(column, datasets.Image(decode=False)), column, name, split
