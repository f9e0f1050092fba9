"""Tests of the sources of a run: records, ids that never change, errors."""

import io
import json
import os
import tarfile

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dave_fast.errors import ImageError, InputError
from dave_fast.run.contents import read_content
from dave_fast.run.records import Record, image_key
from dave_fast.run.sources import open_source
from dave_fast.run.tars import expand_braces


def records(place, **settings):
    return list(open_source(str(place), **settings).records())


def make_tar(path, members, mode="w"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_image_key_is_pinned():
    """Image keys must never change, since maps depend on them."""
    assert image_key("n01518878/ILSVRC2012_val_00007197.JPEG") == 0xC56B94982E47DA9E
    assert image_key("a") != image_key("b")
    assert 0 <= image_key("é") < 2**64


# Folders


def test_folder(tmp_path):
    for name in ("b/2.PNG", "a/1.jpg", "a/.hidden.jpg", "a/notes.txt", ".git/x.png", "a/x.overlay.png", "out/r.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(name.encode())
    found = records(tmp_path, leave_out=tmp_path / "out")
    assert [record.id for record in found] == ["a/1.jpg", "b/2.PNG"]
    assert [read_content(record) for record in found] == [b"a/1.jpg", b"b/2.PNG"]
    # Renaming a folder below the source changes the ids, and thus the identity.
    before = open_source(str(tmp_path), leave_out=tmp_path / "out").identity
    os.rename(tmp_path / "a", tmp_path / "c")
    assert open_source(str(tmp_path), leave_out=tmp_path / "out").identity != before


def test_name_that_is_no_unicode(tmp_path):
    try:
        (tmp_path / os.fsdecode(b"\xff.png")).write_bytes(b"here")
    except OSError:
        pytest.skip("this file system takes Unicode names only")
    (record,) = records(tmp_path)
    assert record.id == "\\xff.png" and read_content(record) == b"here"


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("none", "no file or folder"),
        ("file.doc", "is no source"),
        ("empty", "no image in"),
        ("s3://b/folder", "give a list of its images"),
    ],
)
def test_no_source(tmp_path, monkeypatch, place, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.doc").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=message):
        open_source(place)


# Lists and manifests

ROWS = [
    {"id": "one", "uri": "a.png", "target": 3, "seed": 7},
    {"id": "two", "uri": "memory://x/b.png", "target": None, "seed": None},
]


def written(tmp_path, kind):
    path = tmp_path / f"list.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    elif kind == "txt":
        path.write_bytes("\ufeffa.png\r\n\r\nmemory://x/b.png\n".encode())
    else:
        mark = "\t" if kind == "tsv" else ","
        path.write_text(
            f"id{mark}uri{mark}target{mark}seed\none{mark}a.png{mark}3{mark}7\ntwo{mark}memory://x/b.png{mark}{mark}\n"
        )
    return path


@pytest.mark.parametrize("kind", ["txt", "csv", "tsv", "jsonl", "parquet"])
def test_lists(tmp_path, kind):
    (tmp_path / "a.png").write_bytes(b"local")
    with fsspec.open("memory://x/b.png", "wb") as file:
        file.write(b"remote")
    one, two = records(written(tmp_path, kind))
    if kind == "txt":
        assert (one.id, two.id, one.target, one.seed) == ("a.png", "memory://x/b.png", None, None)
    else:
        assert (one.id, one.target, one.seed) == ("one", 3, 7)
        assert (two.id, two.target, two.seed) == ("two", None, None)
    assert (read_content(one), read_content(two)) == (b"local", b"remote")
    source = open_source(str(tmp_path / f"list.{kind}"))
    assert source.count == 2 and [r.id for r in source.records(lambda i: i == one.id)] == [two.id]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_list_behind_a_url(tmp_path, kind):
    """Relative uris of a remote list start at the list's URL."""
    url = f"memory://lists/deep/list.{kind}"
    with fsspec.open(url, "wb") as file:
        file.write(written(tmp_path, kind).read_bytes())
    with fsspec.open("memory://lists/deep/a.png", "wb") as file:
        file.write(b"beside it")
    one, _ = records(url)
    assert read_content(one) == b"beside it"


def test_manifest_of_several_files(tmp_path):
    for name in ("b", "a"):
        pq.write_table(pa.table({"path": [f"{name}.png"]}), tmp_path / f"{name}.parquet")
    assert [r.id for r in records(tmp_path)] == ["a.png", "b.png"]
    assert [r.id for r in records(tmp_path / "*.parquet")] == ["a.png", "b.png"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("l.csv", "id,uri\nx,a\nx,b\n", "the id 'x' occurs twice"),
        ("l.csv", "image\na.png\n", "line 2: there is no uri"),
        ("l.csv", "uri,target\na.png,cat\n", "line 2: target is 'cat'; expected an integer"),
        ("l.csv", "uri,seed\na.png,99999999999999999999\n", "line 2: seed is '99999999999999999999'"),
        ("l.jsonl", "{", "line 1 is no JSON"),
        ("l.jsonl", "[]", "line 1: expected a JSON object"),
        ("l.jsonl", '{"uri": "a", "target": 1.5}', "target is 1.5"),
        ("l.txt", "\n", "names no image"),
        ("l.parquet", "x", "cannot read"),
    ],
)
def test_lists_that_are_not_in_order(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        open_source(str(tmp_path / name))


@pytest.mark.parametrize("place", ["none.csv", "none.parquet", "none.tar", "memory://no/such.csv", "nofs://x/y.csv"])
def test_list_that_is_not_there(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"cannot read|no file|cannot list|no tar"):
        open_source(place)


def test_labels_only_where_there_are_any(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(InputError, match="only tars and datasets have labels"):
        open_source(str(tmp_path), labels=True)


@pytest.mark.parametrize("uri", ["/no/such.png", "memory://no/such.png", "nofs://x.png", "tar://x.png::/no/such.tar"])
def test_image_that_is_not_there(uri):
    with pytest.raises(ImageError, match=f"cannot read {uri}"):
        read_content(Record("x", uri))


# Tars

MEMBERS = {
    "x/a.jpg": b"A",
    "x/a.cls": b"3\n",
    "x/b.json": b"{}",
    "x/b.png": b"B",
    "x/b.seg.png": b"not the first",
    "x/c.txt": b"no image",
    "x/.d.png": b"hidden",
    "e.f.webp": b"E",
}


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tgz"])
def test_tar(tmp_path, suffix):
    path = make_tar(tmp_path / f"shard-00{suffix}", MEMBERS, "w" if suffix == ".tar" else "w:gz")
    found = records(path, labels=True)
    assert [r.id for r in found] == ["shard-00/x/a", "shard-00/x/b", "shard-00/e"]
    assert [r.content for r in found] == [b"A", b"B", b"E"]
    assert [r.target for r in found] == [3, None, None]
    assert [r.target for r in records(path)] == [None] * 3
    # The uri alone is enough to read the image.
    assert [read_content(Record(r.id, r.uri)) for r in found] == [b"A", b"B", b"E"]
    rest = open_source(str(path)).records(lambda record_id: record_id != "shard-00/x/b")
    assert [r.content for r in rest] == [b"B"]


def test_tars_behind_a_url(tmp_path):
    for number in range(3):
        content = make_tar(tmp_path / f"{number}.tar", {"k.png": b"%d" % number}).read_bytes()
        with fsspec.open(f"memory://tars/{number}.tar", "wb") as file:
            file.write(content)
    for place in ("memory://tars/{0..2}.tar", "memory://tars/*.tar"):
        found = records(place)
        assert [(r.id, r.content) for r in found] == [("0/k", b"0"), ("1/k", b"1"), ("2/k", b"2")]
        assert read_content(Record("", found[2].uri)) == b"2"


def test_tars_of_one_name(tmp_path):
    for folder in ("train", "val"):
        make_tar(tmp_path / folder / "0.tar", {"k.png": folder.encode()})
    assert [r.id for r in records(tmp_path / "*" / "0.tar")] == ["train/0/k", "val/0/k"]


def test_truncated_tar(tmp_path):
    path = make_tar(tmp_path / "t.tar", {f"{n}.png": b"x" * 3000 for n in range(5)})
    path.write_bytes(path.read_bytes()[:9000])
    found = []
    with pytest.raises(InputError, match=f"cannot read {path}"):
        found.extend(iter_into(found, open_source(str(path)).records()))
    assert len(found) == 2


def iter_into(found, iterator):
    for each in iterator:
        found.append(each)
    return []


@pytest.mark.parametrize(
    ("text", "expanded"),
    [
        ("a", ["a"]),
        ("a{08..10}b", ["a08b", "a09b", "a10b"]),
        ("{9..10}", ["9", "10"]),
        ("{a,b}{0..1}", ["a0", "a1", "b0", "b1"]),
    ],
)
def test_braces(text, expanded):
    assert expand_braces(text) == expanded


# Hugging Face datasets


@pytest.fixture
def dataset(tmp_path):
    datasets = pytest.importorskip("datasets", reason="an extra: dave-fast[datasets]")
    rows = {
        "image": [{"bytes": b"%d" % n, "path": None} for n in range(100)],
        "label": [n % 3 for n in range(100)],
    }
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    made = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": made, "test": made.select(range(3))}).save_to_disk(tmp_path / "both")
    made.save_to_disk(tmp_path / "one")
    return tmp_path


def test_dataset(dataset):
    found = records(dataset / "one", labels=True)
    assert [r.id for r in found[:2]] == ["all/0", "all/1"] and len(found) == 100
    assert [read_content(r) for r in found] == [b"%d" % n for n in range(100)]
    assert [r.target for r in found[:4]] == [0, 1, 2, 0]
    rest = open_source(str(dataset / "one")).records(lambda record_id: record_id != "all/70")
    assert [(read_content(r), r.target) for r in rest] == [(b"70", None)]


def test_splits_of_a_dataset(dataset):
    assert [r.id for r in records(f"hf://{dataset}/both:test")] == ["test/0", "test/1", "test/2"]
    with pytest.raises(InputError, match="has the splits train, test: name one"):
        open_source(f"hf://{dataset}/both")


def test_dataset_that_is_not_there(dataset, monkeypatch):
    import datasets

    def fail(name):
        raise ConnectionError("Couldn't reach the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(InputError, match="cannot open the dataset no/such: Couldn't reach the Hub"):
        open_source("hf://no/such:train")
