"""Result files that are either whole or not there, and folders that are checked before the work begins."""

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
    """A binary file that takes the place of `path` when all of it is written, and never in part.

    Folders on the way are made. After any exception `path` is as it was before. durable: on the disk when the
    block ends, so that it also outlives the machine's sudden end.
    Raises InputError, with the path and the reason, where the system refuses to write.
    """
    path = Path(path)
    # In the same folder, since a file can be moved in one step within a file system only.
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
    """Make what was renamed into a folder outlive a power cut, where the system can (not on Windows)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Raise InputError where no file can be made in `folder`, or `folder` itself cannot be made.

    Nothing is left behind, so a run that fails later has not made an empty folder.
    """
    folder = Path(folder)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise InputError(f"cannot write to {folder}: {existing} is a file. Choose another --out.")
    try:
        # A permission bit says less than a try: file systems can be read-only, full or foreign.
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {reason_of(error)}. Choose another --out.") from error
