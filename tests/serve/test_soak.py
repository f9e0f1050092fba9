"""Tests that memory does not grow over many requests of every kind.

The slow test runs for `DAVE_FAST_SOAK_SECONDS`, by default an hour.
"""

import contextlib
import gc
import os
import random
import time
from pathlib import Path

import pytest

from dave_fast.client import Client, ServerError
from tests.serve.tiny_server import serve_model, serving

MEGABYTE = 1 << 20


def resident():
    """Return the resident bytes of this process, which runs both server and clients."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def bustle(address, photo, until, rng):
    """Send valid and invalid requests of every kind, one after the other; return their number."""
    count = 0
    with Client(address, retries=0) as client:
        while not until(count):
            kind = rng.randrange(6)
            with contextlib.suppress(ServerError):
                if kind == 0:
                    client.explain(photo, list(range(rng.randint(1, 5))), n_samples=rng.randint(1, 40), seed=count)
                elif kind == 1:
                    for update in client.stream(photo, n_samples=200):
                        if update.samples > 16:
                            break
                elif kind == 2:
                    client.explain(photo, n_samples=300, tolerance=0.8)
                elif kind == 3:
                    client.explain(photo[: rng.randrange(len(photo))], n_samples=4)
                elif kind == 4:
                    client.explain(photo, n_samples=1000, deadline_ms=rng.randint(1, 40))
                else:
                    client.explain(photo, "nothing that exists")
            count += 1
    return count


def soak(photo, until_warm, until_done):
    """Send requests for some seconds; return the growth of memory in bytes, and the number of requests."""
    rng = random.Random(0)
    with serving(models=[serve_model()]) as (address, service):
        bustle(address, photo, until_warm, rng)
        before = resident()
        count = bustle(address, photo, until_done, rng)
        grown = resident() - before
        for _ in range(500):
            if not service.scheduler.requests:
                break
            time.sleep(0.01)
        scheduler = service.scheduler
        assert (scheduler.requests, scheduler.rows, scheduler.bytes) == (0, 0, 0) and not service.jobs()
    return grown, count


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from Linux's /proc")
def test_a_short_bustle_leaves_memory_flat(photo):
    grown, _ = soak(photo, lambda count: count >= 60, lambda count: count >= 120)
    assert grown < 24 * MEGABYTE


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from Linux's /proc")
def test_memory_is_flat_over_an_hour(photo):
    seconds = float(os.environ.get("DAVE_FAST_SOAK_SECONDS", "3600"))
    end = time.monotonic() + seconds
    grown, count = soak(photo, lambda count: count >= 500, lambda count: time.monotonic() > end)
    print(f"{count} requests, {grown / MEGABYTE:.1f} MiB more")
    assert grown < 48 * MEGABYTE
