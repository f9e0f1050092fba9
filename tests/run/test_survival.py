"""Tests of interrupted and failing runs: each record has one row in the end, and committed rows are kept."""

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

import dave_fast
from dave_fast.errors import InputError, RunError
from dave_fast.run import runner, sources
from dave_fast.run.lock import Lock
from tests.run import stubs
from tests.run.killing import ENVIRONMENT, PATIENCE_S, check, finish, ids_of, kill_until_done, start

pytestmark = pytest.mark.usefixtures("forked_workers")

# Longer than a busy machine takes to fork a worker.
WATCHDOG_S = 8.0


@pytest.mark.parametrize(
    "whole_group", [pytest.param(False, marks=pytest.mark.slow, id="parent"), pytest.param(True, id="group")]
)
def test_killed_at_random_moments(images, tmp_path, whole_group):
    settings = {"seconds": 0.01, "commit_s": 0.2, "shard_rows": 5}
    assert kill_until_done(images, tmp_path / "out", random.Random(1), 3, whole_group=whole_group, **settings) > 1


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "ray"])
@pytest.mark.parametrize("seed", range(5))
def test_killed_many_times(pictures, tmp_path, seed, engine):
    """Runs survive twenty kills a seed (with Ray five), with one or two workers, of the parent or of all processes."""
    if engine == "ray":
        pytest.importorskip("ray", reason="an extra: dave-fast[ray]")
    for number in range(120, 1200):
        shutil.copy(pictures / "0/000.png", pictures / f"{number % 3}" / f"{number:04d}.png")
    settings = {"seconds": 0.004, "commit_s": 0.1, "shard_rows": 5 if engine == "local" else 25, "engine": engine}
    settings["watchdog_s"] = 300.0
    settings["devices"] = ["cpu"] * (1 + seed % 2)
    kills = 20 if engine == "local" else 5
    killed = kill_until_done(
        pictures, tmp_path / "out", random.Random(seed), kills, whole_group=seed % 2 == 0, **settings
    )
    print(f"{engine}, seed {seed}: {killed} kills")
    assert killed >= kills // 2


@pytest.mark.parametrize(
    "step", ["fsync", *(pytest.param(step, marks=pytest.mark.slow) for step in ("replace", "folder"))]
)
def test_killed_while_committing(images, tmp_path, step):
    out = tmp_path / "out"
    program = start(images, out, fault=[f"commit:{step}", 2])
    assert program.wait(PATIENCE_S) == -signal.SIGKILL
    program.communicate()
    # The third shard is there only if it was renamed before the kill.
    assert len(list(out.glob("*.parquet"))) == (3 if step == "folder" else 2)
    stubs.run(images, out)
    check(out, ids_of(images))


@pytest.mark.parametrize("step", [pytest.param("fsync", marks=pytest.mark.slow), "replace"])
def test_full_disk(images, tmp_path, step):
    out = tmp_path / "out"
    with pytest.raises(InputError, match=r"cannot write .*no space left on device"):
        stubs.run(images, out, fault=(f"disk:{step}", 2))
    assert len(check(out, ids_of(images), all_done=False)) == 16
    stubs.run(images, out)
    check(out, ids_of(images))


