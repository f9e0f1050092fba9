"""Tests of exports as arrays and pictures, of their names, and of what is refused."""

import csv
import json
import sys

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import dave_fast
from dave_fast.cli.app import app
from dave_fast.errors import InputError
from dave_fast.run.export import FORMS, export
from dave_fast.run.limits import Limits
from tests.run import made

PICTURES = [name for name, form in FORMS.items() if form.several_sizes]
ARRAYS = [name for name in FORMS if name not in PICTURES]
# of the extra `export`
PACKAGES = {"zarr": "zarr", "virelay": "h5py", "tensorboard": "tensorboard"}
EXTRA = "an extra: dave-fast[export]"


def needs(to):
    """Skip a test of a form whose package is not installed."""
    if to in PACKAGES:
        pytest.importorskip(PACKAGES[to], reason=EXTRA)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return made.scenes(tmp_path_factory.mktemp("photos"), 7)


def records(photos, **columns):
    return [{"id": path.name, "uri": str(path), **columns} for path in photos]


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory):
    """A run of seven maps with contributions, and an error."""
    rows = [*records(photos), {"id": "bad.png", "uri": "/bad.png", "error": "no image"}]
    return made.make_run(tmp_path_factory.mktemp("runs") / "run", rows, raw=True)


@pytest.fixture(scope="module")
def maps(run):
    return dave_fast.open_maps(run)


@pytest.fixture(scope="module")
def good(maps):
    return maps.filter(status="ok")


# Arrays


def test_zarr(maps, good, tmp_path):
    zarr = pytest.importorskip("zarr", reason=EXTRA)
    export(maps, "zarr", tmp_path / "z")
    group = zarr.open_group(tmp_path / "z", mode="r")
    assert group.metadata.zarr_format == 3
    np.testing.assert_array_equal(group["map"][:], good.numpy())
    np.testing.assert_array_equal(group["raw"][3], good[3].raw)
    assert group.attrs["id"] == good.ids and group["target"][:].tolist() == good.column("target").tolist()


