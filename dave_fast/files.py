"""Atomic writing of result files, and early checks that a folder can be written to."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from dave_fast.errors import InputError, reason_of


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
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
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
        if part.exists():
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
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise InputError(f"cannot write to {folder}: {existing} is a file. Choose another --out.")
    try:
        # Permission bits are not enough: a file system can be read-only or full.
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {reason_of(error)}. Choose another --out.") from error
