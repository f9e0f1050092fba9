"""Tests of sources that no one would make on purpose: nothing that a disk can hold stops a run or raises elsewhere."""

import bz2
import gzip
import io
import json
import lzma
import os
import random
import resource
import socket
import stat
import struct
import tarfile
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from decimal import Decimal
from functools import partial

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import dave_fast
from dave_fast.errors import DaveFastError, ImageError, InputError, RunError, TooLargeError
from dave_fast.images import find_images, read_image
from dave_fast.run import members
from dave_fast.run.contents import read_content, read_picture
from dave_fast.run.export import export
from dave_fast.run.export.names import file_names
from dave_fast.run.limits import Limits, read_all, within
from dave_fast.run.lock import Fence, Lock
from dave_fast.run.members import Tar, read_uri
from dave_fast.run.records import Record, as_int64, is_local, printable, unprintable
from dave_fast.run.runner import _remove_if_unused
from dave_fast.run.sources import open_source
from tests.run import stubs


def records(place, **settings):
    return list(open_source(str(place), **settings).records())


def picture(side=4):
    file = io.BytesIO()
    Image.new("RGB", (side, side), "red").save(file, "PNG")
    return file.getvalue()


# Limits


def test_call_that_hangs_is_left():
    gate, start = threading.Event(), time.monotonic()
    with pytest.raises(ImageError, match=r"longer than 0\.05 s.*--max-seconds"):
        within(0.05, gate.wait)
    gate.set()
    assert time.monotonic() - start < 5


def test_call_in_time_returns_and_raises_its_own():
    def late():
        raise TimeoutError("its own")

    assert within(5, lambda: 7) == 7
    with pytest.raises(TimeoutError, match="its own"):
        within(5, late)


@pytest.mark.parametrize("size", [0, 9, 10])
def test_bytes_up_to_the_limit(size):
    assert read_all(io.BytesIO(b"x" * size), 10) == b"x" * size


@pytest.mark.parametrize("size", [11, 2**20, 2**22])
def test_bytes_above_the_limit(size):
    file = io.BytesIO(b"x" * size)
    with pytest.raises(TooLargeError, match="--max-megabytes"):
        read_all(file, 10)
    assert file.tell() == 11


def test_pixels_above_the_limit(tmp_path):
    (tmp_path / "a.png").write_bytes(picture(20))
    record = Record("a", str(tmp_path / "a.png"))
    assert read_picture(record, Limits(pixels=400)).size == (20, 20)
    with pytest.raises(TooLargeError, match="20×20 pixels"):
        read_picture(record, Limits(pixels=399))


def special(folder, kind):
    """Make something that is called x.png and is no file, or an endless one; return its path."""
    path = folder / "x.png"
    if kind == "link to a pipe":
        os.mkfifo(folder / "pipe")
        path.symlink_to("pipe")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(path))
    elif kind == "huge":
        with open(path, "wb") as file:
            file.truncate(2**42)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"itself": "x.png", "nowhere": "none"}.get(kind, kind))
    return path


SPECIAL = ["pipe", "link to a pipe", "socket", "/dev/zero", "/dev/tty", "/dev/full", "huge", "itself", "nowhere"]


@pytest.mark.parametrize("uri", ["{}", "file://{}", "local://{}", "tar://a.png::file://{}", "tar://a.png::{}"])
@pytest.mark.parametrize("kind", [*SPECIAL, "folder"])
def test_what_is_no_file_is_an_error_at_once(tmp_path, monkeypatch, kind, uri):
    monkeypatch.chdir(tmp_path)
    path = special(tmp_path, kind)
    start = time.monotonic()
    with pytest.raises(ImageError, match="cannot read"):
        within(60, partial(read_content, Record("x", uri.format(path)), Limits(bytes=1000)))
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("kind", ["pipe", "link to a pipe", "socket", "/dev/zero", "/dev/tty", "/dev/full", "itself"])
def test_explain_opens_files_only(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    path = special(tmp_path, kind)
    (tmp_path / "y.png").write_bytes(picture())
    assert find_images([tmp_path]) == [path, tmp_path / "y.png"]
    with pytest.raises(ImageError, match=r"cannot read .*x\.png"):
        within(60, partial(read_image, path))


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.parametrize("by", ["folder", "list", "manifest"])
def test_special_files_are_rows(tmp_path, by):
    for number, kind in enumerate(SPECIAL):
        (tmp_path / f"in/{number}").mkdir(parents=True)
        special(tmp_path / f"in/{number}", kind)
    for name in ("a.png", "z.png"):
        (tmp_path / "in" / name).write_bytes(picture())
    names = ["in/a.png", *(f"in/{number}/x.png" for number in range(len(SPECIAL))), "in/z.png"]
    place = tmp_path / {"folder": "in", "list": "l.txt", "manifest": "m.parquet"}[by]
    if by == "list":
        place.write_text("\n".join(names))
    if by == "manifest":
        pq.write_table(pa.table({"uri": names}), place)
    summary = stubs.run(place, tmp_path / "out", decode="pixels")
    assert (summary.records, summary.errors) == (len(names), len(SPECIAL))


@pytest.mark.usefixtures("forked_workers")
def test_image_that_takes_too_long_is_a_row(tmp_path, images, monkeypatch):
    """More images hang than there are decoders, for longer in all than the watchdog's time."""
    (tmp_path / "list.txt").write_text("".join(f"slow://{n}\n" for n in range(6)) + f"{images}/0/000.png\n")
    summary = stubs.run(
        tmp_path / "list.txt", tmp_path / "out", seconds=0, fault=["slow", 0], limits=Limits(seconds=1.0), watchdog_s=20
    )
    assert (summary.records, summary.errors) == (7, 6)
    assert "longer than 1 s" in summary.first_errors[0][1]


# Folders


def links(folder, pairs):
    for path, target in pairs.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).symlink_to(target)