def test_file_that_outgrows_its_limit(images, tmp_path):
    """An error of the system while a shard is written, here a limit on the size of files, stops the run."""
    out = tmp_path / "out"
    code = f"""
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))
sys.argv = ["stubs", {str(images)!r}, {str(out)!r}, '{{"shard_rows": 100}}']
from tests.run import stubs
stubs.main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert done.returncode == 2 and "file too large" in done.stderr, done.stderr
    stubs.run(images, out, shard_rows=100)
    check(out, ids_of(images))


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_stopped_in_order(images, tmp_path, number):
    """A signal has the finished rows committed within seconds, even if they do not fill a shard."""
    out = tmp_path / "out"
    program = start(images, out, seconds=0.05, commit_s=1000, shard_rows=1000)
    until = time.monotonic() + PATIENCE_S
    while not list(out.glob(".*.part")) and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.3)
    # A terminal sends the signal to all processes of the group.
    os.killpg(program.pid, number)
    told = finish(program)
    assert told["stopped"] == number.name and 0 < told["images"] < 120
    assert len(check(out, ids_of(images), all_done=False)) == told["images"]
    assert stubs.run(images, out).records == 120
    check(out, ids_of(images))


def test_one_run_at_a_time(images, tmp_path):
    out = tmp_path / "out"
    program = start(images, out, seconds=0.2)
    try:
        until = time.monotonic() + PATIENCE_S
        while not (out / "run.json").exists() and time.monotonic() < until:
            time.sleep(0.01)
        with pytest.raises(InputError, match=f"another run is at work in .*process {program.pid}"):
            Lock.take(out, patience_s=0.2)
        error = finish(start(images, out), code=2)
        assert "another run is at work" in error
    finally:
        os.killpg(program.pid, signal.SIGKILL)
        program.communicate()
    # The lock is released when the run is killed.
    Lock.take(out, patience_s=60.0).release()


def test_worker_that_dies(images, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(RunError, match=r"was killed by SIGKILL \(the system does that"):
        stubs.run(images, out, fault=("die", 40))
    check(out, ids_of(images), all_done=False)
    assert stubs.run(images, out).records == 120
    check(out, ids_of(images))


def test_one_of_two_workers_dies(images, tmp_path):
    """The remaining worker commits its rows when one of two dies."""
    out = tmp_path / "out"
    with pytest.raises(RunError, match="was killed by SIGKILL"):
        stubs.run(images, out, fault=("die", 20), devices=("a", "b"), seconds=0.01, shard_rows=1000, commit_s=1000)
    assert stubs.run(images, out).records == 120
    check(out, ids_of(images))


@pytest.mark.parametrize(
    ("fault", "message"),
    [("memory", "out of memory with one image at a time"), ("raise", "ZeroDivisionError: in the mapper")],
)
def test_finished_records_are_kept_when_the_mapper_fails(images, tmp_path, fault, message):
    out = tmp_path / "out"
    with pytest.raises(RunError, match=message):
        stubs.run(images, out, fault=(fault, 40), shard_rows=1000, commit_s=1000)
    assert len(check(out, ids_of(images), all_done=False)) == 40


def test_model_that_cannot_be_loaded(images, tmp_path):
    with pytest.raises(InputError, match="no such model"):
        stubs.run(images, tmp_path / "out", fault=("load", 0))
    assert not (tmp_path / "out").exists()


def test_watchdog(images, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(RunError, match=r"no progress for \d+ s; waiting for worker 0"):
        stubs.run(images, out, fault=("hang", 40), watchdog_s=WATCHDOG_S, shard_rows=5)
    assert len(check_committed(out)) >= 35
    assert stubs.run(images, out).records == 120
    check(out, ids_of(images))


def check_committed(out):
    return [row.id for row in dave_fast.open_maps(out)]


def test_source_that_hangs(images, tmp_path, monkeypatch):
    """The watchdog names a source that does not answer."""
    source = sources.open_source(str(images))
    endless = replace(source, read=lambda skip: iter(threading.Event().wait, None))
    monkeypatch.setattr(runner, "open_source", lambda *args, **keywords: endless)
    with pytest.raises(RunError, match=rf"no progress for \d+ s; waiting for the source {images}"):
        stubs.run(images, tmp_path / "out", watchdog_s=WATCHDOG_S)


def test_resume_refuses_another_run(images, tmp_path):
    out = tmp_path / "out"
    stubs.run(images, out, limit=10)
    with pytest.raises(
        InputError, match=r"configuration\.n_samples: 50 before, 7 now; configuration\.seed: 0 before, 3"
    ):
        stubs.run(images, out, n_samples=7, seed=3)
    (images / "0/000.png").rename(images / "0/other.png")
    with pytest.raises(InputError, match=r"source\.digest: \w+ before, \w+ now"):
        stubs.run(images, out)
    assert len(check_committed(out)) == 10


def test_limit_counts_what_is_there(images, tmp_path):
    out = tmp_path / "out"
    assert stubs.run(images, out, limit=10).images == 10
    assert stubs.run(images, out, limit=10).images == 0
    assert stubs.run(images, out, limit=25).images == 15
    assert stubs.run(images, out).images == 95
    check(out, ids_of(images))


def test_folder_that_holds_no_run(images, tmp_path):
    (tmp_path / "maps.parquet").write_bytes(b"someone's data")
    with pytest.raises(InputError, match=r"holds Parquet files but no run\.json"):
        stubs.run(images, tmp_path)
    assert (tmp_path / "maps.parquet").read_bytes() == b"someone's data"


def test_shard_that_was_spoilt(images, tmp_path):
    out = tmp_path / "out"
    stubs.run(images, out)
    shard = sorted(out.glob("*.parquet"))[0]
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(InputError, match=f"{shard.name} is no readable shard"):
        stubs.run(images, out)
    shard.unlink()
    stubs.run(images, out)
    check(out, ids_of(images))


def test_shard_that_was_copied(images, tmp_path):
    out = tmp_path / "out"
    stubs.run(images, out)
    shard = sorted(out.glob("*.parquet"))[0]
    (out / "copy.parquet").write_bytes(shard.read_bytes())
    with pytest.raises(InputError, match="holds records that other shards hold too"):
        stubs.run(images, out)


def test_bad_images_have_rows(images, tmp_path):
    out = tmp_path / "out"
    summary = stubs.run(images, out, decode="image", limit=30)
    assert (summary.images, summary.errors, len(summary.first_errors)) == (30, 30, 5)
    maps = dave_fast.open_maps(out)
    assert {row.status for row in maps} == {"error"}
    assert maps[0].error.startswith(f"cannot read {maps[0].uri}: it is not an image that Pillow can read")
    # Failed records are tried again with retry_errors only.
    assert stubs.run(images, out, limit=30).images == 0
    assert stubs.run(images, out, limit=30, retry_errors=True).images == 30
    assert len(check(out, ids_of(images), all_done=False)) == 30


def test_retry_keeps_what_is_good(images, tmp_path):
    out = tmp_path / "out"
    from PIL import Image

    good = [path for path in images.rglob("*.png") if int(path.stem) % 4]
    for path in good:
        Image.new("RGB", (8, 8)).save(path)
    assert stubs.run(images, out, decode="image").errors == 30
    times = {path: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
    assert stubs.run(images, out, retry_errors=True).images == 30
    assert set(times) <= set(out.glob("*.parquet"))
    check(out, ids_of(images))


def test_everything_fails(tmp_path):
    """A run stops after a hundred failures one after another, which are not due to single images."""
    for number in range(300):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / f"images/{number}.png").write_bytes(b"no image")
    with pytest.raises(RunError, match="100 records failed one after another"):
        stubs.run(tmp_path / "images", tmp_path / "out", decode="image")
    assert stubs.run(tmp_path / "images", tmp_path / "out", retry_errors=True).records == 300


def test_several_devices_share_the_work(images, tmp_path):
    out = tmp_path / "out"
    summary = stubs.run(images, out, devices=("a", "b", "c"), seconds=0.005)
    assert summary.devices == 3 and summary.records == 120
    check(out, ids_of(images))
    workers = {path.name.split("-")[1] for path in out.glob("maps-*.parquet")}
    assert workers == {"000", "001", "002"}
