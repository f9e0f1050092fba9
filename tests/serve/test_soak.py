"""Tests that memory does not grow over many requests of every kind; `test_hostile_soak` does so for an hour."""

import contextlib
import gc
import os
import random
from pathlib import Path

import pytest

from dave_fast.client import Client, ServerError
from tests.serve.tiny_server import serve_model, serving, until

MEGABYTE = 1 << 20


def resident():
    """Return the resident bytes of this process, which runs both server and clients."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def bustle(address, photo, most, rng):
    """Send that many valid and invalid requests of every kind, one after the other."""
    with Client(address, retries=0) as client:
        for count in range(most):
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


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from Linux's /proc")
def test_a_short_bustle_leaves_memory_flat(photo):
    rng = random.Random(0)
    with serving(models=[serve_model()]) as (address, service):
        bustle(address, photo, 60, rng)
        before = resident()
        bustle(address, photo, 60, rng)
        assert resident() - before < 24 * MEGABYTE
        scheduler = service.scheduler
        until(lambda: not scheduler.requests)
        assert (scheduler.requests, scheduler.rows, scheduler.bytes) == (0, 0, 0) and not service.jobs()