@pytest.mark.parametrize(
    ("pairs", "ids"),
    [
        ({"a/up": ".."}, ["a/1.png", "z/2.png"]),
        ({"a/up": "..", "a/up2": ".."}, ["a/1.png", "z/2.png"]),
        ({"a/here": "."}, ["a/1.png", "z/2.png"]),
        ({"a/z": "../z", "z/a": "../a"}, ["a/1.png", "z/2.png"]),
        # Its own name comes before that of a link.
        ({"a/0": "../z"}, ["a/1.png", "z/2.png"]),
        ({"0": "z", "00": "z"}, ["a/1.png", "z/2.png"]),
        ({"0": "../outside", "1": "../outside"}, ["0/3.png", "a/1.png", "z/2.png"]),
        ({"0": "../outside", "../outside/back": "../in"}, ["0/3.png", "a/1.png", "z/2.png"]),
        ({"0": "..", "../more": "in"}, ["0/outside/3.png", "a/1.png", "z/2.png"]),
        ({"0": ".hidden", ".hidden": "../outside"}, ["0/3.png", "a/1.png", "z/2.png"]),
        ({"self": "self", "loop/a": "b", "loop/b": "a"}, ["a/1.png", "z/2.png"]),
        ({"dead.png": "none", "self.png": "self.png"}, ["dead.png", "self.png", "a/1.png", "z/2.png"]),
    ],
)
def test_walk_ends_with_each_image_once(tmp_path, pairs, ids):
    for name in ("in/a/1.png", "in/z/2.png", "outside/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    links(tmp_path / "in", pairs)
    assert [record.id for record in records(tmp_path / "in")] == ids


def test_folders_deeper_than_the_stack(tmp_path):
    folders = [str(tmp_path)]
    try:
        for _ in range(1200):
            folders.append(f"{folders[-1]}/d")
            os.mkdir(folders[-1])
        with open(f"{folders[-1]}/1.png", "wb"):
            pass
        assert len(records(tmp_path)) == 1
    finally:
        # pytest's own removal is recursive.
        os.unlink(f"{folders[-1]}/1.png")
        for folder in reversed(folders[1:]):
            os.rmdir(folder)


# Names

ODD_NAMES = [
    b"\xff.png",
    b"\\xff.png",
    b"\\x5cxff.png",
    b"\\\xff.png",
    b"\\\\xff.png",
    b"\\x5c.png",
    b"\\x5cx5cxff.png",
    b"\xc3\xa4.png",
    b"\\xc3\\xa4.png",
    b"\xe4\xf6.png",
    b"::x.png",
    b"a::b.png",
    b"s3::b.png",
    b"http:..x.png",
    b"new\nline.png",
    b"a#b?c.png",
    b"-rf.png",
]


def test_names_of_any_bytes_have_ids_of_their_own(tmp_path):
    for name in ODD_NAMES:
        try:
            with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
                file.write(name)
        except OSError:
            pytest.skip("this file system takes Unicode names only")
    found = records(tmp_path)
    assert len({record.id for record in found}) == len(ODD_NAMES)
    assert sorted(map(read_content, found)) == sorted(ODD_NAMES)
    for record in found:
        assert record.id.encode() and unprintable(record.id) == os.fsdecode(read_content(record))


def test_printable_is_undone_for_any_bytes():
    draw = random.Random(0)
    parts = [b"\\", b"x", b"5c", b"ff", b"\xff", b"\x80", b"8", b"c", "é".encode(), b"\\x5c", b"\\xff"]
    names = {os.fsdecode(b"".join(draw.choices(parts, k=draw.randrange(7)))) for _ in range(5000)}
    assert len({printable(name) for name in names}) == len(names)
    assert all(unprintable(printable(name)) == name for name in names)


@pytest.mark.parametrize(
    "name", ["::", "::::", "a::b", "::x.png", "/d/s3://x", "file::x.png", "1://x", "zip::a::b", ""]
)
def test_local_names(name):
    assert is_local(name)


@pytest.mark.parametrize("name", ["s3://b/x", "nosuch://x", "tar://a::/x.tar", "simplecache::s3://x", "http://[::1"])
def test_urls(name):
    assert not is_local(name)


# Lists


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"uri":"a.png","id":"\\ud800"}\n', "line 1: .* is no Unicode text"),
        ("a.jsonl", b'{"uri":"a.png"}\n{"uri":"\\ud800.png"}\n', "line 2: .* is no Unicode text"),
        ("a.jsonl", b"[" * 200_000 + b"\n", "line 1 is no JSON"),
        ("a.jsonl", b'{"uri":' * 200_000 + b"\n", "line 1 is no JSON"),
        ("a.jsonl", b'{"uri":"a.png","seed":' + b"9" * 5000 + b"}\n", "line 1 is no JSON"),
        ("a.jsonl", b'{"uri":"a.png","seed":1e400}\n', "line 1: seed is inf"),
        ("a.jsonl", b'{"uri":"a.png","target":true}\n', "line 1: target is True"),
        ("a.jsonl", b'{"uri":"a.png","target":{"a":[1]}}\n', "line 1: target is {'a'"),
        ("a.jsonl", b'{"uri":"a.png","id":["x"]}\n', "line 1: id is "),
        ("a.jsonl", b'{"uri":7}\n', "line 1: there is no uri"),
        ("a.jsonl", b'{"uri":"a.png"', "line 1 is no JSON"),
        ("a.csv", b"uri,id\n" + b"a" * 140_000 + b",1\n", "line 2 is no ','-separated text: field larger"),
        ("a.csv", b"uri,id\na\0.png,1\n", "line 2 has a NUL"),
        ("a.csv", b'uri,id\n"a.png,1\nb.png,2\n', "line 3 is no ','-separated text"),
        ("a.csv", b'uri,id\r"a\rb".png,1\r', "line 3 is no ','-separated text"),
        ("a.csv", b"uri,target\na.png,1e400\n", "line 2: target is '1e400'"),
        ("a.csv", b"uri,seed\na.png," + b"9" * 5000 + b"\n", "line 2: seed is '9999"),
        ("a.csv", b"uri,uri\na.png,b.png\n", "2 columns uri"),
        ("a.csv", b"", "names no image"),
        ("a.csv", b"uri\n", "names no image"),
        ("a.tsv", b'uri\tid\n"a.png\t1\n', "is no '.t'-separated text"),
        ("a.txt", b"a\0.png\n", "line 1 has a NUL"),
        ("a.txt", "a.png\n".encode("utf-16"), "line 1 has a NUL"),
        ("a.txt", b"\n \n", "names no image"),
        ("a.txt", b"x" * (2**24 + 2), "line 1 has more than"),
    ],
)
def test_list_is_refused_with_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        records(tmp_path / name)


