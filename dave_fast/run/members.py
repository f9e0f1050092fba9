"""Read what a uri leads to, and the members of tars, from front to end.

Tarfile's own reader is not for files that one has not made: it reads maps of sparse files whole, takes minutes for some
pax headers, keeps all members, and takes a damaged header for the end.
"""

from __future__ import annotations

import atexit
import errno
import gzip
import io
import math
import os
import re
import tarfile
import threading
from contextlib import ExitStack
from typing import IO, Any

from dave_fast.errors import InputError
from dave_fast.numbers import whole_in
from dave_fast.run.limits import check_bytes, read_all
from dave_fast.run.records import is_local, opened, path_of

_BLOCK, _BUFFER, _CHUNK = 512, 2**16, 2**20
# The most bytes of a header, a long name or what pax says of a member, and the most such headers of one member.
_HEADER_BYTES, _HEADERS = 2**18, 16
# How many times the limit of bytes is decompressed to reach what follows.
_PASSED_LIMITS = 64
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
# Where links lead does not matter, and what is said of all members is nothing that the members need.
_UNREAD = (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE)
_KINDS = {
    tarfile.SYMTYPE: "symbolic link",
    tarfile.LNKTYPE: "hard link",
    tarfile.CHRTYPE: "device",
    tarfile.BLKTYPE: "device",
    tarfile.FIFOTYPE: "named pipe",
    tarfile.DIRTYPE: "folder",
    tarfile.GNUTYPE_SPARSE: "sparse file",
}
_PAX_LENGTH = re.compile(rb"(\d{1,10}) ")
# The most tars that stay open, and the most members of one that does: their names have to be known.
_OPEN, _MEMBERS = 8, 2**19


