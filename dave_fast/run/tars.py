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
from typing import Any

from dave_fast.errors import InputError, reason_of
from dave_fast.images import is_image
from dave_fast.run.records import Record, RecordSource, Skip, as_int64, is_local, opened, printable

TARS = (".tar", ".tar.gz", ".tgz")


def tar_source(place: str, *, labels: bool) -> RecordSource:
    """Return the samples of tars as a source.

    Args:
        place: a path or fsspec URL, with {000..099} and globs.
        labels: whether the members `.cls` give the targets.

    Raises:
        InputError: there is no such tar, or they cannot be listed.
    """
    shards = _shards(place)
    names = _names([url for url, _ in shards])
    sizes = hashlib.blake2b(digest_size=16)
    for name, (_, size) in zip(names, shards, strict=True):
        sizes.update(f"{name}\0{size}\n".encode())
    identity = {"kind": "tars", "shards": len(shards), "digest": sizes.hexdigest(), "labels": labels}

    parts = {name: partial(_samples, url, name, labels) for name, (url, _) in zip(names, shards, strict=True)}

    def read(skip: Skip) -> Iterator[Record]:
        for part in parts.values():
            yield from part(skip)

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


def _samples(url: str, shard: str, labels: bool, skip: Skip) -> Iterator[Record]:
    """Yield the samples of one tar; the members of skipped ones are not read."""
    local = is_local(url)
    chained = f"file://{url}" if local else url
    try:
        # A pipe ("r|") avoids seeking, which is slow in remote files; on a disk, seeking passes over skipped members.
        with opened(url) as file, tarfile.open(fileobj=file, mode="r:*" if local else "r|*") as tar:
            for key, members in groupby(_visible_files(tar), _key):
                if skip(printable(f"{shard}/{key}")):
                    continue
                image = label = None
                for member in members:
                    _, _, suffix = member.name.rpartition("/")[2].partition(".")
                    if image is None and is_image(member.name):
                        image = member.name, _content(tar, member)
                    elif suffix == "cls":
                        label = _content(tar, member).decode(errors="replace").strip()
                if image is not None:
                    target = as_int64(label, f"{shard}/{key}: label") if labels else None
                    yield Record(printable(f"{shard}/{key}"), f"tar://{image[0]}::{chained}", target, None, image[1])
    except (tarfile.TarError, OSError, EOFError) as error:
        raise InputError(f"cannot read {url}: {reason_of(error)}. What came before it is kept.") from error


def _visible_files(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for member in tar:
        # tarfile keeps every member it has read.
        tar.members = []  # type: ignore[attr-defined]
        if member.isfile() and not member.name.rpartition("/")[2].startswith("."):
            yield member


def _key(member: tarfile.TarInfo) -> str:
    folder, _, name = member.name.rpartition("/")
    stem = name.partition(".")[0]
    return f"{folder}/{stem}" if folder else stem


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file: Any = tar.extractfile(member)
    return b"" if file is None else file.read()
