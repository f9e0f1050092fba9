"""Tests of output folders with what no run put there: nothing else is written or deleted, and the reason is said."""

import errno
import fcntl
import os
import shutil
import socket
import tempfile

import pytest

from dave_fast.errors import InputError, RunError
from dave_fast.run.export.job import whole
from dave_fast.run.lock import FENCE_FILE, LOCK_FILE, Fence, Lock
from dave_fast.run.shards import remove_leftovers
from tests.run import stubs

# The lock and the fence


def link(path):
    path.symlink_to(path.parent.parent / "precious")


def link_of_nothing(path):
    path.symlink_to(path.parent.parent / "none")


def link_of_a_missing_folder(path):
    path.symlink_to(path.parent.parent / "none/none")


def link_of_itself(path):
    path.symlink_to(path)


def second_name(path):
    path.hardlink_to(path.parent.parent / "precious")


def pipe(path):
    os.mkfifo(path)


def listening(path):
    # A socket's path has 107 bytes at most, so that it is made elsewhere and moved.
    with tempfile.TemporaryDirectory(dir="/tmp") as short, socket.socket(socket.AF_UNIX) as made:
        made.bind(f"{short}/s")
        shutil.move(f"{short}/s", path)


def folder(path):
    path.mkdir()


ODD = [link, link_of_nothing, link_of_a_missing_folder, link_of_itself, second_name, pipe, listening, folder]


@pytest.mark.parametrize("name", [LOCK_FILE, FENCE_FILE])
@pytest.mark.parametrize("make", ODD)
def test_what_is_no_plain_file_is_no_lock(tmp_path, name, make):
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "precious").write_text("precious")
    make(out / name)
    with pytest.raises(InputError, match=f"cannot lock {out}: .*Choose another --out"):
        (Lock.take if name == LOCK_FILE else Fence.renew)(out)
    assert (tmp_path / "precious").read_text() == "precious" and not (tmp_path / "none").exists()


@pytest.mark.parametrize("make", ODD)
def test_commit_behind_a_fence_that_is_no_plain_file_is_dropped(tmp_path, make):
    (tmp_path / "out").mkdir()
    fence = Fence.renew(tmp_path / "out")
    # With the run's own token, which a link could lead to.
    (tmp_path / "out" / FENCE_FILE).rename(tmp_path / "precious")
    make(tmp_path / "out" / FENCE_FILE)
    with pytest.raises(RunError, match="commit is dropped"), fence.inside():
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EIO])
@pytest.mark.parametrize("take", [Lock.take, Fence.renew])
def test_disk_without_locks(tmp_path, monkeypatch, number, take):
    def flock(*given):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(
        InputError, match=f"(?i)cannot lock {tmp_path}: {os.strerror(number)}.*on a disk with file locks"
    ):
        take(tmp_path)


@pytest.mark.parametrize("take", [Lock.take, Fence.renew])
def test_lock_of_somebody_else(tmp_path, monkeypatch, take):
    def refused(path, *given, **more):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(InputError, match=f"cannot lock {tmp_path}: permission denied"):
        take(tmp_path)


@pytest.mark.parametrize("place", ["dead", "dead/below", "dead/far/below", "file/below", "file", "n" * 300])
def test_folder_that_cannot_be_made(tmp_path, place):
    (tmp_path / "dead").symlink_to(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot lock"):
        Lock.take(tmp_path / place, 0.1)
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").touch()
    with pytest.raises(InputError, match=r"cannot (lock|write to) .*[Cc]hoose another --out"):
        stubs.run(tmp_path / "in", tmp_path / place)
    assert not (tmp_path / "none").exists()


# What killed runs and exports leave behind

OURS = [".run.json.1.part", ".summary.json.99.part", ".maps-000-00000.parquet.7.part", ".maps-0a1f.parquet.12.part"]
FOREIGN = [
    *(".x.part", ".part", "..part", ".a.1.part", ".png.12.part", ".maps.h5.12.part", ".maps-0-0.parquet.part"),
    *(".run.json.part", ".run.json.1.part.part", ".run.json.x.part", ".run.json.1.partial", "run.json.1.part"),
    *(".data.parquet.1.part", ".summary.json.1-2.part", ".RUN.JSON.1.part", ".run.json\n.1.part"),
]


def test_only_the_leftovers_of_runs_are_deleted(tmp_path):
    for name in OURS + FOREIGN:
        (tmp_path / name).write_text("precious")
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(FOREIGN)


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("make", ODD)
def test_only_files_are_leftovers(tmp_path, name, make):
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "precious").write_text("precious")
    make(out / name)
    remove_leftovers(out)
    assert os.path.lexists(out / name) == (make is not second_name) and (tmp_path / "precious").exists()


def test_an_export_begins_with_nothing_of_a_killed_one(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 7)
    killed = whole(tmp_path / "png", folder=True)
    (killed.__enter__() / "old.png").touch()
    with whole(tmp_path / "png", folder=True) as part:
        (part / "new.png").touch()
    assert os.listdir(tmp_path / "png") == ["new.png"]


@pytest.mark.parametrize("folder", [True, False])
def test_an_export_into_the_run_outlives_the_resuming_of_the_run(tmp_path, folder):
    with whole(tmp_path / "out", folder=folder) as part:
        (part / "x" if folder else part).touch()
        remove_leftovers(tmp_path)
    assert (tmp_path / "out/x" if folder else tmp_path / "out").exists()
