"""Result files that are either whole or not there, and folders that are checked before the work begins."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from dave_fast.errors import InputError


@contextmanager
def atomically(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A binary file that takes the place of `path` when all of it is written, and never in part.

    Folders on the way are made. After any exception `path` is as it was before.
    Raises InputError, with the path and the reason, where the system refuses to write.
    """
    path = Path(path)
    # In the same folder, since a file can be moved in one step within a file system only.
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            yield file
        os.replace(part, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {_reason(error)}.") from error
    finally:
        if part.exists():
            part.unlink()


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
        raise InputError(f"cannot write to {folder}: {_reason(error)}. Choose another --out.") from error


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
