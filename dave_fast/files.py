"""Atomic writing of result files, early checks that a folder can be written to, and opening nothing but files."""

from __future__ import annotations

import errno
import json
import os
import stat
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from dave_fast.errors import InputError, reason_of

# bytes of a text or a JSON file that is read whole; class names and vocabularies have a few millions
MOST_BYTES = 10**8
# What a path may lead to that is no file, in words.
_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_file(path: str | os.PathLike[str]) -> IO[bytes]:
    """Open a file for reading; never wait for one, as opening a named pipe would, and never open a device.

    Raises:
        OSError: there is no such file, or what is there is no file.
    """
    # Opening a device can do something, so that it is looked at first.
    check_file(path)
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        # It may have been replaced since.
        _refuse_other(os.fstat(handle))
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def check_file(path: str | os.PathLike[str]) -> None:
    """Raise OSError where there is no such file, or what is there is no file: for libraries that open paths."""
    _refuse_other(os.stat(path))


def _refuse_other(found: os.stat_result) -> None:
    kind = stat.S_IFMT(found.st_mode)
    if kind == stat.S_IFDIR:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if kind != stat.S_IFREG:
        raise OSError(errno.EINVAL, f"it is {_KINDS.get(kind, 'something else')}; expected a file")


def read_plain(path: str | os.PathLike[str], most: int = MOST_BYTES) -> bytes:
    """Return the content of a regular file.

    Raises:
        InputError: there is none, it cannot be read, it is a pipe or a device, or it has more than `most` bytes.
    """
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            content = file.read(most + 1) if size <= most else b""
    # a name with NUL is no name for the system
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {str(path)[:300]!r}: {reason_of(error)}.") from error
    if max(size, len(content)) > most:
        raise InputError(f"{path} has {size} bytes; expected at most {most}.")
    return content


def read_json(path: str | os.PathLike[str]) -> Any:
    """Return the value in a JSON file; raise InputError where it cannot be read (`read_plain`), or is no JSON."""
    content = read_plain(path)
    try:
        return json.loads(content.decode("utf-8-sig"))
    # no JSON or UTF-8, a number of more than 4,300 digits, or brackets in brackets without end
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no JSON file: {reason_of(error)}.") from error


@contextmanager
def atomically(path: str | os.PathLike[str], *, durable: bool = False) -> Iterator[IO[bytes]]:
    """Open a binary file that replaces `path` when the block ends without an exception, and is removed otherwise.

    Args:
        path: of the result. Missing folders are created.
        durable: whether the file is flushed to the disk, so that it survives a power cut.

    Raises:
        InputError: the system refuses to write; the message has the path and the reason.
    """
    path = Path(path)
    # In the same folder, since a rename is atomic within one file system only.
    part = path.with_name(f".{path.name}.{threading.get_native_id()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A thread of this number may have left one; and a link of that name must not lead the content elsewhere.
        part.unlink(missing_ok=True)
        with open(part, "xb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(part, path)
        if durable:
            sync_folder(path.parent)
    except OSError as error:
        raise InputError(f"cannot write {path}: {reason_of(error)}.") from error
    finally:
        if part.is_file():
            part.unlink()


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Flush a folder's entries to the disk, so that renames survive a power cut; without effect on Windows."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Raise InputError where no file can be created in `folder`, or `folder` itself cannot be created.

    Nothing is left behind: a run that fails later has not created an empty folder.
    """
    folder = Path(folder)
    # A link that leads nowhere is in the way too; and `exists` raises where a folder above may not be read.
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not os.path.isdir(existing):
        raise InputError(f"cannot write to {folder}: {existing} is no folder. Choose another --out.")
    try:
        # Permission bits are not enough: a file system can be read-only or full.
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {reason_of(error)}. Choose another --out.") from error