class _Raw(io.RawIOBase):
    """A file of which no more than `read` is known, for a buffer."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        part = self._file.read(len(buffer))
        buffer[: len(part)] = part
        return len(part)


class Tar:
    """A tar, plain or compressed by gzip, as its first bytes say.

    Args:
        file: the tar, at its beginning.
        local: whether it is a file on a disk, where seeking passes over contents. In remote files that is slow.
    """

    def __init__(self, file: Any, *, local: bool) -> None:
        self._file: Any = file if local else io.BufferedReader(_Raw(file), _BUFFER)
        self._compressed = self._file.peek(2)[:2] == b"\x1f\x8b"
        if self._compressed:
            self._file = gzip.GzipFile(fileobj=self._file)
        self._seeks = local and not self._compressed
        self._begun = False
        # bytes before the next header
        self._left = 0

    def next(self, limit: int) -> tarfile.TarInfo | None:
        """Return the next member, None at the end.

        Args:
            limit: bytes of a record, of which a compressed member before it may have many times as much.

        Raises:
            ReadError: the tar is damaged, or takes too long to be read on.
        """
        self._pass_over(limit)
        said: dict[bytes, bytes] = {}
        for number in range(_HEADERS + 1):
            block = self._file.read(_BLOCK)
            if number == 0 and len(block) in ((0, _BLOCK) if self._begun else (_BLOCK,)) and not any(block):
                return None
            try:
                member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            except tarfile.HeaderError as error:
                what = "a header is damaged" if self._begun else "it is no tar, plain or compressed by gzip"
                raise tarfile.ReadError(f"{what} ({error})") from error
            self._begun = True
            if member.type not in (*_PAX, *_UNREAD, tarfile.GNUTYPE_LONGNAME):
                return self._finished(member, block, said)
            if not 0 <= member.size <= _HEADER_BYTES:
                raise tarfile.ReadError(f"a header has a size of {member.size} bytes; expected at most {_HEADER_BYTES}")
            content = self._read(member.size + -member.size % _BLOCK)[: member.size]
            # The first of several counts.
            if member.type in _PAX:
                said = _of_pax(content) | said
            elif member.type == tarfile.GNUTYPE_LONGNAME:
                said.setdefault(b"path", content.partition(b"\0")[0])
        raise tarfile.ReadError(f"a member has more than {_HEADERS} headers")

    def content(self, member: tarfile.TarInfo, limit: int) -> bytes:
        """Return the content of the member that `next` has returned.

        Raises:
            InputError: it is no file, or has more than `limit` bytes.
            ReadError: the tar is damaged.
        """
        if member.type in _KINDS or not member.isreg():
            raise InputError(f"it is a {_KINDS.get(member.type, 'member of an unknown kind')}; expected a file")
        check_bytes(member.size, limit)
        content = self._read(member.size)
        self._left -= member.size
        return content

    def _finished(self, member: tarfile.TarInfo, block: bytes, said: dict[bytes, bytes]) -> tarfile.TarInfo:
        """Return a member with what the headers before it say, ready to be read or passed over."""
        name = said.get(b"GNU.sparse.name", said.get(b"path"))
        if name is not None:
            member.name = name.decode("utf-8", "surrogateescape").rstrip("/")
        if b"size" in said:
            size = whole_in(said[b"size"].decode("ascii", "replace"))
            if size is None:
                raise tarfile.ReadError(f"the size of {member.name} is no number")
            member.size = size
        if member.size < 0:
            raise tarfile.ReadError(f"{member.name} has a size of {member.size} bytes")
        if member.type == tarfile.GNUTYPE_SPARSE:
            # A block of its map follows where the one before says so.
            more, left = block[482], _HEADER_BYTES
            while more and left:
                more, left = self._read(_BLOCK)[504], left - _BLOCK
            if more:
                raise tarfile.ReadError(f"the map of {member.name} has more than {_HEADER_BYTES} bytes")
        elif any(key.startswith(b"GNU.sparse.") for key in said):
            member.type = tarfile.GNUTYPE_SPARSE
        has_content = member.isreg() or member.type not in tarfile.SUPPORTED_TYPES
        self._left = member.size + -member.size % _BLOCK if has_content else 0
        return member

    def _pass_over(self, limit: int) -> None:
        """Go to the next header."""
        if self._compressed and self._left > _PASSED_LIMITS * limit:
            enough = math.ceil(self._left / _PASSED_LIMITS / 1e6)
            raise tarfile.ReadError(
                f"a member has {self._left / 1e6:g} MB, which would have to be decompressed to read on: leave it out, "
                f"do not compress the tar, or set --max-megabytes to {enough} or more"
            )
        if self._seeks and self._left:
            # Its last byte is read, since one can seek behind the end.
            self._file.seek(self._left - 1, os.SEEK_CUR)
            self._left = 1
        while self._left:
            self._left -= len(self._read(min(_CHUNK, self._left)))

    def _read(self, size: int) -> bytes:
        """Return so many bytes; what is not there takes no memory."""
        content = io.BytesIO()
        while part := self._file.read(min(_CHUNK, size - content.tell())):
            content.write(part)
        if content.tell() < size:
            raise tarfile.ReadError("unexpected end of data")
        return content.getvalue()


def _of_pax(content: bytes) -> dict[bytes, bytes]:
    """Return what a pax header says of a member's name, size and holes; its lines are `LENGTH KEY=VALUE`."""
    said, at = {}, 0
    while at < len(content) and content[at]:
        found = _PAX_LENGTH.match(content, at)
        end = at + int(found[1]) if found else 0
        if found is None or not found.end() < end <= len(content) or content[end - 1 : end] != b"\n":
            raise tarfile.ReadError("a pax header is damaged")
        key, _, value = content[found.end() : end - 1].partition(b"=")
        if key in (b"path", b"size") or key.startswith(b"GNU.sparse."):
            said[key] = value
        at = end
    return said