@pytest.mark.parametrize(
    "uri", [b".", b"..", b"/", b"::::", b"http://[::1", b"nosuch://x", b"tar://a::file://b", b"\xff.png"]
)
def test_uri_that_leads_nowhere_is_a_record_with_an_error(tmp_path, uri):
    (tmp_path / "a.txt").write_bytes(uri + b"\n")
    (record,) = records(tmp_path / "a.txt")
    with pytest.raises(ImageError, match="cannot read"):
        read_content(record)


TEXT = pa.array(["a.png"])
MANIFESTS = {
    "bad UTF-8": {
        "uri": pa.Array.from_buffers(
            pa.string(), 1, [None, pa.py_buffer(struct.pack("<ii", 0, 2)), pa.py_buffer(b"\xff\xfe")]
        )
    },
    "integers": {"uri": pa.array([1])},
    "structs": {"uri": pa.array([{"a": 1}])},
    "bytes": {"uri": pa.array([b"a.png"])},
    "nothing": {"uri": pa.array([None], pa.string())},
    "no column": {"image": TEXT},
    "no row": {"uri": pa.array([], pa.string())},
    "large seed": {"uri": TEXT, "seed": pa.array([2**64 - 1], pa.uint64())},
    "part of a class": {"uri": TEXT, "target": pa.array([Decimal("1.5")])},
    "large decimal": {"uri": TEXT, "target": pa.array([Decimal(10) ** 30])},
    "infinite target": {"uri": TEXT, "target": pa.array([float("inf")])},
    "date": {"uri": TEXT, "target": pa.array([0], pa.date32())},
    "list": {"uri": TEXT, "target": pa.array([[1]])},
    "id of bytes": {"uri": TEXT, "id": pa.array([b"a"])},
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_manifest_is_refused(tmp_path, kind):
    pq.write_table(pa.table(MANIFESTS[kind]), tmp_path / "m.parquet")
    with pytest.raises(InputError, match=r"m\.parquet"):
        records(tmp_path / "m.parquet")


def test_manifest_with_a_column_twice(tmp_path):
    pq.write_table(pa.table([TEXT, TEXT], names=["uri", "uri"]), tmp_path / "m.parquet")
    with pytest.raises(InputError, match="2 columns uri"):
        records(tmp_path / "m.parquet")


@pytest.mark.parametrize(
    ("value", "number"),
    [(Decimal("9007199254740993"), 2**53 + 1), (3.0, 3), ("-5", -5), (float("nan"), None), ("", None)],
)
def test_integers_of_any_type(value, number):
    assert as_int64(value, "x") == number


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl", "a.parquet", "a.tar"])
def test_source_that_is_a_pipe(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match=name):
        within(60, partial(open_source, str(tmp_path / name)))


# Tars


def header(name, size, kind=tarfile.REGTYPE, **more):
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    for key, value in more.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.GNU_FORMAT)


