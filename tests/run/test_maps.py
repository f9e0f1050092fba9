"""Tests of a run's maps: independence of batches, workers and interruptions; reading; exporting."""

import gc
import json
import os
import pickle
import random
import re
import shutil
import weakref
from contextlib import suppress

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import dave_fast
from dave_fast import DAVE
from dave_fast.errors import ImageError, InputError, NonFiniteError
from dave_fast.images import decode_image, from_config
from dave_fast.models.demo import CLASS_NAMES, demo_scene
from dave_fast.models.spec import ModelSpec
from dave_fast.run import contents, shards
from dave_fast.run.contents import Notes
from dave_fast.run.export import export
from dave_fast.run.local import Machine
from dave_fast.run.mapper import Mapper, MapSettings, packed_map, packed_raw
from dave_fast.run.records import Record, image_key
from dave_fast.run.runner import run_dataset
from tests.run import stubs

pytestmark = pytest.mark.usefixtures("forked_workers")

# Of float32, since sums differ between batches; relative to a map's maximum of 1.
ROUNDING = 2e-4
SETTINGS = {"precision": "fp32", "noise_alpha": 0.5}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of seven scenes and one file that is no image."""
    folder = tmp_path_factory.mktemp("photos")
    scene = np.asarray(demo_scene().image)
    for number in range(7):
        Image.fromarray(np.roll(scene, 9 * number, 1)).save(folder / f"{number}.png")
    (folder / "bad.png").write_bytes(b"no image")
    return folder


def map_settings(**changes):
    return MapSettings(**{"model": "demo", "n_samples": 3, "options": SETTINGS, **changes})


@pytest.fixture(scope="module")
def whole(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    run_dataset(str(photos), out, map_settings(raw=True, outputs=True))
    return out


def images(photos):
    return {path.name: path for path in sorted(photos.glob("[0-9].png"))}


@pytest.fixture(scope="module")
def mapper():
    return Mapper(map_settings(), "cpu")


@pytest.fixture(scope="module")
def explainer():
    return DAVE("demo", **SETTINGS)


def alone(explainer, mapper, photos, name, seed=0, target=None):
    inputs = mapper.prepare.transform(decode_image((photos / name).read_bytes(), name))
    return explainer.explain(inputs, target, 3, seed, image_keys=[image_key(name)])


def test_a_record_has_the_map_that_it_has_alone(explainer, mapper, photos, whole):
    maps = dave_fast.open_maps(whole)
    assert sorted(maps.ids) == [*images(photos), "bad.png"]
    for name in images(photos):
        row, own = maps[name], alone(explainer, mapper, photos, name)
        np.testing.assert_allclose(row.map, own.maps[0].numpy(), atol=ROUNDING + 2**-11)
        np.testing.assert_allclose(row.raw, own.raw[0].numpy(), atol=float(own.raw.abs().max()) * (ROUNDING + 2**-11))
        np.testing.assert_allclose(row.output, own.output[0].numpy(), rtol=1e-4, atol=1e-4)
        assert (row.target, row.prediction) == (int(own.target[0]), int(own.output[0].argmax()))
        assert row.probability == pytest.approx(float(own.probability[0]), abs=1e-5)
        assert (row.seed, row.n_samples, row.status, row.error) == (0, 3, "ok", None)


def test_what_was_assumed_about_an_image_is_logged_once(mapper, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(contents, "_notes", Notes())
    Image.fromarray(np.linspace(0, 4095, 64 * 64).astype(np.uint16).reshape(64, 64)).save(tmp_path / "scan.png")
    mapper.decode(Record("scan.png", str(tmp_path / "scan.png")))
    (said,) = [each.getMessage() for each in caplog.records if each.name == "dave_fast.run"]
    assert said.startswith(f"{tmp_path / 'scan.png'}: its samples run from 0 to 4095")


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1)], ids=str)
def test_a_thin_image_that_would_grow_without_end_is_refused_by_name(mapper, tmp_path, size):
    Image.new("1", size).save(tmp_path / "thin.png")
    with pytest.raises(ImageError, match=r"prepare .*thin.png: the image is .* less thin\.$"):
        mapper.decode(Record("thin", str(tmp_path / "thin.png")))


@pytest.mark.parametrize("size", [(1, 1000), (1000, 1)], ids=str)
def test_a_thin_image_is_prepared_within_a_border(mapper, tmp_path, monkeypatch, size):
    Image.new("RGB", size, "white").save(tmp_path / "thin.png")
    monkeypatch.setattr(mapper, "prepare", from_config({**mapper.prepare.config, "crop_mode": "border"}))
    assert mapper.decode(Record("thin", str(tmp_path / "thin.png"))).shape[1:] == mapper.prepare.size


def test_notes_are_warnings_until_there_are_too_many(caplog):
    notes = Notes(loud=3)
    caplog.set_level("INFO", "dave_fast.run")
    for number in range(6):
        notes(f"note {number}")
    loud = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert loud == ["note 0", "note 1", "note 2", "more images have such notes, which are logged as information."]
    assert [each.getMessage() for each in caplog.records if each.levelname == "INFO"] == ["note 3", "note 4", "note 5"]


def test_note_on_an_image_does_not_stop_a_worker(tmp_path):
    (tmp_path / "in").mkdir()
    Image.fromarray(np.linspace(0, 4095, 64 * 64).astype(np.uint16).reshape(64, 64)).save(tmp_path / "in/scan.png")
    done = run_dataset(str(tmp_path / "in"), tmp_path / "out", map_settings())
    assert (done.images, done.errors) == (1, 0)


def test_batches_workers_and_interruptions_do_not_change_maps(photos, whole, tmp_path):
    for limit in (2, 5, None):
        run_dataset(
            str(photos),
            tmp_path / "parts",
            map_settings(raw=True, outputs=True, batch_size=1 if limit == 2 else 3),
            Machine(devices=("cpu", "cpu") if limit == 5 else ("cpu",), shard_rows=2),
            limit=limit,
        )
    before, now = dave_fast.open_maps(whole), dave_fast.open_maps(tmp_path / "parts")
    assert sorted(now.ids) == sorted(before.ids)
    for name in images(photos):
        np.testing.assert_allclose(now[name].map, before[name].map, atol=ROUNDING + 2**-10)


def test_seeds_and_targets_of_records(explainer, mapper, photos, tmp_path):
    manifest = tmp_path / "m.csv"
    lines = [
        f"{name},{path},{number if number % 2 else ''},{5 if number > 3 else ''}"
        for number, (name, path) in enumerate(images(photos).items())
    ]
    manifest.write_text("id,uri,target,seed\n" + "\n".join(lines) + "\n")
    run_dataset(str(manifest), tmp_path / "out", map_settings(seed=1))
    maps = dave_fast.open_maps(tmp_path / "out")
    for number, name in enumerate(images(photos)):
        seed, target = 5 if number > 3 else 1, number if number % 2 else None
        own = alone(explainer, mapper, photos, name, seed, target)
        assert (maps[name].seed, maps[name].target) == (seed, int(own.target[0]))
        np.testing.assert_allclose(maps[name].map, own.maps[0].numpy(), atol=ROUNDING + 2**-11)
    run_dataset(str(manifest), tmp_path / "forced", map_settings(target="seven"))
    assert set(dave_fast.open_maps(tmp_path / "forced").column("target")) == {7}
    run_dataset(str(manifest), tmp_path / "predicted", map_settings(target="predicted"))
    maps = dave_fast.open_maps(tmp_path / "predicted")
    np.testing.assert_array_equal(maps.column("target"), maps.column("prediction"))


def test_target_that_the_model_lacks(photos, tmp_path):
    with pytest.raises(InputError, match="out of range"):
        run_dataset(str(photos), tmp_path / "out", map_settings(target=99))
    manifest = tmp_path / "m.csv"
    manifest.write_text(f"uri,target\n{photos}/0.png,99\n{photos}/1.png,3\n{photos}/2.png,-5\n")
    summary = run_dataset(str(manifest), tmp_path / "out", map_settings())
    assert (summary.images, summary.errors) == (3, 2)
    maps = dave_fast.open_maps(tmp_path / "out")
    assert "out of range" in maps[f"{photos}/0.png"].error and maps[f"{photos}/1.png"].status == "ok"
    assert maps[f"{photos}/2.png"].status == "error"


def test_resume_notices_other_weights_and_settings(photos, whole, tmp_path):
    with pytest.raises(InputError, match=r"configuration\.raw: True before, False now"):
        run_dataset(str(photos), whole, map_settings(outputs=True))
    others = SETTINGS | {"noise_alpha": 0.25, "shrink": False}
    differ = (
        r"configuration\.sampling\.noise_alpha: 0.5 before, 0.25 now; configuration\.shrink: True before, False now"
    )
    with pytest.raises(InputError, match=differ):
        run_dataset(str(photos), whole, map_settings(raw=True, outputs=True, options=others))
    changed = DAVE("demo", noise_alpha=0.5).model
    with torch.no_grad():
        changed.head.bias[0] += 1e-3
    with pytest.raises(InputError, match=r"weights: \w+ before, \w+ now"):
        run_dataset(str(photos), whole, map_settings(model=changed, raw=True, outputs=True))


@pytest.mark.parametrize("shrink", [True, False])
def test_mapper_passes_shrinkage_on_and_says_so(photos, shrink):
    mapper = Mapper(map_settings(options=SETTINGS | {"shrink": shrink}), "cpu")
    assert mapper.configuration["shrink"] is shrink
    record = Record("0.png", str(photos / "0.png"))
    (row,) = mapper.explain([record], [mapper.decode(record)], None)
    made = np.frombuffer(row["map"], "<f2").reshape(128, 128)
    own = alone(DAVE("demo", **SETTINGS, shrink=shrink), mapper, photos, "0.png").maps[0].numpy()
    np.testing.assert_allclose(made, own, atol=ROUNDING + 2**-11)


def test_runs_of_before_shrinkage_are_read_and_continued_without_it(photos, tmp_path):
    out, plain = tmp_path / "out", {"options": {"shrink": False}}
    stubs.run(str(photos), out, limit=2, **plain)
    made = json.loads((out / "run.json").read_bytes())
    del made["configuration"]["shrink"]
    (out / "run.json").write_text(json.dumps(made))
    assert dave_fast.open_maps(out).identity["configuration"]["shrink"] is False
    with pytest.raises(InputError, match=r"configuration\.shrink: False before, True now"):
        stubs.run(str(photos), out, limit=3)
    stubs.run(str(photos), out, limit=3, **plain)
    assert len(dave_fast.open_maps(out)) == 3


def test_a_run_whose_file_is_damaged_is_refused(whole, tmp_path):
    identity = json.loads((whole / "run.json").read_bytes())
    (tmp_path / "run.json").write_text(json.dumps(identity | {"configuration": None}))
    with pytest.raises(InputError, match="no format that this version"):
        dave_fast.open_maps(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"\xff\xfe", b"9" * 5000])
def test_a_run_whose_file_is_no_json_is_refused(tmp_path, content):
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(InputError, match=r"run\.json is no JSON file.*Choose another --out"):
        dave_fast.open_maps(tmp_path)


@pytest.mark.parametrize("name", ["run.json", "maps-0-00000.parquet"])
def test_a_named_pipe_in_a_run_is_refused_at_once(whole, photos, tmp_path, name):
    shutil.copy(whole / "run.json", tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match=f"{name}.*named pipe"):
        dave_fast.open_maps(tmp_path)
    with pytest.raises(InputError, match=f"{name}.*named pipe"):
        stubs.run(str(photos), tmp_path)


PREPARE = {"input_size": (3, 4, 4), "mean": (0.5,) * 3, "std": (0.5,) * 3}


@pytest.fixture(scope="module")
def small_shard(tmp_path_factory):
    """A run of one shard of six small rows; the bytes of the shard."""
    folder = tmp_path_factory.mktemp("small")
    settings = {"raw": True, "outputs": True, "depth": "pixels", "preprocessing": PREPARE}
    identity = {"format": 1, "configuration": settings}
    (folder / "run.json").write_text(json.dumps(identity))
    numbers = np.random.default_rng(0)
    with shards.new_shard(folder / "maps-0.parquet", shards.schema(identity)) as writer:
        for number in range(6):
            row = {"id": f"ä{number}", "uri": f"/ü/{number}.png", "target": number, "seed": 0, "n_samples": 3}
            if number == 3:
                writer.add([row | {"status": "error", "error": "no image"}])
                continue
            row |= packed_map(numbers.random((4, 4), np.float32), "float16") | packed_raw(numbers.random((3, 4, 4)))
            writer.add([row | {"prediction": 1, "status": "ok", "output": numbers.random(5, np.float32).tobytes()}])
    return folder, (folder / "maps-0.parquet").read_bytes()


def read_all(folder):
    """Read all that a run, an export and `open_maps` read."""
    maps = dave_fast.open_maps(folder)
    rows = list(maps)
    assert all(isinstance(text, str) for row in rows for text in (row.id, row.uri, row.status))
    assert sorted(shards.committed_ids(folder)) == sorted(maps.ids)
    for name in shards.SMALL:
        maps.column(name).tolist()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize("seed", range(4))
def test_flipped_bytes_in_a_shard_are_refused_with_its_name_or_read(small_shard, seed):
    folder, content = small_shard
    chosen, refusals = random.Random(seed), []
    for number in range(60):
        mutant = bytearray(content)
        mutant[chosen.randrange(len(mutant))] ^= chosen.randrange(1, 256)
        (folder / "maps-0.parquet").write_bytes(mutant)
        calls = [read_all] if number % 10 else [read_all, shards.drop_errors]
        for call in calls:
            try:
                call(folder)
            except InputError as error:
                refusals.append(str(error))
    (folder / "maps-0.parquet").write_bytes(content)
    read_all(folder)
    said = re.compile(r"maps-0\.parquet (is no readable shard: |holds records that other shards hold too)")
    assert len(refusals) > 10 and all(map(said.search, refusals))


@pytest.mark.parametrize("column", ["map", "raw", "output", "target", "scale", "id"])
def test_no_flipped_byte_of_a_column_reads_as_another_value(small_shard, column):
    folder, content = small_shard
    path = folder / "maps-0.parquet"
    path.write_bytes(content)
    with pq.ParquetFile(path) as file:
        group = file.metadata.row_group(0)
        place = file.schema_arrow.names.index(column)
    chunk = group.column(place)
    before, silent = pq.read_table(path).column(column), []
    # The page's header comes first, of which a change makes another page or none.
    for at in range(chunk.data_page_offset, chunk.data_page_offset + chunk.total_compressed_size):
        mutant = bytearray(content)
        mutant[at] ^= 0x01
        path.write_bytes(mutant)
        with suppress(InputError), shards.reading(path):
            if pq.read_table(path, **shards.VERIFIED).column(column) != before:
                silent.append(at - chunk.data_page_offset)
    path.write_bytes(content)
    assert not silent


@pytest.mark.parametrize("column", ["id", "uri", "seed", "n_samples", "status"])
def test_a_row_without_what_every_row_has_is_refused(small_shard, tmp_path, column):
    folder, _ = small_shard
    shutil.copy(folder / "run.json", tmp_path)
    table = pq.read_table(folder / "maps-0.parquet")
    place = table.schema.get_field_index(column)
    pq.write_table(
        table.set_column(place, column, pa.nulls(len(table), table.schema.field(place).type)),
        tmp_path / "maps-0.parquet",
    )
    with pytest.raises(InputError, match=f"no readable shard: a row has no {column}"):
        dave_fast.open_maps(tmp_path)


@pytest.mark.parametrize("to", ["npy", "png"])
def test_an_export_of_a_damaged_map_names_the_shard(small_shard, tmp_path, to):
    folder, content = small_shard
    shutil.copy(folder / "run.json", tmp_path)
    place = pq.ParquetFile(folder / "maps-0.parquet").metadata.row_group(0)
    (start,) = (
        place.column(number).data_page_offset
        for number in range(place.num_columns)
        if place.column(number).path_in_schema == "map"
    )
    (tmp_path / "maps-0.parquet").write_bytes(content[:start] + bytes(20) + content[start + 20 :])
    with pytest.raises(InputError, match=r"maps-0\.parquet is no readable shard"):
        export(dave_fast.open_maps(tmp_path), to, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_keeps_the_names_of_its_classes(whole):
    assert dave_fast.open_maps(whole).labels.names == CLASS_NAMES


def test_shards_say_what_they_are(whole):
    identity = json.loads((whole / "run.json").read_bytes())
    (shard,) = whole.glob("*.parquet")
    assert json.loads(pq.read_schema(shard).metadata[b"dave_fast"]) == identity
    assert identity["version"] == dave_fast.__version__ and len(identity["weights"]) == 32
    table = pq.read_table(shard)
    assert table.schema.field("map").type == pa.binary()
    good = table.slice(0, 1).to_pylist()[0]
    assert len(good["map"]) == 2 * good["height"] * good["width"] and good["dtype"] == "float16"
    assert json.loads((whole / "summary.json").read_bytes())["errors"] == 1


def test_eight_bits(photos, whole, tmp_path):
    run_dataset(str(photos), tmp_path / "u8", map_settings(map_dtype="uint8"))
    exact, coarse = dave_fast.open_maps(whole), dave_fast.open_maps(tmp_path / "u8")
    for name in images(photos):
        np.testing.assert_allclose(coarse[name].map, exact[name].map, atol=0.5 / 255 + 2**-11)


@pytest.mark.parametrize(
    "heat", [np.zeros((3, 4), np.float32), np.full((3, 4), 1e-9, np.float32), np.eye(3, dtype=np.float32)]
)
def test_packed_maps(heat):
    row = packed_map(heat, "uint8")
    values = np.frombuffer(row["map"], np.uint8).reshape(heat.shape) * np.float32(row["scale"])
    np.testing.assert_allclose(values, heat, rtol=1e-6)


# Batches that are refused


class Refusing:
    """An explainer that refuses a batch with certain images, or with too many."""

    def __init__(self, explainer, most=99):
        self.explainer, self.most, self.sizes = explainer, most, []
        self.model, self.device = explainer.model, explainer.device

    def explain(self, inputs, **settings):
        self.sizes.append(len(inputs))
        if len(inputs) > self.most:
            raise torch.OutOfMemoryError("no memory")
        if (inputs.amax((1, 2, 3)) > 100).any():
            raise NonFiniteError("NaN or infinity in the attribution of image 0.")
        return self.explainer.explain(inputs, **settings)


def batch(n=6, bad=()):
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(3, 128, 128, generator=generator) for _ in range(n)]
    for number in bad:
        inputs[number] = inputs[number] + 200
    return [Record(str(number), f"{number}.png") for number in range(n)], inputs


def test_one_image_that_spoils_a_batch():
    mapper = Mapper(map_settings(n_samples=1), "cpu")
    mapper.explainer = Refusing(mapper.explainer)
    rows = mapper.explain(*batch(bad=[2]), None)
    assert [row["id"] for row in rows] == [str(n) for n in range(6)]
    assert [row["status"] for row in rows] == ["ok", "ok", "error", "ok", "ok", "ok"]
    assert rows[2]["error"].startswith("NaN or infinity") and rows[2].get("map") is None


def test_out_of_memory_makes_smaller_batches():
    mapper = Mapper(map_settings(n_samples=1), "cpu")
    mapper.explainer = Refusing(mapper.explainer, most=2)
    rows = mapper.explain(*batch(), None)
    assert [row["status"] for row in rows] == ["ok"] * 6
    assert mapper.explainer.sizes == [6, 3, 1, 2, 3, 1, 2] or max(mapper.explainer.sizes[1:]) <= 3
    mapper.explainer = Refusing(mapper.explainer.explainer, most=0)
    with pytest.raises(MemoryError, match="--internal-batch-size"):
        mapper.explain(*batch(), None)


def test_random_weights_and_checkpoints(tmp_path):
    import timm

    name, file = "vit_tiny_patch16_224", str(tmp_path / "w.pth")
    one = Mapper(map_settings(model=ModelSpec(name, random_weights=True)), "cpu")
    assert Mapper(map_settings(model=ModelSpec(name, random_weights=True)), "cpu").weights == one.weights
    torch.save(timm.create_model(name, pretrained=False).state_dict(), file)
    other = Mapper(pickle.loads(pickle.dumps(map_settings(model=ModelSpec(name, file)))), "cpu")
    assert other.weights != one.weights and other.configuration["model"] == name
    with pytest.raises(InputError, match="do not fit vit_small_patch16_224"):
        Mapper(map_settings(model=ModelSpec("vit_small_patch16_224", file)), "cpu")


# Reading


def test_reading_by_id_number_slice_and_list(whole):
    maps = dave_fast.open_maps(whole)
    assert len(maps) == 8 and "3.png" in maps and "none" not in maps
    assert maps[0].id == maps.ids[0] and maps[-1].id == maps.ids[-1]
    assert maps[2:5].ids == maps.ids[2:5]
    assert maps[["4.png", "0.png"]].ids == ["4.png", "0.png"]
    np.testing.assert_array_equal(maps[["4.png"]].numpy()[0], maps["4.png"].map)
    with pytest.raises(KeyError, match="no row has the id 'none'"):
        maps["none"]
    with pytest.raises(IndexError, match="row 8 of 8"):
        maps[8]


def test_the_last_reference_to_maps_closes_their_files(whole):
    maps = dave_fast.open_maps(whole)
    assert maps.filter(status="ok")[0].map is not None
    shards = weakref.ref(maps._shards)
    gc.disable()
    try:
        del maps
        assert shards() is None
    finally:
        gc.enable()


def test_filters(whole):
    maps = dave_fast.open_maps(whole)
    good = maps.filter(status="ok")
    assert len(good) == 7 and maps.filter(status="error").ids == ["bad.png"]
    assert maps["bad.png"].map is None and maps["bad.png"].target is None
    label = good[0].target
    assert set(maps.filter(target=label).column("target")) == {label}
    assert len(maps.filter(target=[label, 99], status="ok")) >= 1
    sure = maps.filter(where=lambda c: c["probability"] > 0.5)
    assert all(row.probability > 0.5 for row in sure)
    assert good.numpy().shape == (7, 128, 128) and good.numpy().dtype == np.float32
    assert maps.filter(target=99).numpy().shape == (0, 128, 128)
    with pytest.raises(InputError, match=r"bad\.png has no map"):
        maps.numpy()
    with pytest.raises(InputError, match="status is 'done'"):
        maps.filter(status="done")
    with pytest.raises(InputError, match="no column 'map'"):
        maps.column("map")
    with pytest.raises(InputError, match="expected bool"):
        maps.filter(where=lambda c: c["target"])


def test_torch_dataset(whole):
    good = dave_fast.open_maps(whole).filter(status="ok")
    data = good.torch()
    # DataLoader pickles the dataset for its workers.
    batches = list(DataLoader(pickle.loads(pickle.dumps(data)), batch_size=4))
    assert [len(b["id"]) for b in batches] == [4, 3]
    np.testing.assert_array_equal(torch.cat([b["map"] for b in batches]).numpy(), good.numpy())
    assert batches[0]["raw"].shape == (4, 3, 128, 128) and batches[0]["target"].dtype == torch.int64
    with pytest.raises(InputError, match=r"filter\(status='ok'\)"):
        list(dave_fast.open_maps(whole).torch())


def test_nothing_to_read(tmp_path):
    with pytest.raises(InputError, match="holds no run"):
        dave_fast.open_maps(tmp_path)
