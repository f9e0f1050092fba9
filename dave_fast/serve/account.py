"""One account of the memory that requests take, from which admission decides.

Whatever is made of a request is held here before it is made: its body, what is parsed of it, its decoded picture and
the resized one, what the queue keeps of it on a CPU, its answer, and stored images. What does not fit is refused at
once, after stored images have made room.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from dave_fast.errors import RefusedError

# Seconds after which a client may try again; most holds end sooner.
RETRY_AFTER = 1


class Account:
    """Bytes that are held, with a bound. Its methods may be called from any thread.

    Args:
        most: the most bytes.

    Attributes:
        most: the most bytes.
        now: the bytes that are held.
        peak: the most that have been held at once.
        lock: guards the account and what `make_room` frees.
        make_room: frees some bytes that nobody needs at once; returns whether there were any.
    """

    def __init__(self, most: int) -> None:
        self.most, self.now, self.peak = most, 0, 0
        self.lock = threading.RLock()
        self.make_room: Callable[[], bool] = lambda: False

    def hold(self, more: int) -> None:
        """Hold bytes, or raise RefusedError: "too large" where they never fit, else "full"."""
        if more > self.most:
            raise RefusedError(
                "too large",
                f"the request needs {more / 2**20:.0f} MiB; this server has {self.most / 2**20:.0f} MiB for requests",
            )
        with self.lock:
            while self.now + more > self.most and self.make_room():
                pass
            if self.now + more > self.most:
                taken = f"{self.now / 2**20:.0f} of {self.most / 2**20:.0f} MiB"
                raise RefusedError("full", f"the memory for requests is taken ({taken}); try again later", RETRY_AFTER)
            self.now += more
            self.peak = max(self.peak, self.now)

    def release(self, less: int) -> None:
        """Release bytes that were held."""
        with self.lock:
            self.now -= less


class Share:
    """What one exchange holds of an account, until `close`.

    Args:
        account: the account.
    """

    def __init__(self, account: Account) -> None:
        self.account, self.held = account, 0

    def hold(self, more: int) -> None:
        """Hold bytes, as `Account.hold` does."""
        self.account.hold(more)
        self.held += more

    def release(self, less: int) -> None:
        """Release bytes before the end."""
        self.account.release(less)
        self.held -= less

    def close(self) -> None:
        """Release all that is held."""
        self.release(self.held)
