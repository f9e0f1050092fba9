"""One run at a time in a folder: a lock of the operating system, and a token for workers on other machines.

The lock belongs to an open file that the workers of a run inherit. So it outlives a killed run exactly as long as one
of its workers could still commit a shard.
"""

from __future__ import annotations

import fcntl
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

from dave_fast.errors import InputError, RunError

LOCK_FILE = ".lock"
FENCE_FILE = ".fence"
# Seconds that the workers of a killed run may take to notice it.
_PATIENCE_S = 5.0


class Lock:
    """A held lock on a folder. `multiprocessing` can pickle it for a process that is being started."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    @staticmethod
    def take(folder: Path, patience_s: float = _PATIENCE_S) -> Lock:
        """Lock a folder, which is made if it is missing: a run that was refused removes the one that it made.

        Raises:
            InputError: another run holds the lock for longer than `patience_s` seconds.
        """
        until = time.monotonic() + patience_s
        while True:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except FileExistsError:
                # Another run has just removed it, or it is a file.
                if os.path.lexists(folder) and not folder.is_dir():
                    raise
                continue
            with suppress(FileNotFoundError):
                handle = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    # Another run may have removed the file before this one locked it.
                    if os.path.samestat(os.fstat(handle), os.stat(folder / LOCK_FILE)):
                        os.ftruncate(handle, 0)
                        os.pwrite(handle, f"process {os.getpid()} on {os.uname().nodename}".encode(), 0)
                        return Lock(os.dup(handle))
                except BlockingIOError:
                    if time.monotonic() >= until:
                        holder = os.pread(handle, 100, 0).decode(errors="replace").strip()
                        raise InputError(
                            f"another run is at work in {folder} ({holder or 'just starting'}): wait for it, or choose "
                            "another --out."
                        ) from None
                    time.sleep(0.05)
                finally:
                    os.close(handle)

    def release(self) -> None:
        """Close this process's handle; the lock ends with the last handle."""
        os.close(self._handle)

    def __reduce__(self) -> Any:
        return _inherited, (DupFd(self._handle),)


class Fence:
    """A token that keeps workers of an ended run, on other machines, from committing to the folder of a new one.

    Each run renews the folder's token when it begins. A commit is made under a shared lock on the token, and only if
    the token is still the one of its run. This needs a file system whose locks work across machines (NFS 4, Lustre
    with -o flock); on others a commit that coincides with the renewal may not be kept out.
    """

    def __init__(self, path: Path, token: str) -> None:
        self._path, self._token = path, token

    @staticmethod
    def renew(folder: Path) -> Fence:
        """Write a new token, after the commits that are under way. To be called only under the folder's lock."""
        path, token = folder / FENCE_FILE, uuid.uuid4().hex
        with open(path, "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.truncate(0)
            file.write(token.encode())
        return Fence(path, token)

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Hold the token during a commit of this run.

        Raises:
            RunError: another run has begun.
        """
        try:
            file = open(self._path, "rb")  # noqa: SIM115
        except FileNotFoundError as error:
            raise RunError(f"{self._path.parent} was removed: this run's commit is dropped.") from error
        with file:
            fcntl.flock(file, fcntl.LOCK_SH)
            if file.read().decode() != self._token:
                raise RunError(f"another run has begun in {self._path.parent}: this one's commit is dropped.")
            yield


def _inherited(handle: Any) -> Lock:
    """Return the lock of a handle that was duplicated for this process."""
    return Lock(handle.detach())
