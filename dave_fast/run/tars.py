"""WebDataset tars as a source, read sequentially without an index.

A sample is a sequence of members whose names are equal up to the first dot of the file's name, its key. Its image is
the first member with an image's suffix, its label the member `.cls`, its id shard/key.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import tarfile
from collections.abc import Iterator
from functools import partial
from itertools import groupby

from dave_fast.errors import InputError, reason_of
from dave_fast.images import is_image
from dave_fast.run.limits import Limits
from dave_fast.run.members import Tar
from dave_fast.run.records import Record, RecordSource, Skip, as_int64, is_local, opened, printable

TARS = (".tar", ".tar.gz", ".tgz")
# The most bytes of a label.
_LABEL_BYTES = 2**12


def tar_source(place: str, *, labels: bool, limits: Limits) -> RecordSource:
    """Return the samples of tars as a source.

    Args:
        place: a path or fsspec URL, with {000..099} and globs.
        labels: whether the members `.cls` give the targets.
        limits: of an image.

    Raises:
        InputError: there is no such tar, or they cannot be listed.
    """
    shards = _shards(place)
    names = _names([url for url, _ in shards])
    sizes = hashlib.blake2b(digest_size=16)
    for name, (_, size) in zip(names, shards, strict=True):
        sizes.update(f"{name}\0{size}\n".encode())
    identity = {"kind": "tars", "shards": len(shards), "digest": sizes.hexdigest(), "labels": labels}

    parts = {
        name: partial(_samples, url, name, labels, limits.bytes) for name, (url, _) in zip(names, shards, strict=True)
    }

    def read(skip: Skip) -> Iterator[Record]:
        failed = None
        for part in parts.values():
            try:
                yield from part(skip)
            # The others are read first.
            except InputError as error:
                failed = failed or error
        if failed is not None:
            raise failed

    return RecordSource(place, identity, None, read, parts)


def expand_braces(text: str) -> list[str]:
    """Return the names that a pattern stands for: `a-{08..10}.tar` is a-08.tar, a-09.tar, a-10.tar; `{a,b}` too."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", text)
    if found is None:
        return [text]
    if found[3] is not None:
        middle = found[3].split(",")
    else:
        width = len(found[1]) if found[1].startswith("0") else 0
        middle = [f"{n:0{width}d}" for n in range(int(found[1]), int(found[2]) + 1)]
    return [whole for m in middle for whole in expand_braces(text[: found.start()] + m + text[found.end() :])]


def _shards(place: str) -> list[tuple[str, int]]:
    """Return (path or URL, bytes) of each tar, without repeats."""
    import fsspec

    found: dict[str, int] = {}
    for pattern in expand_braces(place):
        if is_local(pattern):
            literal = os.path.exists(pattern) or not glob.has_magic(pattern)
            for path in [pattern] if literal else sorted(glob.glob(pattern, recursive=True)):
                if not os.path.isfile(path):
                    raise InputError(f"there is no file {path}: check the path.")
                found[os.path.abspath(path)] = os.path.getsize(path)
            continue
        try:
            fs, path = fsspec.url_to_fs(pattern)
            for each in sorted(fs.glob(path)) if glob.has_magic(path) else [path]:
                found[fs.unstrip_protocol(each)] = fs.size(each) or 0
        except (OSError, ImportError, ValueError) as error:
            raise InputError(f"cannot list {pattern}: {reason_of(error)}.") from error
    if not found:
        raise InputError(f"there is no tar {place}: check the path or the pattern.")
    return list(found.items())


def _names(urls: list[str]) -> list[str]:
    """Return the shards' names in ids: file names without suffix, relative paths if file names repeat."""
    names = [url.rsplit("/", 1)[-1] for url in urls]
    if len(set(names)) < len(names):
        common = os.path.commonpath([url.split("://")[-1] for url in urls])
        names = [os.path.relpath(url.split("://")[-1], common) for url in urls]
    return [re.sub(r"\.(tar|tar\.gz|tgz)$", "", name, flags=re.IGNORECASE) for name in names]


def _samples(url: str, shard: str, labels: bool, limit: int, skip: Skip) -> Iterator[Record]:
    """Yield the samples of one tar; the members of skipped ones are not read."""
    local = is_local(url)
    chained = f"file://{url}" if local else url
    try:
        with opened(url) as file:
            tar = Tar(file, local=local)
            damage: list[Exception] = []
            for key, members in groupby(_visible_files(tar, limit, damage), _key):
                record_id = printable(f"{shard}/{key}")
                if skip(record_id):
                    continue
                image = target = content = wrong = None
                for member in members:
                    _, _, suffix = member.name.rpartition("/")[2].partition(".")
                    try:
                        if image is None and is_image(member.name):
                            image = member.name
                            content = tar.content(member, limit)
                        elif labels and suffix == "cls":
                            label = tar.content(member, _LABEL_BYTES).decode(errors="replace").strip()
                            target = as_int64(label, "its label")
                    except InputError as error:
                        wrong = wrong or f"cannot read {member.name} in {url}: {reason_of(error)}."
                # A label may lie behind the damage.
                if image is not None and not (damage and labels and target is None):
                    yield Record(
                        record_id, f"tar://{image}::{chained}", target, None, None if wrong else content, wrong
                    )
            if damage:
                raise damage[0]
    # What file systems and zlib raise for damaged files is of many classes; a record's InputError ends above.
    except Exception as error:
        raise InputError(f"cannot read {url}: {reason_of(error).rstrip(':')}. What came before it is kept.") from error


def _visible_files(tar: Tar, limit: int, damage: list[Exception]) -> Iterator[tarfile.TarInfo]:
    """Yield the members that are no folders and not hidden; at a damaged header, append the error to `damage` and end.

    So the sample before the header is still made.
    """
    while True:
        try:
            member = tar.next(limit)
        except Exception as error:
            damage.append(error)
            return
        if member is None:
            return
        if not member.isdir() and not member.name.rpartition("/")[2].startswith("."):
            yield member


def _key(member: tarfile.TarInfo) -> str:
    folder, _, name = member.name.rpartition("/")
    stem = name.partition(".")[0]
    return f"{folder}/{stem}" if folder else stem
