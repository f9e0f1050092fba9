"""Tests of what only a GPU can show. `scripts/gpu` runs them; elsewhere they are skipped, and the rehearsal runs them.

DAVE_FAST_REHEARSE=1 runs the same tests on the CPU at small sizes: they are known to work before there is a GPU.
"""

from __future__ import annotations

import os

import pytest
import torch

REHEARSAL = os.environ.get("DAVE_FAST_REHEARSE") == "1"
DEVICE = "cpu" if REHEARSAL else "cuda"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" not in item.path.parts:
            continue
        item.add_marker(pytest.mark.gpu)
        if not REHEARSAL and not torch.cuda.is_available():
            item.add_marker(
                pytest.mark.skip(reason="torch sees no GPU here; scripts/gpu runs these tests where one is")
            )
        elif REHEARSAL and item.get_closest_marker("device_only"):
            item.add_marker(pytest.mark.skip(reason="only a device can do this; it is not part of a rehearsal"))


@pytest.fixture
def device() -> str:
    """Return the device that the ops run on."""
    return DEVICE


@pytest.fixture
def fresh_seed(record_property: object) -> int:
    """Return a new seed in every run, stored in the report so that a failure can be repeated (DAVE_FAST_SEED)."""
    seed = int(os.environ.get("DAVE_FAST_SEED") or int.from_bytes(os.urandom(4), "little"))
    print(f"DAVE_FAST_SEED={seed}")
    return seed
