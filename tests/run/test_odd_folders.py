"""Tests of output folders with what no run put there: nothing else is written or deleted, and the reason is said."""

import errno
import fcntl
import os
import socket

import pytest

from dave_fast.errors import InputError, RunError
from dave_fast.run.lock import FENCE_FILE, LOCK_FILE, Fence, Lock
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
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


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
    with pytest.raises(InputError, match=f"(?i)cannot lock {tmp_path}: {os.strerror(number)}.*on a disk with locks"):
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
