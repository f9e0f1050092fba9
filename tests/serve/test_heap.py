"""Tests that freed memory is kept for a while, and goes back to the system."""

import asyncio
import subprocess
import sys

import pytest

from dave_fast.serve import heap

# In a process of its own, whose heap holds little that is free.
PROGRAM = """
from pathlib import Path
from dave_fast.serve import heap

def mebibytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024

# Each too small for a mapping of its own; what lives on between them keeps the heap from shrinking.
blocks = [(bytes([1]) * 100_000, bytes([1]) * 1000) for _ in range(3000)]
lives_on = [small for _, small in blocks]
held = mebibytes()
del blocks
freed = mebibytes()
heap.give_back()
print(held, freed, mebibytes())
"""


# The pages that the system clears for large blocks that are taken and freed again and again.
PAGES = """
import resource
from dave_fast.serve import heap

def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        blocks = [bytes([1]) * 30_000_000 for _ in range(4)]
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

first = pages()
heap.keep_freed()
print(first, pages())
"""


def told_by(program):
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    return map(float, out.split())


on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's, measured by /proc")


@on_linux
def test_large_blocks_that_were_freed_are_taken_again_as_they_are():
    before, after = told_by(PAGES)
    assert before > 20 * 20_000, "the C library keeps them by itself"
    assert after < before / 4


@on_linux
def test_memory_that_was_freed_between_what_lives_on_is_given_back():
    held, freed, after = told_by(PROGRAM)
    assert freed > held - 100, "the C library gives it back by itself"
    assert after < held - 200


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