def test_npy(maps, good, tmp_path):
    export(maps, "npy", tmp_path / "n")
    np.testing.assert_array_equal(np.load(tmp_path / "n/maps.npy", mmap_mode="r"), good.numpy())
    with open(tmp_path / "n/index.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == good.ids
    assert {(row["shrink"], row["depth"]) for row in rows} == {("True", "pixels")}


def test_virelay(photos, good, maps, tmp_path):
    h5py = pytest.importorskip("h5py", reason=EXTRA)
    export(maps, "virelay", tmp_path / "v.h5")
    with h5py.File(tmp_path / "v.h5") as book:
        assert book["attribution"].shape == (7, 3, 16, 16) and book["attribution"].dtype == np.float32
        np.testing.assert_array_equal(book["attribution"][2], good[2].raw)
        assert book["index"].dtype == book["label"].dtype == np.uint32
        assert book["label"][:].tolist() == good.column("target").tolist()
    made.make_run(tmp_path / "plain", records(photos))
    plain = dave_fast.open_maps(tmp_path / "plain")
    export(plain, "virelay", tmp_path / "w.h5")
    with h5py.File(tmp_path / "w.h5") as book:
        assert book["attribution"].shape == (7, 1, 16, 16)
        assert book["prediction"][0, plain[0].target] == np.float32(plain[0].probability)
        assert book["prediction"][0].sum() == book["prediction"][0, plain[0].target]


# Pictures


def test_png_with_contributions_has_three_pictures_a_record(maps, good, tmp_path):
    assert export(maps, "png", tmp_path / "p") == 0
    names = sorted(path.name for path in (tmp_path / "p").iterdir())
    assert names == sorted(f"{i}.{kind}.png" for i in good.ids for kind in ("map", "overlay", "signed"))
    with Image.open(tmp_path / "p/0.png.overlay.png") as picture:
        assert picture.size == (448, 448)


def test_png_without_contributions_has_two_pictures_a_record(photos, tmp_path):
    made.make_run(tmp_path / "run", records(photos[:1]))
    export(dave_fast.open_maps(tmp_path / "run"), "png", tmp_path / "p")
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == ["0.png.map.png", "0.png.overlay.png"]


def test_signed_picture_is_orange_where_contributions_are_positive_and_blue_where_negative(photos, tmp_path):
    from dave_fast.run.export.pictures import laid_over

    raw = np.ones((3, 16, 16), np.float32)
    raw[:, :, 8:] = -1
    made.make_run(tmp_path / "run", records(photos[:1]), raw=True)
    row = dave_fast.open_maps(tmp_path / "run")[0]
    object.__setattr__(row, "raw", raw)
    picture = np.asarray(laid_over(row, np.zeros((16, 16, 3), np.uint8))["signed"], np.int16)
    left, right = picture[200:240, 60:120].mean((0, 1)), picture[200:240, 330:390].mean((0, 1))
    assert left[0] > left[2] + 50 and right[2] > right[0] + 50


def test_folder_has_what_there_is_to_know_beside_the_pictures(maps, good, tmp_path):
    assert export(maps, "folder", tmp_path / "f") == 0
    index = json.loads((tmp_path / "f/index.json").read_text())
    assert [record["id"] for record in index["records"]] == good.ids and index["model"] == "demo"
    row = good[3]
    record = index["records"][3]
    assert record["target_name"] == made.NAMES[row.target] and record["uri"] == row.uri
    beside = json.loads((tmp_path / "f" / record["files"]["record"]).read_text())
    assert (beside["target"], beside["probability"], beside["n_samples"]) == (row.target, row.probability, 3)
    assert beside["settings"]["sampling"] == {"noise_alpha": 0.5} and beside["depth"] == "pixels"
    for name in beside["files"].values():
        with Image.open(tmp_path / "f" / name) as picture:
            assert picture.size == (448, 448)


def test_folder_of_a_record_named_like_the_index_keeps_both(photos, tmp_path):
    made.make_run(tmp_path / "run", [{"id": name, "uri": str(photos[0])} for name in ("index", "INDEX")])
    export(dave_fast.open_maps(tmp_path / "run"), "folder", tmp_path / "f")
    index = json.loads((tmp_path / "f/index.json").read_text())
    for record in index["records"]:
        assert json.loads((tmp_path / "f" / record["files"]["record"]).read_text())["id"] == record["id"]


@pytest.mark.parametrize("to", PICTURES)
def test_photographs_that_are_gone_are_counted_and_all_of_them_are_an_error(photos, tmp_path, to):
    needs(to)
    copies = [tmp_path / "photos" / path.name for path in photos[:2]]
    made.scenes(tmp_path / "photos", 2)
    made.make_run(tmp_path / "run", records(copies))
    maps = dave_fast.open_maps(tmp_path / "run")
    copies[0].unlink()
    assert export(maps, to, tmp_path / "p") == 1
    copies[1].unlink()
    with pytest.raises(InputError, match="no image could be read again"):
        export(maps, to, tmp_path / "q")
    assert not (tmp_path / "q").exists() and not list(tmp_path.glob(".*.part"))


@pytest.mark.parametrize("to", PICTURES)
def test_photographs_above_the_limits_are_not_read(maps, tmp_path, to):
    needs(to)
    assert export(maps[:1], to, tmp_path / "p", limits=Limits(pixels=48 * 32)) == 0
    with pytest.raises(InputError, match="no image could be read again"):
        export(maps[:1], to, tmp_path / "q", limits=Limits(pixels=48 * 32 - 1))


@pytest.mark.parametrize("to", PICTURES)
def test_maps_of_several_sizes_make_pictures(photos, tmp_path, to):
    needs(to)
    rows = records(photos[:2])
    rows[1]["map"] = made.blob(24, 0.5, 0.5, 0.2)
    made.make_run(tmp_path / "run", rows)
    assert export(dave_fast.open_maps(tmp_path / "run"), to, tmp_path / "p") == 0


# Refusals


@pytest.mark.parametrize("to", ARRAYS)
def test_arrays_of_several_sizes_are_refused_with_the_forms_that_take_them(photos, tmp_path, to):
    rows = records(photos[:2])
    rows[1]["map"] = np.ones((4, 4), np.float32)
    made.make_run(tmp_path / "run", rows)
    with pytest.raises(InputError, match=r"several sizes.*--to png"):
        export(dave_fast.open_maps(tmp_path / "run"), to, tmp_path / "x")


@pytest.mark.parametrize(("to", "package"), PACKAGES.items())
def test_missing_packages(maps, tmp_path, monkeypatch, to, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"needs the package {package}, which is missing: pip install '\.\[export\]'"):
        export(maps, to, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_unknown_form_existing_folder_and_nothing_to_export_are_refused(maps, tmp_path):
    with pytest.raises(InputError, match="cannot export to 'jpeg'; expected one of html"):
        export(maps, "jpeg", tmp_path / "x")
    with pytest.raises(InputError, match="exists already"):
        export(maps, "npy", tmp_path)
    with pytest.raises(InputError, match="no map to export"):
        export(maps.filter(status="error"), "npy", tmp_path / "x")


@pytest.mark.parametrize("share", [0, -0.5, 1.01, float("nan")])
def test_shares_that_are_none_are_refused(maps, tmp_path, share):
    with pytest.raises(InputError, match="expected more than 0 and at most 1"):
        export(maps, "coco", tmp_path / "x", share=share)


@pytest.mark.parametrize("to", FORMS)
def test_an_export_that_fails_leaves_nothing(maps, tmp_path, to):
    def stop(done):
        raise KeyboardInterrupt

    needs(to)
    with pytest.raises(KeyboardInterrupt):
        export(maps, to, tmp_path / "out", stop)
    assert list(tmp_path.iterdir()) == []


# Class names


def test_names_come_with_the_run_from_a_file_or_are_numbers(run, photos, tmp_path):
    assert dave_fast.open_maps(run).labels.name(3) == "digit 3"
    (tmp_path / "names.txt").write_text("\n".join("abcdefghij"))
    named = dave_fast.open_maps(run).named(tmp_path / "names.txt")
    assert named.labels.name(3) == named[:2].labels.name(3) == named.filter(status="ok").labels.name(3) == "d"
    made.make_run(tmp_path / "run", records(photos[:1]), names=None)
    assert dave_fast.open_maps(tmp_path / "run").labels.name(3) == "class 3"


def test_names_of_another_number_are_refused(run, tmp_path):
    with pytest.raises(InputError, match="there are 3 class names; expected 10"):
        dave_fast.open_maps(run).named(["a", "b", "c"])
    made.make_run(tmp_path / "run", [{"id": "a", "uri": "a"}], names=["one"])
    with pytest.raises(InputError, match=r"labels\.json is no list of 10 class names: mend it, or delete it"):
        dave_fast.open_maps(tmp_path / "run")


# The command


def test_command_tells_maps_and_errors_and_takes_names(run, tmp_path):
    (tmp_path / "names.txt").write_text("\n".join("abcdefghij"))
    given = [
        "export",
        str(run),
        "--to",
        "folder",
        "--out",
        str(tmp_path / "f"),
        "--labels",
        str(tmp_path / "names.txt"),
    ]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 0 and "7 maps of pixels written to" in result.stdout
    assert json.loads((tmp_path / "f/index.json").read_text())["records"][3]["target_name"] == "d"
    result = CliRunner().invoke(app, ["export", str(run), "--to", "html", "--out", str(tmp_path / "g"), "--limit", "8"])
    assert result.exit_code == 0 and "7 maps of pixels, and 1 errors, written to" in result.stdout