def member(name, content, kind=tarfile.REGTYPE):
    return header(name, len(content), kind) + content + b"\0" * (-len(content) % 512)


def sparse(name, size, more=False):
    """Return an old GNU header of a file that is one hole of so many bytes, behind which its map may go on."""
    block = bytearray(header(name, 0, tarfile.GNUTYPE_SPARSE))
    block[386:410] = b"%011o\0%011o\0" % (0, 0)
    block[482], block[483:495] = more, b"%011o\0" % size
    block[148:156] = b"%06o\0 " % (256 + sum(block[:148]) + sum(block[156:512]))
    return bytes(block)


def pax(records, kind=tarfile.XHDTYPE):
    """Return a pax header of records KEY=VALUE."""
    lines = ((len(record) + 2, record) for record in records)
    return member("x", b"".join(b"%d %b\n" % (n + len(str(n + len(str(n)))), line) for n, line in lines), kind)


def holes(*records):
    """Return a sparse file odd.png as GNU tar writes it with pax; its map is wrong."""
    return pax([b"path=odd.png", *(b"GNU.sparse." + record for record in records)]) + member("x", b"9\nx" * 1000)


END = b"\0" * 1024
MORE = b"00000000001\0" * 42 + b"\1" + b"\0" * 7
GOOD = member("good.png", b"G")


@pytest.mark.parametrize(
    ("odd", "reason"),
    [
        (sparse("odd.png", 2**32), "sparse file"),
        (sparse("odd.png", 5, more=True) + MORE * 3 + b"\0" * 512, "sparse file"),
        (holes(b"major=1", b"minor=0", b"realsize=5"), "sparse file"),
        (holes(b"map=0,1,2,3", b"size=5"), "sparse file"),
        (holes(b"size=5", b"numblocks=1", b"offset=0", b"numbytes=1"), "sparse file"),
        (holes(b"major=1", b"minor=0", b"name=odd.png", b"realsize=" + b"9" * 50), "sparse file"),
        (member("odd.png", b"\0" * 2_000_000), "more than 1 MB"),
        (header("odd.png", 0, tarfile.SYMTYPE, linkname="/etc/passwd"), "symbolic link"),
        (header("odd.png", 0, tarfile.LNKTYPE, linkname="good.png"), "hard link"),
        (header("odd.png", 0, tarfile.CHRTYPE), "device"),
        (header("odd.png", 0, tarfile.BLKTYPE), "device"),
        (header("odd.png", 0, tarfile.FIFOTYPE), "named pipe"),
        (member("odd.png", b"x") + member("odd.cls", b"cat"), "its label is 'cat'"),
        (member("odd.png", b"x") + member("odd.cls", b"9" * 5000), "MB"),
        (member("odd.png", b"x") + header("odd.cls", 0, tarfile.SYMTYPE, linkname="x"), "symbolic link"),
    ],
)
def test_member_that_is_a_record_with_an_error(tmp_path, odd, reason):
    for name, pack in (("a.tar", bytes), ("a.tar.gz", gzip.compress)):
        (tmp_path / name).write_bytes(pack(GOOD + odd + member("last.png", b"L") + END))
        first, wrong, last = records(tmp_path / name, labels=True, limits=Limits(bytes=1_000_000))
        assert (first.content, wrong.id, wrong.content, last.content) == (b"G", "a/odd", None, b"L")
        with pytest.raises(ImageError, match=reason):
            read_content(wrong)


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (header("odd.png", 10**6), "unexpected end"),
        (header("odd.png", -512), "size of -512"),
        (header("odd.png", 2**70), "cannot read"),
        (header("odd.txt", 2**62), "cannot read"),
        (header("x", 2**33, tarfile.GNUTYPE_LONGNAME), "a header has a size"),
        (header("x", -512, tarfile.XHDTYPE), "a header has a size"),
        (header("x", 2**33, tarfile.XGLTYPE), "a header has a size"),
        (member("x", b"20 size=-51200000\n\n", tarfile.XHDTYPE) + member("odd.png", b"x"), "cannot read"),
        (member("x", b"y", tarfile.GNUTYPE_LONGNAME) * 3000, "more than 16 headers"),
        (pax([b"comment=x"]) * 3000 + GOOD, "more than 16 headers"),
        (pax([b"path=odd.png"]) + END, "a header is damaged"),
        (pax([b"size=x"]) + GOOD, "no number"),
        (pax([b"size=" + b"9" * 5000]) + GOOD, "no number|damaged"),
        (member("x", b"9" * 5000 + b" a=b\n", tarfile.XHDTYPE) + GOOD, "a pax header is damaged"),
        (member("x", b"7 a=b\n9999 a=b\n", tarfile.XHDTYPE) + GOOD, "a pax header is damaged"),
        (member("x", b"1 a=b\n", tarfile.XHDTYPE) + GOOD, "a pax header is damaged"),
        (sparse("odd.png", 5, more=True) + MORE * 3000, "the map of odd.png"),
        (b"garbage " * 64, "a header is damaged"),
        (member("odd.png", b"x")[:700], "cannot read"),
        (member("odd.png", b"x")[:300], "a header is damaged"),
    ],
    ids=range(20),
)
def test_tar_that_is_damaged_ends_with_one_error(tmp_path, odd, message):
    """What comes before it, and the other tars, are read."""
    (tmp_path / "a.tar").write_bytes(GOOD + odd)
    (tmp_path / "b.tar").write_bytes(GOOD + END)
    found = []
    with pytest.raises(InputError, match=f"cannot read .*a.tar: .*{message}|{message}.*a.tar"):
        found.extend(iter_into(found, open_source(str(tmp_path / "{a,b}.tar")).records()))
    assert [r.id for r in found if r.content == b"G"] == ["a/good", "b/good"]


