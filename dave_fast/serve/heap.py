"""Memory that was freed, back to the system.

glibc keeps what is freed between allocations that live on. In a server, whose threads take and free pictures and maps
of every size, that grows for hours: after five minutes of hostile clients 420 MiB were free and kept, with 390 in use.
"""

from __future__ import annotations

import asyncio
import ctypes
from contextlib import suppress

# Seconds between two times. What is given back has to be taken again: some tenths of a second each time.
EVERY = 30.0


def give_back() -> None:
    """Give freed memory back to the system, where the C library is glibc; elsewhere do nothing."""
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


async def give_back_regularly() -> None:
    """Give freed memory back every `EVERY` seconds, in a thread, until it is cancelled."""
    while True:
        await asyncio.sleep(EVERY)
        await asyncio.to_thread(give_back)
