"""Memory that was freed: kept for the next micro-batch, and given back to the system twice a minute.

glibc gives large blocks back as soon as they are freed, and the system clears every page that is taken again: up to a
seventh of the time of a small model's maps. What lies between allocations that live on is never given back by itself.
In a server, whose threads take and free pictures and maps of every size, that grows for hours: after five minutes of
hostile clients 420 MiB were free and kept, with 390 in use.
"""

from __future__ import annotations

import asyncio
import ctypes
from contextlib import suppress

# Seconds between two times. What is given back has to be taken again: some tenths of a second each time.
EVERY = 30.0
# glibc's M_TRIM_THRESHOLD and M_MMAP_THRESHOLD: the most bytes at a heap's end, and of one block, that are kept.
KEPT = {-1: 256 * 2**20, -3: 32 * 2**20}


def keep_freed() -> None:
    """Let the process keep what it frees until `give_back`, where the C library is glibc; elsewhere do nothing."""
    with suppress(AttributeError):
        for option, most in KEPT.items():
            ctypes.CDLL(None).mallopt(option, most)


def give_back() -> None:
    """Give freed memory back to the system, where the C library is glibc; elsewhere do nothing."""
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


async def give_back_regularly() -> None:
    """Give freed memory back every `EVERY` seconds, in a thread, until it is cancelled."""
    while True:
        await asyncio.sleep(EVERY)
        await asyncio.to_thread(give_back)