def iter_into(found, iterator):
    for each in iterator:
        found.append(each)
    return []


def test_bombs_in_archives_take_no_memory(tmp_path):
    """Of 300 MB behind 0.3 MB nothing is kept, whether it is an image or the name of one."""
    zeros = bytes(300_000_000)
    bombs = {"image": member("a.png", zeros), "name": header("x", len(zeros), tarfile.GNUTYPE_LONGNAME) + zeros}
    for name, content in bombs.items():
        (tmp_path / f"{name}.tar.gz").write_bytes(gzip.compress(content + END, 1))
    del zeros, content, bombs
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (record,) = records(tmp_path / "image.tar.gz", limits=Limits(bytes=8_000_000))
    with pytest.raises(ImageError, match="more than 8 MB"):
        read_content(record)
    with pytest.raises(InputError, match="cannot read"):
        records(tmp_path / "name.tar.gz")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


@pytest.mark.parametrize("by", ["tar", "uri"])
@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE])
@pytest.mark.parametrize("content", [b"9" * 60_000, b"9" * 30_000 + b" " + b"9" * 30_000, b"5 a=\n" * 40_000])
def test_pax_headers_take_no_time(tmp_path, content, kind, by):
    """Python's own regular expression takes seconds for so many digits, and holds the lock of all threads."""
    (tmp_path / "a.tar").write_bytes(member("x", content, kind) + GOOD + END)
    refused = pytest.raises(InputError, match="pax header is damaged")
    start = time.thread_time()
    with nullcontext() if kind == tarfile.XGLTYPE or b"=" in content else refused:
        if by == "tar":
            assert [record.content for record in records(tmp_path / "a.tar")] == [b"G"]
        else:
            assert read_content(Record("x", f"tar://good.png::{tmp_path}/a.tar")) == b"G"
    assert time.thread_time() - start < 1


def test_what_pax_says_of_all_members_is_not_kept(tmp_path):
    """Each of the headers is read once, and a path for all members is none for one."""
    headers = (pax([b"path=x", *(b"a%d=" % (n * 1000 + m) for m in range(1000))], tarfile.XGLTYPE) for n in range(100))
    (tmp_path / "a.tar").write_bytes(b"".join(each + member(f"{n}.png", b"x") for n, each in enumerate(headers)) + END)
    start = time.thread_time()
    assert [record.id for record in records(tmp_path / "a.tar")] == [f"a/{n}" for n in range(100)]
    assert time.thread_time() - start < 1


@pytest.mark.parametrize(
    "content",
    [
        sparse("odd.png", 5, more=True) + MORE * 20_000,
        holes(b"major=1", b"minor=0")[:1024] + member("x", b"9999999\n" + b"1\n" * 2_000_000),
    ],
    ids=["old", "pax"],
)
def test_maps_of_sparse_files_take_no_memory(tmp_path, content):
    """The most that is allocated is measured, since the process may have taken more before."""
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(content + END, 1))
    del content
    tracemalloc.start()
    with suppress(InputError):
        records(tmp_path / "a.tar.gz")
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 4_000_000


@pytest.mark.parametrize("place", ["{}/a.tar", "memory://packed/a.tar"])
@pytest.mark.parametrize("pack", [bz2.compress, lzma.compress, partial(lzma.compress, format=lzma.FORMAT_ALONE)])
def test_only_gzip_is_decompressed(tmp_path, place, pack):
    """Other formats make gigabytes of some bytes. What is gzip is told by the first bytes, not by the name."""
    place = place.format(tmp_path)
    for content, readable in ((gzip.compress(GOOD + END), True), (pack(GOOD + END), False)):
        with fsspec.open(place, "wb") as file:
            file.write(content)
        if readable:
            assert [record.content for record in records(place)] == [b"G"]
            assert read_content(Record("x", f"tar://good.png::{place}")) == b"G"
            continue
        with pytest.raises(InputError, match="no tar, plain or compressed by gzip"):
            records(place)
        with pytest.raises(ImageError, match="no tar, plain or compressed by gzip"):
            read_content(Record("x", f"tar://good.png::{place}"))


