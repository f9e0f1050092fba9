"""Tests of datasets, lists and manifests that are not as they should be: the reason is said, the good are read."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dave_fast.errors import InputError
from dave_fast.run.contents import read_content
from dave_fast.run.sources import open_source
from dave_fast.run.texts import checked_text


def picture():
    file = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(file, "PNG")
    return file.getvalue()


def saved(folder, columns, **features):
    datasets = pytest.importorskip("datasets", reason="an extra: dave-fast[datasets]")
    known = {"image": datasets.Image()} | {name: getattr(datasets, kind)() for name, kind in features.items()}
    made = datasets.Dataset.from_dict(columns)
    for name, feature in known.items():
        made = made.cast_column(name, feature)
    made.save_to_disk(folder)
    return str(folder)


@pytest.mark.parametrize("other", [b"", b"no image", b"\x89PNG\r\n\x1a\n"])
def test_other_columns_of_a_dataset_are_not_read(tmp_path, other):
    columns = {"mask": [{"bytes": other, "path": None}] * 2, "image": [{"bytes": picture(), "path": None}] * 2}
    place = saved(tmp_path / "dataset", columns, mask="Image")
    assert [read_content(record) for record in open_source(place).records()] == [picture()] * 2


@pytest.mark.parametrize("ids", [[["a"], ["b"]], [{"a": 1}, {"a": 2}], ["a", "b\0"], [b"a", b"b"]])
def test_ids_of_a_dataset_that_are_no_text(tmp_path, ids):
    place = saved(tmp_path / "dataset", {"id": ids, "image": [{"bytes": picture(), "path": None}] * 2})
    with pytest.raises(InputError, match=r"the id of row \d.*expected text"):
        open_source(place)


@pytest.mark.parametrize("ids", [[1, 2], ["a", "ä"]])
def test_ids_of_a_dataset(tmp_path, ids):
    place = saved(tmp_path / "dataset", {"id": ids, "image": [{"bytes": picture(), "path": None}] * 2})
    assert [record.id for record in open_source(place).records()] == [str(each) for each in ids]


@pytest.mark.parametrize("row", [{"uri": "a\0.png"}, {"uri": "a.png", "id": "\0"}, {"path": "a", "id": "x\0y"}])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_nul_in_a_list(tmp_path, kind, row):
    path = tmp_path / f"list.{kind}"
    rows = [dict.fromkeys(row, "good.png"), row]
    if kind == "jsonl":
        path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    with pytest.raises(InputError, match=rf"list\.{kind}, (line|row) 2.* has a NUL character"):
        open_source(str(path))


@pytest.mark.parametrize("value", [b"a", [], (), {}, {"a"}, "\ud800", "\0", "a\0"])
def test_no_text(value):
    with pytest.raises(InputError, match=r"the id.*expected"):
        checked_text(value, "the id")


@pytest.mark.parametrize("value", ["a", "", "\udcff", 3, 1.5, True, "\n"])
def test_text(value):
    assert checked_text(value, "the id") == str(value)


@pytest.mark.parametrize(
    "place",
    [
        *("zip://*.parquet::{}/bad.zip", "tar://*.parquet::{}/bad.zip", "zip://*.parquet::{}/none.zip"),
        "http://127.0.0.1:9/*.parquet",
        *("zip://a.parquet::{}/bad.zip", "http://127.0.0.1:9/a.parquet", "nosuchprotocol://*.parquet"),
    ],
)
def test_manifests_in_what_cannot_be_opened(tmp_path, place):
    (tmp_path / "bad.zip").write_bytes(b"no archive")
    with pytest.raises(InputError, match="cannot read"):
        open_source(place.format(tmp_path))
