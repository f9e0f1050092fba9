"""Start runs as programs that a test can kill, and check the files that they leave."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

import dave_fast
from tests.run import stubs

# A crowded machine needs minutes to start Ray.
PATIENCE_S = 400
ROOT = Path(dave_fast.__file__).parent.parent
PROGRAM = [sys.executable, "-m", "tests.run.stubs"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}


def start(place, out, **settings):
    """Start a run of the stub in a process group of its own and return the process."""
    return subprocess.Popen(
        [*PROGRAM, str(place), str(out), json.dumps(settings)],
        env=ENVIRONMENT,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # So that a test can kill the group as a whole.
        start_new_session=True,
    )


def finish(program, code=0):
    try:
        out, err = program.communicate(timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        os.killpg(program.pid, signal.SIGKILL)
        program.communicate()
        raise
    assert program.returncode == code, err
    return json.loads(out.splitlines()[-1]) if code == 0 else err


def check(out, ids, *, all_done=True):
    """Check that every shard can be read, no id occurs twice and each map belongs to its id; return the ids."""
    assert not (all_done and list(out.glob(".*.part")))
    found = [i for path in out.glob("*.parquet") for i in pq.read_table(path, columns=["id"])["id"].to_pylist()]
    assert len(found) == len(set(found))
    assert set(found) == set(ids) if all_done else set(found) <= set(ids)
    if found:
        for row in dave_fast.open_maps(out):
            np.testing.assert_array_equal(row.map, stubs.expected_map(row.id).astype(np.float16))
    return set(found)


def ids_of(images):
    return [path.relative_to(images).as_posix() for path in images.rglob("*.png")]


def kill_until_done(images, out, randomness, kills, *, whole_group, **settings):
    """Start the run repeatedly, kill it at random moments after its first work, and return how often it was killed."""
    ids, killed = set(ids_of(images)), 0
    while True:
        program = start(images, out, **settings)
        if killed < kills:
            until = time.monotonic() + PATIENCE_S
            before = set(out.glob("maps-*.parquet"))
            # Until it has written something: a run that is killed while it starts has nothing to lose.
            while program.poll() is None and time.monotonic() < until:
                if set(out.glob("maps-*.parquet")) - before or list(out.glob(".*.part")):
                    break
                time.sleep(0.005)
            time.sleep(randomness.uniform(0, 0.25))
        if killed < kills and program.poll() is None:
            with suppress(ProcessLookupError):
                (os.killpg if whole_group else os.kill)(program.pid, signal.SIGKILL)
            program.communicate()
            killed += 1
            found = [i for p in out.glob("maps-*.parquet") for i in pq.read_table(p, columns=["id"])["id"].to_pylist()]
            assert len(found) == len(set(found)) and set(found) <= ids
            continue
        finish(program)
        check(out, ids)
        return killed