@pytest.mark.parametrize("name", ["odd.png", "odd.txt", ".odd"])
@pytest.mark.parametrize(("size", "passed"), [(64_000, True), (65_000, False)])
def test_large_member_is_not_decompressed_to_be_passed_over(tmp_path, name, size, passed):
    content = GOOD + member(name, b"x" * size) + member("last.png", b"L") + END
    (tmp_path / "a.tar").write_bytes(gzip.compress(content))
    (tmp_path / "b.tar").write_bytes(content)
    found, limits = [], Limits(bytes=1000)
    ids = ["a/good", "a/odd", "a/last", "b/good", "b/odd", "b/last"] if name == "odd.png" else []
    ids = ids or ["a/good", "a/last", "b/good", "b/last"]
    refused = pytest.raises(InputError, match=r"cannot read .*a\.tar: a member has 0\.06.* MB.*--max-megabytes to 1 or")
    with nullcontext() if passed else refused:
        found.extend(iter_into(found, open_source(str(tmp_path / "{a,b}.tar"), limits=limits).records()))
    assert [record.id for record in found] == [each for each in ids if passed or each != "a/last"]
    with nullcontext() if passed else pytest.raises(ImageError, match="decompressed"):
        assert read_content(Record("x", f"tar://last.png::{tmp_path}/a.tar"), limits) == b"L"


# Members of tars by their uris


@pytest.fixture
def opens(monkeypatch):
    """Return the list of the archives that are opened."""
    found = []
    monkeypatch.setattr(members, "Tar", lambda file, **given: found.append(file) or Tar(file, **given))
    return found


def packed(place, content):
    with fsspec.open(place, "wb") as file:
        file.write(gzip.compress(content + END, 1) if place.endswith("gz") else content + END)
    return place


@pytest.mark.parametrize("place", ["{}/a.tar", "{}/a.tar.gz", "file://{}/a.tgz", "memory://one-pass/a.tar.gz"])
def test_members_in_order_take_one_pass(tmp_path, place, opens):
    """One that is refused, for it is too large, does not end the pass."""
    place = packed(
        place.format(tmp_path), b"".join(member(f"{n}.png", b"%3d" % n * (1 + n % 7 * 99)) for n in range(200))
    )
    for n in range(200):
        if n % 7 < 4:
            assert read_uri(f"tar://{n}.png::{place}", 1000) == b"%3d" % n * (1 + n % 7 * 99)
            continue
        with pytest.raises(TooLargeError):
            read_uri(f"tar://{n}.png::{place}", 1000)
    assert len(opens) == 1
    # What was passed needs another pass, and so does what is not there.
    assert read_uri(f"tar://1.png::{place}", 1000) == b"  1" * 100
    for _ in range(2):
        with pytest.raises(FileNotFoundError, match=r"no member none\.png"):
            read_uri(f"tar://none.png::{place}", 1000)
    assert read_uri(f"tar://1.png::{place}", 1000) == b"  1" * 100


def test_threads_read_one_tar(tmp_path, opens):
    place = packed(f"{tmp_path}/a.tar.gz", b"".join(member(f"{n}.png", b"%d" % n) for n in range(400)))
    with ThreadPoolExecutor(4) as threads:
        found = threads.map(lambda n: read_uri(f"tar://{n}.png::{place}", 1000), range(400))
        assert list(found) == [b"%d" % n for n in range(400)]
    assert len(opens) < 40


@pytest.mark.parametrize("place", ["{}/a.tar", "memory://changed/a.tar"])
def test_tar_that_is_replaced_is_opened_again(tmp_path, monkeypatch, place, opens):
    place = place.format(tmp_path)
    for n in range(3):
        packed(place, member("a.png", b"%d" % n) + member("b.png", b"%d" % n) + b"\0" * 512 * n)
        assert read_uri(f"tar://a.png::{place}", 1000) == b"%d" % n
    assert read_uri(f"tar://b.png::{place}", 1000) == b"2" and len(opens) == 3
    # A forked process shares the position in the file.
    read_uri(f"tar://a.png::{place}", 1000)
    monkeypatch.setattr(os, "getpid", lambda: 1)
    assert read_uri(f"tar://b.png::{place}", 1000) == b"2" and len(opens) == 5


def test_few_tars_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr(members, "_MEMBERS", 5)
    for n in range(20):
        packed(f"{tmp_path}/{n}.tar", b"".join(member(f"{m}.png", b"%d" % m) for m in range(10)))
    for m in range(10):
        for n in range(20):
            assert read_uri(f"tar://{m}.png::{tmp_path}/{n}.tar", 1000) == b"%d" % m
    assert len(members._idle) <= 8 and all(len(each.passed) <= 5 for each in members._idle)


NAMES = [
    "a.png",
    "./a.png",
    "/a.png",
    "d//a.png",
    "d/é.png",
    "\udcff.png",
    "a::b.png",
    "s3::b.png",
    "::.png",
    "a b\n.png",
]


