"""One run at a time in a folder: a lock of the operating system, and a token for workers on other machines.

The lock belongs to an open file that the workers of a run inherit. So it outlives a killed run exactly as long as one
of its workers could still commit a shard.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

from dave_fast.errors import InputError, RunError, reason_of

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
            InputError: another run holds the lock for longer than `patience_s` seconds, or the folder cannot be locked.
        """
        until = time.monotonic() + patience_s
        while True:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                handle = _open_own(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    # Another run may have removed the file before this one locked it.
                    if os.path.samestat(os.fstat(handle), os.lstat(folder / LOCK_FILE)):
                        os.ftruncate(handle, 0)
                        os.pwrite(handle, f"process {os.getpid()} on {os.uname().nodename}".encode(), 0)
                        return Lock(os.dup(handle))
                    holder = ""
                except BlockingIOError:
                    holder = os.pread(handle, 100, 0).decode(errors="replace").strip()
                finally:
                    os.close(handle)
                refusal = InputError(
                    f"another run is at work in {folder} ({holder or 'just starting'}): wait for it, or choose another "
                    "--out."
                )
            # Another run has just removed the folder; if this goes on it has another reason.
            except (FileNotFoundError, FileExistsError) as error:
                refusal = _cannot_lock(folder, error)
            except OSError as error:
                raise _cannot_lock(folder, error) from error
            if time.monotonic() >= until:
                raise refusal
            time.sleep(0.05)

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
        """Write a new token, after the commits that are under way. To be called only under the folder's lock.

        Raises:
            InputError: it cannot be written.
        """
        path, token = folder / FENCE_FILE, uuid.uuid4().hex
        try:
            with open(path, "a+b", opener=_open_own) as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                file.truncate(0)
                file.write(token.encode())
        except OSError as error:
            raise _cannot_lock(folder, error) from error
        return Fence(path, token)

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Hold the token during a commit of this run.

        Raises:
            RunError: another run has begun, or the token cannot be read.
        """
        folder = self._path.parent
        with ExitStack() as held:
            try:
                file = held.enter_context(open(self._path, "rb", opener=_open_own))
                fcntl.flock(file, fcntl.LOCK_SH)
                token = file.read()
            except FileNotFoundError as error:
                raise RunError(f"{folder} was removed: this run's commit is dropped.") from error
            except OSError as error:
                raise RunError(f"{_cannot_lock(folder, error)} This run's commit is dropped.") from error
            if token != self._token.encode():
                raise RunError(f"another run has begun in {folder}: this one's commit is dropped.")
            yield


def _open_own(path: str | os.PathLike[str], flags: int) -> int:
    """Open a file of the run itself: no link, which may lead to anything, and nothing that waits.

    Raises:
        OSError: it cannot be opened, or it is no plain file.
    """
    name = os.path.basename(path)
    try:
        handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise OSError(error.errno, f"{name} is a link; delete it") from error
    found = os.fstat(handle)
    # A second name is a link too, as those that `cp -al` makes.
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(handle)
        raise OSError(errno.EINVAL, f"{name} is no plain file of its own; delete it")
    return handle


def _cannot_lock(folder: Path, error: OSError) -> InputError:
    return InputError(
        f"cannot lock {folder}: {reason_of(error)}. Choose another --out that you may write to, on a disk with file "
        "locks."
    )


def _inherited(handle: Any) -> Lock:
    """Return the lock of a handle that was duplicated for this process."""
    return Lock(handle.detach())
