"""The most that one record may take: seconds, bytes and pixels."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import IO, TypeVar

from dave_fast.errors import ImageError, TooLargeError

_T = TypeVar("_T")
_CHUNK = 2**20


@dataclass(frozen=True)
class Limits:
    """The limits of a record. One that is over them gets a row with an error, and the run goes on.

    Attributes:
        seconds: for reading and decoding an image; shorter than the watchdog of the run.
        bytes: of the encoded image, after what an archive compresses.
        pixels: width × height of the image.
    """

    seconds: float = 60.0
    bytes: int = 256 * 10**6
    pixels: int = 100 * 10**6


def within(seconds: float, call: Callable[[], _T]) -> _T:
    """Return what a call returns.

    The call has a thread of its own, which is left behind if it takes too long: nothing can end a system call that
    hangs. It does not keep the process alive.

    Raises:
        ImageError: the call takes longer than so many seconds.
    """
    future: Future[_T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="record", daemon=True).start()
    try:
        return future.result(timeout=seconds)
    except TimeoutError:
        if future.done():
            raise
        raise ImageError(
            f"reading and decoding the image took longer than {seconds:g} s: look for a hanging disk or network, or "
            "give a longer --max-seconds."
        ) from None


def read_all(file: IO[bytes], limit: int) -> bytes:
    """Return the rest of a file.

    Raises:
        TooLargeError: it has more than `limit` bytes, of which no more are read.
    """
    content = io.BytesIO()
    while part := file.read(min(_CHUNK, limit + 1 - content.tell())):
        content.write(part)
        check_bytes(content.tell(), limit)
    return content.getvalue()


def check_bytes(size: int, limit: int) -> None:
    """Raise TooLargeError if a size is above the limit of bytes."""
    if size > limit:
        raise TooLargeError(f"it has more than {limit / 1e6:g} MB; --max-megabytes sets the limit")
