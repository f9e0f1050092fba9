"""Tests that freed memory goes back to the system."""

import asyncio
import sys
from pathlib import Path

import numpy as np
import pytest

from dave_fast.serve import heap


def mebibytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's, measured by /proc")
def test_memory_that_was_freed_between_what_lives_on_is_given_back():
    heap.give_back()
    before = mebibytes()
    # Each too small for a mapping of its own; what lives on keeps the heap from shrinking.
    blocks = [(np.ones(100_000, np.uint8), np.ones(100, np.uint8)) for _ in range(3000)]
    lives_on = [small for _, small in blocks]
    del blocks
    freed = mebibytes()
    assert freed > before + 200, "the C library gives it back by itself"
    heap.give_back()
    assert mebibytes() < freed - 200 and len(lives_on) == 3000


def test_it_is_given_back_again_and_again_until_the_end(monkeypatch):
    calls = []
    monkeypatch.setattr(heap, "EVERY", 0.01)
    monkeypatch.setattr(heap, "give_back", lambda: calls.append(1))

    async def some_time():
        task = asyncio.create_task(heap.give_back_regularly())
        while len(calls) < 3:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(asyncio.wait_for(some_time(), 60))
