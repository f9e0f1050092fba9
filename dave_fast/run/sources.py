"""Open a source by its name: folders, lists and Parquet manifests here, others in `tars` and `huggingface`.

The kind of a source follows from its name:

    FOLDER                    images in it and below; ids are the paths below it
    LIST.txt                  a path or URL a line
    LIST.csv  .tsv  .jsonl    columns uri (or path), and optionally id, target, seed
    MANIFEST.parquet          the same columns; a glob or a folder of Parquet files too
    SHARDS-{000..099}.tar     WebDataset; globs too
    hf://NAME[:SPLIT]         a Hugging Face dataset, saved on disk or on the hub

Lists, manifests, tars and images may be at any URL that fsspec reads.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import io
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from dave_fast.errors import DaveFastError, InputError, reason_of
from dave_fast.files import open_file
from dave_fast.images import walk_images
from dave_fast.run.huggingface import dataset_source, is_saved_dataset
from dave_fast.run.limits import Limits
from dave_fast.run.records import Record, RecordSource, as_int64, count_unique, is_local, located, opened, printable
from dave_fast.run.tars import TARS, tar_source
from dave_fast.run.texts import checked_text

LISTS = (".txt", ".csv", ".tsv", ".jsonl")
_ROWS = 65536
# The most characters of a line of a list; a list may have no ends of lines, and be endless.
_LINE = 2**24
_COLUMNS = ("id", "uri", "path", "target", "seed")
_LIMITS = Limits()


def open_source(
    place: str,
    *,
    labels: bool = False,
    leave_out: str | os.PathLike[str] | None = None,
    limits: Limits = _LIMITS,
) -> RecordSource:
    """Open the source that the user named.

    Args:
        place: a name as in the module's docstring.
        labels: whether the labels of tars (.cls) and datasets (`label`) are the targets.
        leave_out: a folder whose images are no part of a folder source: the one of the results.
        limits: of the images that the source itself reads, those in tars.

    Raises:
        InputError: there is no such source, it is empty, has no labels, or an id occurs twice.
    """
    if "\0" in place:
        raise InputError(f"{place!r} is no source: no name has a NUL in it.")
    name = place.lower() if is_local(place) else place.lower().split("::", 1)[0].split("?", 1)[0]
    if name.endswith(TARS):
        return tar_source(place, labels=labels, limits=limits)
    if place.startswith("hf://") and not name.endswith((".parquet", *LISTS)):
        return dataset_source(place, labels=labels)
    if is_local(place) and is_saved_dataset(place):
        return dataset_source(f"hf://{place}", labels=labels)
    if labels:
        raise InputError("--target label: only tars and datasets have labels; lists name theirs in a column 'target'.")
    if name.endswith(".parquet") or (is_local(place) and glob.glob(os.path.join(glob.escape(place), "*.parquet"))):
        return _listed(place, "manifest", lambda: _parquet_records(place))
    if name.endswith(LISTS):
        return _listed(place, "list", lambda: _list_records(place))
    return _folder(place, leave_out)


def _folder(place: str, leave_out: str | os.PathLike[str] | None) -> RecordSource:
    if not is_local(place):
        raise InputError(f"{place!r} is no list, manifest or tar; for a remote folder, give a list of its images.")
    if not os.path.exists(place):
        raise InputError(f"there is no file or folder {place}: check the path.")
    if not os.path.isdir(place):
        known = ", ".join((*LISTS, ".parquet", *TARS))
        raise InputError(f"{place} is no source: expected a folder, or a file that ends in {known}.")
    root = os.path.abspath(place)

    def records() -> Iterator[Record]:
        for path in walk_images(root, skip=leave_out, follow=True):
            yield Record(printable(Path(path).relative_to(root).as_posix()), path)

    source = _listed(place, "folder", records)
    if not source.count:
        raise InputError(f"there is no image in {place}; name tars and Parquet manifests by their files.")
    return source


def _listed(place: str, kind: str, records: Callable[[], Iterator[Record]]) -> RecordSource:
    """Return a source whose records are cheap to list: they are counted, hashed and checked for doubles here."""
    digest = hashlib.blake2b(digest_size=16)

    def ids() -> Iterator[str]:
        for record in records():
            digest.update(f"{record.id}\0{record.target}\0{record.seed}\n".encode())
            yield record.id

    count = count_unique(ids(), place)
    if not count and kind != "folder":
        raise InputError(f"{place} names no image: list at least one.")
    identity = {"kind": kind, "records": count, "digest": digest.hexdigest()}
    return RecordSource(place, identity, count, lambda skip: (r for r in records() if not skip(r.id)))


def record_of(row: dict[str, Any], folder: str, where: str) -> Record:
    """Return the record of a line of a list or manifest.

    Args:
        row: the line's columns.
        folder: the folder or URL that relative uris start at.
        where: place of the line in messages, as in "FILE, line 7".

    Raises:
        InputError: there is no uri, or target or seed is no integer.
    """
    uri = row.get("uri") or row.get("path")
    if not isinstance(uri, str) or not uri.strip():
        raise InputError(f"{where}: there is no uri; expected columns uri (or path), and optionally id, target, seed.")
    uri = checked_text(uri.strip(), f"{where}: uri")
    name = row.get("id")
    name = uri if name is None or name == "" else checked_text(name, f"{where}: id")
    return Record(
        printable(name),
        located(uri, folder),
        as_int64(row.get("target"), f"{where}: target"),
        as_int64(row.get("seed"), f"{where}: seed"),
    )


def _list_records(place: str) -> Iterator[Record]:
    folder, kind = _folder_of(place), place.lower().split("?", 1)[0].rpartition(".")[2]
    rows: Iterable[dict[str, Any] | None]
    with _text(place) as file:
        lines = _Lines(place, file)
        if kind == "txt":
            rows = ({"uri": line} if line.strip() else None for line in lines)
        elif kind == "jsonl":
            rows = (_json_row(line, lines.where) for line in lines)
        else:
            rows = _csv_rows(lines, "\t" if kind == "tsv" else ",")
        for row in rows:
            if row:
                yield record_of(row, folder, lines.where)


class _Lines:
    """The lines of a text file, and in `where` the place of the last one, as in "FILE, line 7"."""

    def __init__(self, place: str, file: io.TextIOWrapper) -> None:
        self._place, self._file = place, file
        self.where = f"{place}, line 1"

    def __iter__(self) -> Iterator[str]:
        for number in itertools.count(1):
            try:
                line = self._file.readline(_LINE + 1)
            # Each file system of fsspec raises errors of its own.
            except Exception as error:
                raise InputError(f"cannot read {self._place}: {reason_of(error)}.") from error
            if not line:
                return
            self.where = f"{self._place}, line {number}"
            if len(line) > _LINE or "\0" in line:
                what = "has a NUL character" if "\0" in line else f"has more than {_LINE} characters"
                raise InputError(f"{self.where} {what}: expected lines of text in UTF-8.")
            yield line


def _csv_rows(lines: _Lines, delimiter: str) -> Iterator[dict[str, Any]]:
    try:
        # Strict, since else a quote that is never closed takes the records behind it.
        rows = csv.DictReader(lines, delimiter=delimiter, restkey="", strict=True)
        _check_columns(list(rows.fieldnames or []), lines.where)
        yield from rows
    except csv.Error as error:
        raise InputError(f"{lines.where} is no {delimiter!r}-separated text: {reason_of(error)}.") from error


def _check_columns(names: list[str], where: str) -> None:
    """Raise InputError if a column that is read is there twice."""
    for name in _COLUMNS:
        if names.count(name) > 1:
            raise InputError(f"{where}: there are {names.count(name)} columns {name}; expected one.")


def _json_row(line: str, where: str) -> dict[str, Any] | None:
    if not line.strip():
        return None
    try:
        row = json.loads(line)
    # Besides what is no JSON: numbers of thousands of digits, thousands of brackets.
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is no JSON: {reason_of(error)}; expected one object a line.") from error
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected a JSON object with a uri; got {type(row).__name__}.")
    return row


def _text(place: str) -> io.TextIOWrapper:
    """Open a text file, without its byte order mark."""
    import fsspec

    try:
        file = open_file(place) if is_local(place) else fsspec.open(place, "rb").open()
    # Each file system of fsspec raises errors of its own.
    except Exception as error:
        raise InputError(f"cannot read {place}: {reason_of(error)}.") from error
    return io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")


def _parquet_records(place: str) -> Iterator[Record]:
    """Yield the records of one Parquet file, of those in a folder, or of those that a glob matches."""
    import pyarrow.parquet as pq

    for path in _parquet_files(place):
        folder, number = _folder_of(path), 0
        try:
            with opened(path) as handle, pq.ParquetFile(handle) as file:
                names = file.schema_arrow.names
                _check_columns(names, path)
                columns = [c for c in _COLUMNS if c in names]
                for batch in file.iter_batches(_ROWS, columns=columns):
                    for row in batch.to_pylist():
                        number += 1
                        yield record_of(row, folder, f"{path}, row {number}")
        except DaveFastError:
            raise
        # pyarrow's errors are of many classes: its own, UnicodeDecodeError, OverflowError, MemoryError ...
        except Exception as error:
            raise InputError(f"cannot read {path} behind row {number}: {reason_of(error)}.") from error


def _parquet_files(place: str) -> list[str]:
    import fsspec

    if is_local(place):
        place = os.path.join(glob.escape(place), "*.parquet") if os.path.isdir(place) else place
        files = sorted(glob.glob(place)) if glob.has_magic(place) and not os.path.exists(place) else [place]
    elif glob.has_magic(place):
        try:
            files = sorted(file.full_name for file in fsspec.open_files(place))
        # Each file system of fsspec raises errors of its own.
        except Exception as error:
            raise InputError(f"cannot read {place}: {reason_of(error)}.") from error
    else:
        files = [place]
    if not files:
        raise InputError(f"there is no file {place}: check the path or the pattern.")
    return files


def _folder_of(place: str) -> str:
    """Return the folder or URL that relative uris in a list start at."""
    return os.path.dirname(os.path.abspath(place)) if is_local(place) else place.rsplit("/", 1)[0]
