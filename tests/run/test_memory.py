"""Tests that a run's memory does not grow with the number of images."""

import multiprocessing
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dave_fast.run.local import Machine
from dave_fast.run.mapper import MapSettings
from dave_fast.run.progress import Report
from dave_fast.run.runner import run_dataset
from tests.run import stubs

MIB = 2**20


def resident(pid="self"):
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) * 1024


class Scale(Report):
    """A report that records the images done and the resident bytes of the parent and of its worker."""

    def __init__(self):
        self.seen = []

    def update(self, tally):
        children = multiprocessing.active_children()
        if children and tally.first_work is not None and (not self.seen or tally.images > self.seen[-1][0]):
            self.seen.append((tally.images, resident(), resident(children[0].pid)))


def growth(seen, images):
    """Return the bytes that parent and worker gained in the second half of the images."""
    half = next(row for row in seen if row[0] >= images // 2)
    return seen[-1][1] - half[1], seen[-1][2] - half[2]


def weigh(run):
    scale = Scale()

    @contextmanager
    def reporter(total, before):
        yield scale

    return run(reporter), scale.seen


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_is_flat(images, tmp_path):
    """A stub run over 2,000 files of 100 KB, in shards of 100 rows, keeps its memory: 200 MB pass through it."""
    for number in range(120, 2000):
        (images / f"{number % 3}" / f"{number:04d}.png").write_bytes(b"x" * 100_000)
    summary, seen = weigh(
        lambda reporter: stubs.run(images, tmp_path / "out", seconds=0.001, shard_rows=100, reporter=reporter)
    )
    assert summary.records == 2000
    assert max(growth(seen, 2000)) < 24 * MIB


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_is_flat_with_a_model(tmp_path):
    """A run of the demo model over 1,000 photographs keeps its memory."""
    (tmp_path / "photos").mkdir()
    randomness = np.random.default_rng(0)
    for number in range(1000):
        pixels = randomness.integers(0, 256, (40, 50, 3), np.uint8)
        Image.fromarray(pixels).resize((500, 375)).save(tmp_path / f"photos/{number}.jpg")
    settings = MapSettings("demo", n_samples=2, raw=True, options={"noise_alpha": 0.5})
    summary, seen = weigh(
        lambda reporter: run_dataset(
            str(tmp_path / "photos"), tmp_path / "out", settings, Machine(shard_rows=200), reporter=reporter
        )
    )
    assert summary.records == 1000
    parent, worker = growth(seen, 1000)
    print(f"second half of 1,000 images: parent {parent / MIB:+.1f} MiB, worker {worker / MIB:+.1f} MiB")
    print(f"worker at the end: {seen[-1][2] / MIB:.0f} MiB")
    assert parent < 16 * MIB
    assert worker < 48 * MIB
