"""One run at a time in a folder: a lock that the operating system holds, and drops with the last process of the run.

The lock belongs to an open file, which a run's workers inherit. So it outlives a killed run for as long as one of its
workers might still commit a shard, and not a moment longer.
"""

from __future__ import annotations

import fcntl
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

from dave_fast.errors import InputError, RunError

LOCK_FILE = ".lock"
FENCE_FILE = ".fence"
# How long the workers of a killed run may take to notice.
_PATIENCE_S = 5.0


class Lock:
    """A held lock. It can be given to processes that are being started (pickled by `multiprocessing`)."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    @staticmethod
    def take(folder: Path, patience_s: float = _PATIENCE_S) -> Lock:
        """Lock a folder; raises InputError where a run holds it for longer than `patience_s`."""
        handle = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
        until = time.monotonic() + patience_s
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() < until:
                    time.sleep(0.05)
                    continue
                holder = os.pread(handle, 100, 0).decode(errors="replace").strip()
                os.close(handle)
                raise InputError(
                    f"another run is at work in {folder} ({holder or 'just starting'}): wait for it, or choose another "
                    "--out."
                ) from None
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {os.uname().nodename}".encode(), 0)
            return Lock(handle)

    def release(self) -> None:
        """Give this process's hold back."""
        os.close(self._handle)

    def __reduce__(self) -> Any:
        return _inherited, (DupFd(self._handle),)


class Fence:
    """Keeps the commits of a run that is over out of its folder, where its workers may outlive it on other machines.

    Whoever begins a run renews the folder's token; a commit is made while holding a shared lock on it, and only if the
    token is still the one of its run. Needs a file system whose locks reach across machines (NFS 4, Lustre with
    -o flock); on others a commit that is under way in that very moment may slip through.
    """

    def __init__(self, path: Path, token: str) -> None:
        self._path, self._token = path, token

    @staticmethod
    def renew(folder: Path) -> Fence:
        """A new token; waits for commits that are under way. Only under the folder's lock."""
        path, token = folder / FENCE_FILE, uuid.uuid4().hex
        with open(path, "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.truncate(0)
            file.write(token.encode())
        return Fence(path, token)

    @contextmanager
    def inside(self) -> Iterator[None]:
        """A commit of this run; raises RunError where another run has begun."""
        with open(self._path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            if file.read().decode() != self._token:
                raise RunError(f"another run has begun in {self._path.parent}: this one's commit is dropped.")
            yield


def _inherited(handle: Any) -> Lock:
    return Lock(handle.detach())
