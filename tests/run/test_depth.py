"""The depth of a run's maps: what is stored, read and exported, and which runs are continued."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import dave_fast
from dave_fast.cli.app import app
from dave_fast.errors import InputError
from dave_fast.models.demo import demo_scene
from dave_fast.run.export import export
from dave_fast.run.mapper import Mapper, MapSettings
from dave_fast.run.records import Record, image_key
from tests.run import stubs

pytestmark = pytest.mark.usefixtures("forked_workers")

SETTINGS = {"precision": "fp32", "noise_alpha": 0.5}
HALF = np.finfo(np.float16).eps


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for number in range(2):
        Image.fromarray(np.roll(np.asarray(demo_scene().image), 9 * number, 1)).save(folder / f"{number}.png")
    return folder


def map_settings(depth, **changes):
    return MapSettings(**{"model": "demo", "n_samples": 2, "options": SETTINGS, "depth": depth, **changes})


@pytest.mark.parametrize(("depth", "name"), [("pixels", "pixels"), (1, 1), (0.5, 3), ("auto", "2-4")])
def test_rows_have_the_map_and_raw_of_explain_at_that_depth(photos, depth, name):
    mapper = Mapper(map_settings(depth, raw=True), "cpu")
    assert mapper.configuration["depth"] == name
    record = Record("0.png", str(photos / "0.png"))
    image = mapper.decode(record)
    (row,) = mapper.explain([record], [image], None)
    found = dave_fast.DAVE("demo", **SETTINGS).explain(
        image[None], None, 2, depth=depth, image_keys=[image_key(record.id)]
    )
    stored = np.frombuffer(row["map"], "<f2").reshape(128, 128)
    np.testing.assert_array_equal(stored, found.maps[0].numpy().astype("<f2"))
    raw = np.frombuffer(row["raw"], "<f2").reshape(3, 128, 128) * np.float32(row["raw_scale"])
    torch.testing.assert_close(torch.from_numpy(raw), found.raw[0], rtol=HALF, atol=1e-6)


def test_reader_and_exports_name_the_block(photos, tmp_path):
    stubs.run(str(photos), tmp_path / "deep", depth=3)
    maps = dave_fast.open_maps(tmp_path / "deep")
    assert maps.depth == maps[:1].depth == 3
    export(maps, "npy", tmp_path / "npy")
    lines = (tmp_path / "npy/index.csv").read_text().splitlines()
    assert lines[0].endswith(",depth") and all(line.endswith(",3") for line in lines[1:])
    given = ["export", str(tmp_path / "deep"), "--to", "npy", "--out", str(tmp_path / "again")]
    assert "2 maps of the tokens of block 3 written" in CliRunner().invoke(app, given).stdout


def test_a_run_is_continued_at_the_same_depth_only(photos, tmp_path):
    out = tmp_path / "out"
    stubs.run(str(photos), out, limit=1, depth=3)
    with pytest.raises(InputError, match=r"configuration\.depth: 3 before, pixels now"):
        stubs.run(str(photos), out)
    assert stubs.run(str(photos), out, depth=3).records == 2


def test_runs_without_a_depth_are_of_pixels_and_are_continued(photos, tmp_path):
    out = tmp_path / "out"
    stubs.run(str(photos), out, limit=1)
    made = json.loads((out / "run.json").read_bytes())
    del made["configuration"]["depth"]
    (out / "run.json").write_text(json.dumps(made))
    assert dave_fast.open_maps(out).depth == "pixels"
    stubs.run(str(photos), out)
    assert len(dave_fast.open_maps(out)) == 2


@pytest.mark.parametrize(
    ("depth", "words"),
    [
        ("pixels,1", "expected one depth here; run the command once for each"),
        ("deep", "depth 'deep' is unknown; expected 'pixels'"),
        ("5", "depth is block 5 and the model has the blocks 0 to 4"),
    ],
)
def test_several_and_unknown_depths_leave_no_run(photos, tmp_path, depth, words):
    given = ["run", str(photos), "--model", "demo", "--depth", depth, "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 2 and words in " ".join(result.stderr.split())
    assert not (tmp_path / "run").exists()
