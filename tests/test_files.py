"""Tests of atomic writes and of the check that a folder can be written to."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from dave_fast.errors import InputError
from dave_fast.files import atomically, check_writable


def test_content_arrives_and_folders_are_made(tmp_path):
    with atomically(tmp_path / "a/b/c.bin") as file:
        file.write(b"whole")
    assert (tmp_path / "a/b/c.bin").read_bytes() == b"whole"
    assert os.listdir(tmp_path / "a/b") == ["c.bin"]


@pytest.mark.parametrize("before", [None, b"before"], ids=["new", "old"])
def test_exception_leaves_everything_as_it_was(tmp_path, before):
    path = tmp_path / "c.bin"
    if before:
        path.write_bytes(before)

    def fail_half_way():
        with atomically(path) as file:
            file.write(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_half_way()
    assert os.listdir(tmp_path) == (["c.bin"] if before else [])
    assert before is None or path.read_bytes() == before


@pytest.mark.parametrize("kind", ["leftover", "link", "link that leads nowhere", "folder"])
def test_what_has_the_name_of_the_part_is_neither_written_to_nor_in_the_way(tmp_path, kind):
    (tmp_path / "other").write_bytes(b"other")
    part = tmp_path / f".c.bin.{threading.get_native_id()}.part"
    if kind == "leftover":
        part.write_bytes(b"half of an older one")
    elif kind == "folder":
        part.mkdir()
    else:
        part.symlink_to(tmp_path / ("other" if kind == "link" else "none"))
    if kind == "folder":
        with pytest.raises(InputError, match="cannot write"), atomically(tmp_path / "c.bin"):
            pass
        assert part.is_dir()
    else:
        with atomically(tmp_path / "c.bin") as file:
            file.write(b"new")
        assert sorted(os.listdir(tmp_path)) == ["c.bin", "other"]
        assert (tmp_path / "c.bin").read_bytes() == b"new" and (tmp_path / "other").read_bytes() == b"other"


def test_threads_that_write_the_same_file_leave_a_whole_one(tmp_path):
    both = threading.Barrier(4)

    def write(number):
        with atomically(tmp_path / "c.bin") as file:
            file.write(bytes([number]) * 100_000)
            both.wait()
            file.write(bytes([number]) * 100_000)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(write, range(4)))
    content = (tmp_path / "c.bin").read_bytes()
    assert len(content) == 200_000 and len(set(content)) == 1
    assert os.listdir(tmp_path) == ["c.bin"]


def test_full_disk_is_a_plain_error(tmp_path):
    with (
        pytest.raises(InputError, match=r"cannot write .*c\.bin: no space left"),
        atomically(tmp_path / "c.bin"),
    ):
        raise OSError(28, "No space left on device")
    assert os.listdir(tmp_path) == []


def test_file_in_the_way(tmp_path):
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(InputError, match="cannot write"), atomically(tmp_path / "a/b.bin"):
        pass


def test_writable_folder_is_not_made(tmp_path):
    check_writable(tmp_path)
    check_writable(tmp_path / "new/er")
    assert os.listdir(tmp_path) == []


def test_relative_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_writable("maps")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("out", ["file", "file/maps"])
def test_folder_that_is_a_file(tmp_path, out):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="file is no folder"):
        check_writable(tmp_path / out)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder that even root cannot write to")
def test_folder_that_cannot_be_written():
    with pytest.raises(InputError, match="cannot write to /proc/maps"):
        check_writable("/proc/maps")
