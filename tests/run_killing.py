"""Runs as programs of their own, to be killed; and what has to be true of what they leave behind."""

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
import run_stubs

import dave_fast

# A crowded machine needs minutes to start Ray.
PATIENCE_S = 400
PROGRAM = Path(run_stubs.__file__)


def start(place, out, **settings):
    root = Path(dave_fast.__file__).parent.parent
    paths = os.pathsep.join((str(PROGRAM.parent), str(root)))
    command = [sys.executable, str(PROGRAM), str(place), str(out), json.dumps(settings)]
    return subprocess.Popen(
        command,
        env=os.environ | {"PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a group of its own, so that a test can kill it as a whole
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
    """Every shard can be read, no id stands twice, and each map is the one of its id."""
    assert not (all_done and list(out.glob(".*.part")))
    found = [i for path in out.glob("*.parquet") for i in pq.read_table(path, columns=["id"])["id"].to_pylist()]
    assert len(found) == len(set(found))
    assert set(found) == set(ids) if all_done else set(found) <= set(ids)
    if found:
        for row in dave_fast.open_maps(out):
            np.testing.assert_array_equal(row.map, run_stubs.expected_map(row.id).astype(np.float16))
    return set(found)


def ids_of(images):
    return [path.relative_to(images).as_posix() for path in images.rglob("*.png")]


def kill_until_done(images, out, randomness, kills, *, whole_group, **settings):
    """Start the run again and again, and kill it at random moments after its first work; how often it was killed."""
    ids, killed = set(ids_of(images)), 0
    while True:
        program = start(images, out, **settings)
        if killed < kills:
            until = time.monotonic() + PATIENCE_S
            before = set(out.glob("maps-*.parquet"))
            # Until it works: a run that is killed while it starts has nothing to lose.
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