def read_uri(uri: str, limit: int) -> bytes:
    """Return the bytes behind a path or an fsspec URL.

    Of a tar's members tar://NAME::ARCHIVE is the first of the name, as in a run over the tar. Those that are asked for
    in their order take one pass, since the tar stays open; for one that was passed it is read from its beginning.

    Raises:
        TooLargeError: they are more than `limit`.
        InputError: a tar's member is no file, or a tar lies in another archive.
        Exception: any other that its file system raises.
    """
    if not _has_tar(uri):
        with opened(uri) as file:
            return read_all(file, limit)
    name, archive = _name_and_archive(uri)
    reader = _reader_before(name, archive)
    try:
        content = reader.read(name, limit)
    except InputError:
        # Nothing of it has been read, and the tar is in order.
        reader.put_back()
        raise
    except BaseException:
        reader.close()
        raise
    reader.put_back()
    return content


class _Reader:
    """A tar that stays open between two reads. It has one user at a time: threads that read the same tar have one each.

    Attributes:
        version: of the archive, in this process: one that is forked must not move the file of the other.
        passed: hashes of the names that have been passed. Two names of one hash cost time only.
    """

    def __init__(self, archive: str, version: tuple[object, ...]) -> None:
        self.version, self._archive = version, archive
        self.passed: set[int] = set()
        with ExitStack() as stack:
            self._tar = Tar(stack.enter_context(opened(archive)), local=is_local(archive))
            self.close = stack.pop_all().close

    def read(self, name: str, limit: int) -> bytes:
        """Return the content of the next member of this name."""
        while (member := self._tar.next(limit)) is not None:
            found = _plain(member.name)
            self.passed.add(hash(found))
            if found == name:
                return self._tar.content(member, limit)
        raise FileNotFoundError(errno.ENOENT, f"there is no member {name} in {self._archive}")

    def put_back(self) -> None:
        """Leave the tar to the next that reads it, in place of the one that has waited longest."""
        closing = [self]
        if len(self.passed) <= _MEMBERS:
            with _idle_lock:
                _idle.append(self)
                closing = _idle[:-_OPEN]
                del _idle[:-_OPEN]
        for each in closing:
            each.close()


_idle: list[_Reader] = []
_idle_lock = threading.Lock()


@atexit.register
def _close_idle() -> None:
    for each in _idle:
        each.close()


def _reader_before(name: str, archive: str) -> _Reader:
    """Return the reader of an archive that is nearest to a member and has not passed it, a new one if there is none."""
    if is_local(archive):
        found = os.stat(archive)
        changes: tuple[object, ...] = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
    else:
        file = opened(archive)
        changes = (file.fs.ukey(file.path),)
    version = (os.getpid(), archive, *changes)
    with _idle_lock:
        fit = [each for each in _idle if each.version == version and hash(name) not in each.passed]
        if fit:
            nearest = max(fit, key=lambda each: len(each.passed))
            _idle.remove(nearest)
            return nearest
    return _Reader(archive, version)


def _name_and_archive(uri: str) -> tuple[str, str]:
    """Return the name and the archive of tar://NAME::ARCHIVE; both may have `::`."""
    links = uri.removeprefix("tar://").split("::")
    ends = [n for n in range(1, len(links)) if os.path.isabs(rest := "::".join(links[n:])) or not is_local(rest)]
    end = ends[0] if ends else len(links) - 1
    archive = path_of("::".join(links[end:]))
    if not uri.startswith("tar://") or end == 0 or _has_tar(archive):
        raise InputError("expected tar://NAME::ARCHIVE, where the archive lies in no other tar: unpack that one")
    return _plain("::".join(links[:end])), archive


def _has_tar(uri: str) -> bool:
    """Return whether a link of a chain is a tar. One may leave out what follows a protocol (tar::...)."""
    return not is_local(uri) and any(link == "tar" or link.startswith("tar://") for link in uri.split("::"))


def _plain(name: str) -> str:
    """Return a member's name as fsspec's uris have it, without slashes at its ends or next to each other."""
    return re.sub("/+", "/", name).strip("/")
