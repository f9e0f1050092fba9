"""One run at a time in a folder: a lock that the operating system holds, and drops with the last process of the run.

The lock belongs to an open file, which a run's workers inherit. So it outlives a killed run for as long as one of its
workers might still commit a shard, and not a moment longer.
"""

from __future__ import annotations

import fcntl
import os
import time
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

from dave_fast.errors import InputError

LOCK_FILE = ".lock"
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


def _inherited(handle: Any) -> Lock:
    return Lock(handle.detach())