@pytest.mark.parametrize("folder", ["", "c::d/"])
@pytest.mark.parametrize("name", NAMES)
def test_member_of_any_name(tmp_path, folder, name):
    (tmp_path / folder).mkdir(exist_ok=True)
    place = f"{tmp_path}/{folder}x.tar"
    with open(place, "wb") as file:
        file.write(member("other.png", b"O") + member(name, b"first") + GOOD + member(name, b"second") + END)
    record, _ = (each for each in records(place) if each.content in (b"first", b"second"))
    for uri in (record.uri, f"tar://{name}::{place}", f"tar://{name}::file://{place}"):
        # The first of the name, wherever the reading goes on.
        assert [read_uri(uri, 1000) for _ in range(3)] == [b"first"] * 3
        assert read_uri(f"tar://good.png::{place}", 1000) == b"G" and read_uri(uri, 1000) == b"first"


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("tar://folder::{}", "folder"),
        ("tar://link.png::{}", "symbolic link"),
        ("tar://hard.png::{}", "hard link"),
        ("tar://hole.png::{}", "sparse file"),
        ("tar://large.png::{}", "more than 0.001 MB"),
        ("tar://none.png::{}", "there is no member none.png in "),
        ("tar://::{}", "there is no member"),
        ("tar://good.png", "expected tar://NAME::ARCHIVE"),
        ("tar::{}", "expected tar://NAME::ARCHIVE"),
        ("tar://b.png::tar://good.png::{}", "expected tar://NAME::ARCHIVE"),
        ("tar://b.png::tar://good.png::file://{}", "expected tar://NAME::ARCHIVE"),
        ("simplecache::tar://good.png::{}", "expected tar://NAME::ARCHIVE"),
        ("zip://b.png::tar://good.png::{}", "expected tar://NAME::ARCHIVE"),
        ("tar://good.png::nosuch://{}", "Protocol not known"),
        ("tar://good.png::{}.none", "no such file"),
        ("tar://good.png::memory://none.tar", "none.tar"),
    ],
)
def test_uri_of_no_member(tmp_path, uri, reason):
    content = header("folder/", 0, tarfile.DIRTYPE) + header("link.png", 0, tarfile.SYMTYPE, linkname="good.png")
    content += header("hard.png", 0, tarfile.LNKTYPE, linkname="good.png") + sparse("hole.png", 5)
    packed(f"{tmp_path}/a.tar", content + member("large.png", bytes(2000)) + GOOD)
    with pytest.raises(ImageError, match=f"cannot read .*{reason}"):
        read_content(Record("x", uri.format(f"{tmp_path}/a.tar")), Limits(bytes=1000))


# Mutants


def valid(kind):
    """Return the content of a source of ten records."""
    rows = [{"id": f"id {n}", "uri": f"{n}.png", "target": n, "seed": n} for n in range(10)]
    file = io.BytesIO()
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=4)
    elif kind == "tar":
        file.write(b"".join(member(f"{n}.png", b"x" * 700) for n in range(10)) + END)
    elif kind == "jsonl":
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
    elif kind == "txt":
        file.write("".join(f"{n}.png\n" for n in range(10)).encode())
    else:
        mark = "," if kind == "csv" else "\t"
        file.write("\n".join(mark.join(map(str, row)) for row in [rows[0], *(r.values() for r in rows)]).encode())
    return file.getvalue()


def mutant(content, draw, kind):
    """Return bytes with one to three changes: of a byte, a piece left out, doubled or put in.

    In Parquet only bytes are changed, since nothing can be read where offsets are wrong.
    """
    content = bytearray(content)
    for _ in range(draw.randint(1, 3)):
        at, length = draw.randrange(len(content)), 1 if kind == "parquet" else draw.choice((1, 1, 4, 40))
        piece = {
            "byte": lambda: bytes([draw.randrange(256)]),
            "none": lambda: b"",
            "twice": lambda old=bytes(content[at : at + length]): old * 2,
            "odd": lambda: draw.choice((b"\0", b"\n", b'"', b"\xff", b"::", b"\\ud800", b"9" * 50, b"[" * 50)),
        }["byte" if kind == "parquet" else draw.choice(("byte", "byte", "none", "twice", "odd"))]()
        content[at : at + length] = piece
        content = content or bytearray(b"x")
    return bytes(content)


def check_mutants(folder, kind, count):
    """Check that mutants raise nothing but DaveFastError, and that those that are read have all their records."""
    content, read = valid(kind), 0
    place = folder / f"m.{kind}"
    for seed in range(count):
        changed = mutant(content, random.Random(f"{kind} {seed}"), kind)
        place.write_bytes(changed)
        try:
            source = open_source(str(place))
            found = list(source.records())
        except DaveFastError:
            continue
        except BaseException as error:
            raise AssertionError(f"the mutant {seed} of a .{kind} raises {error!r}") from error
        read += 1
        for record in found:
            assert record.id.encode() and -(2**63) <= (record.target or 0) < 2**63, seed
        if source.count is not None:
            assert len(found) == source.count, seed
        if kind in ("txt", "jsonl"):
            lines = changed.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
            assert len(found) == sum(bool(line.decode(errors="surrogateescape").strip()) for line in lines), seed
    return read


KINDS = ["txt", "csv", "tsv", "jsonl", "parquet", "tar"]


@pytest.mark.parametrize("kind", KINDS)
def test_mutants(tmp_path, kind):
    assert check_mutants(tmp_path, kind, 40) > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_mutants(tmp_path, kind):
    assert check_mutants(tmp_path, kind, 10_000) > 100


@pytest.mark.parametrize("at", range(0, 512 * 3, 97))
def test_tar_with_a_changed_byte_loses_no_record(tmp_path, at):
    content = bytearray(valid("tar"))
    content[at] ^= 0x15
    (tmp_path / "m.tar").write_bytes(content)
    found = []
    try:
        found.extend(iter_into(found, open_source(str(tmp_path / "m.tar")).records()))
    except InputError:
        return
    assert len(found) == 10


