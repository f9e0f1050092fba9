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
from typing import Any, Literal, Self

from dave_fast.errors import InputError, reason_of
from dave_fast.images import is_image
from dave_fast.run.limits import Limits, check_bytes, read_all
from dave_fast.run.records import Record, RecordSource, Skip, as_int64, is_local, opened, printable

TARS = (".tar", ".tar.gz", ".tgz")
# The most bytes of a label, and of a header: a long name, or what pax says of a member.
_LABEL_BYTES, _HEADER_BYTES = 2**12, 2**20
_DESCRIBING = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
_KINDS = {
    tarfile.SYMTYPE: "symbolic link",
    tarfile.LNKTYPE: "hard link",
    tarfile.CHRTYPE: "device",
    tarfile.BLKTYPE: "device",
    tarfile.FIFOTYPE: "named pipe",
}


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
        # A pipe ("r|") avoids seeking, which is slow in remote files; on a disk, seeking passes over skipped members.
        mode: Literal["r:*", "r|*"] = "r:*" if local else "r|*"
        with opened(url) as file, tarfile.open(fileobj=file, mode=mode, tarinfo=_Member) as tar:
            damage: list[Exception] = []
            for key, members in groupby(_visible_files(tar, damage), _key):
                record_id = printable(f"{shard}/{key}")
                if skip(record_id):
                    continue
                image = target = content = wrong = None
                for member in members:
                    _, _, suffix = member.name.rpartition("/")[2].partition(".")
                    try:
                        if image is None and is_image(member.name):
                            image = member.name
                            content = _content(tar, member, limit)
                        elif labels and suffix == "cls":
                            label = _content(tar, member, _LABEL_BYTES).decode(errors="replace").strip()
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
    # What tarfile and the decompressors raise for damaged files is of many classes; a record's InputError ends above.
    except Exception as error:
        raise InputError(f"cannot read {url}: {reason_of(error).rstrip(':')}. What came before it is kept.") from error


def _visible_files(tar: tarfile.TarFile, damage: list[Exception]) -> Iterator[tarfile.TarInfo]:
    """Yield the members that are no folders and not hidden; at a damaged header, append the error to `damage` and end.

    So the sample before the header is still made.
    """
    members = iter(tar)
    while True:
        try:
            member = next(members, None)
        except Exception as error:
            damage.append(error)
            return
        if member is None:
            return
        # tarfile keeps every member it has read.
        tar.members = []  # type: ignore[attr-defined]
        if not member.isdir() and not member.name.rpartition("/")[2].startswith("."):
            yield member


def _key(member: tarfile.TarInfo) -> str:
    folder, _, name = member.name.rpartition("/")
    stem = name.partition(".")[0]
    return f"{folder}/{stem}" if folder else stem


class _Member(tarfile.TarInfo):
    """A member whose header is checked: tarfile takes a damaged one for the end, and reads long ones as a whole."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Self:
        """Return the next member, after those that only describe it."""
        before = tar.offset
        try:
            member = super().fromtarfile(tar)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(f"a header is damaged ({error})") from error
        # With such sizes the next header would be this one again.
        if member.size < 0 or tar.offset <= before:
            raise tarfile.ReadError(f"{member.name} has a size of {member.size} bytes")
        return member

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if self.size < 0 or (self.type in _DESCRIBING and self.size > _HEADER_BYTES):
            raise tarfile.ReadError(f"a header has a size of {self.size} bytes")
        return super()._proc_member(tar)  # type: ignore[misc]


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo, limit: int) -> bytes:
    """Return the bytes of a member; raise InputError if it is no file or has more than `limit`."""
    if not member.isfile():
        raise InputError(f"it is a {_KINDS.get(member.type, 'member of an unknown kind')}; expected a file")
    check_bytes(member.size, limit)
    file: Any = tar.extractfile(member)
    return read_all(file, limit)