# The lock


def test_lock_of_a_folder_that_was_removed(tmp_path):
    """Who waits for the lock of a folder that is removed gets the lock of the new one, and is alone."""
    folder = tmp_path / "out"
    first = Lock.take(folder)
    Fence.renew(folder)
    got = []
    waiting = threading.Thread(target=lambda: got.append(Lock.take(folder, 30.0)))
    waiting.start()
    time.sleep(0.1)
    first.release()
    _remove_if_unused(folder)
    waiting.join()
    fence = Fence.renew(folder)
    with pytest.raises(InputError, match="another run is at work"):
        Lock.take(folder, 0.1)
    _remove_if_unused(folder)
    with fence.inside():
        pass
    got[0].release()
    _remove_if_unused(folder)
    assert not folder.exists()
    with pytest.raises(RunError, match="was removed"), fence.inside():
        pass


def test_locks_of_many_refused_runs_exclude_each_other(tmp_path):
    folder, inside, most = tmp_path / "out", [], []

    def refused():
        for _ in range(20):
            lock = Lock.take(folder, 60.0)
            inside.append(1)
            most.append(len(inside))
            assert os.path.samestat(os.fstat(lock._handle), os.stat(folder / ".lock"))
            inside.pop()
            lock.release()
            _remove_if_unused(folder)

    threads = [threading.Thread(target=refused) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 80 and set(most) == {1}


def test_folder_with_results_is_not_removed(tmp_path):
    Lock.take(tmp_path / "out").release()
    (tmp_path / "out/run.json").write_text("{}")
    _remove_if_unused(tmp_path / "out")
    assert (tmp_path / "out/run.json").exists()


# Exports

ENDINGS = (".map.png", ".overlay.png")
IDS = [
    ["a:b", "a_b"],
    ["a/b", "a//b", "./a/b", "a\\b", "/a/b", "../a/b"],
    ["x" * 30 + "y" * 220, "z" * 30 + "y" * 220],
    ["../../../../tmp/x", "/tmp/x", "~/x", "..\\..\\x"],
    ["x", "x.map.png/y", "x.overlay.png/y", "X.MAP.png/z"],
    ["ä" * 200, "\N{OLD ITALIC LETTER A}" * 100, "e" * 5000],
    ["a/" * 900 + "b", "c/" * 900 + "b"],
    ["A", "a", "Ä", "ä", "a\u0308", "A\u0308", "ß", "ss"],
    ["", ".", "..", "/", "\0", "_"],
    ["a\0b", "ab"],
    ["\0/tmp/x", ".\0./x", "\0..", ".\0/.\0./.\0./x"],
    ["x.map", "x", "x.overlay", "x.map.png"],
    ["-rf", "a\nb", "a b", " ", "\x1b[31m", '*?<>|"'],
]


@pytest.mark.parametrize("ids", IDS, ids=range(len(IDS)))
def test_file_names(tmp_path, ids):
    """No two ids make one file, all files lie in the folder, and the file system takes them."""
    names = file_names(ids, ENDINGS)
    files = [f"{name}.{kind}.png" for name in names for kind in ("map", "overlay")]
    assert len({file.casefold() for file in files}) == len(files)
    for file in files:
        path = tmp_path / "out" / file
        assert ".." not in path.parts and max(len(part.encode()) for part in path.parts) <= 220
        path.parent.mkdir(parents=True, exist_ok=True)
        assert not path.exists()
        path.touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_names_of_ids_that_have_one_stay(tmp_path):
    assert file_names(["a/b.png", "c d", "é"], ENDINGS) == ["a/b.png", "c d", "é"]


def test_name_that_looks_like_that_of_a_hash(tmp_path):
    second = file_names(["a", "A"], ENDINGS)[1]
    assert second != "A" and len(set(file_names(["a", second, "A"], ENDINGS))) == 3


@pytest.mark.usefixtures("forked_workers")
def test_error_that_names_a_file_of_any_bytes(tmp_path):
    (tmp_path / "list.txt").write_bytes(b"\xff.png\nhttp://[::1\nnosuch://x\n::\n.\n")
    summary = stubs.run(tmp_path / "list.txt", tmp_path / "run")
    assert (summary.records, summary.errors) == (5, 5)


@pytest.mark.usefixtures("forked_workers")
def test_export_of_odd_names(tmp_path):
    (tmp_path / "in").mkdir()
    names = [b"x", b"\xff.png", b"a:b.png", b"a_b.png", b"A_B.png", b"y" * 251 + b".png"]
    for name in names[1:]:
        (tmp_path / "in" / os.fsdecode(name)).write_bytes(picture())
    stubs.run(tmp_path / "in", tmp_path / "run")
    assert export(dave_fast.open_maps(tmp_path / "run"), "png", tmp_path / "png") == 0
    made = [path for path in (tmp_path / "png").rglob("*.overlay.png") if stat.S_ISREG(path.stat().st_mode)]
    assert len(made) == len(names) - 1
