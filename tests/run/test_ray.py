"""Tests of the Ray engine: the rows of the local engine, each once, also after kills; refusals."""

import io
import os
import random
import signal
import tarfile
import threading
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

import dave_fast
from dave_fast.errors import ImageError, InputError, RunError
from dave_fast.images import preprocessing
from dave_fast.models.demo import demo_scene
from dave_fast.run import ray_tasks
from dave_fast.run.limits import Limits
from dave_fast.run.lock import Fence
from dave_fast.run.mapper import Mapper, MapSettings
from dave_fast.run.progress import Report
from dave_fast.run.ray_engine import _by_shard, preflight
from dave_fast.run.ray_tasks import _decoded, _read
from dave_fast.run.records import Record
from dave_fast.run.runner import run_dataset
from tests.run import stubs
from tests.run.killing import check, finish, ids_of, kill_until_done, start

pytest.importorskip("ray", reason="an extra: dave-fast[ray]")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A cluster for the tests that do not kill it."""
    import logging

    import ray

    root = os.path.dirname(os.path.dirname(dave_fast.__file__))
    ray.init(
        num_cpus=4,
        object_store_memory=2**28,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.CRITICAL,
        runtime_env={"env_vars": {"PYTHONPATH": root}},
    )
    yield
    ray.shutdown()


# Refusals


@pytest.mark.parametrize(
    ("resources", "devices", "found"),
    [
        ({"CPU": 3}, (None,), (1, False)),
        ({"CPU": 8, "GPU": 4}, (None,), (4, True)),
        ({"CPU": 8, "GPU": 4}, ("cpu", "cpu"), (2, False)),
        ({"CPU": 8, "GPU": 4}, ("cuda:0", "cuda:1"), (2, True)),
    ],
)
def test_preflight(resources, devices, found):
    assert preflight(resources, devices) == found


@pytest.mark.parametrize(
    ("resources", "devices", "message"),
    [
        ({"CPU": 2}, (None,), "2 CPU slots, and 1 actors need 3"),
        ({"CPU": 9, "GPU": 8}, (None,), "9 CPU slots, and 8 actors need 10"),
        ({}, ("cpu",), "0 CPU slots"),
        ({"CPU": 9, "GPU": 1}, ("cuda", "cuda"), "2 devices are given and the Ray cluster has 1 GPUs"),
        ({"CPU": 9}, ("cuda",), "1 devices are given and the Ray cluster has 0 GPUs"),
    ],
)
def test_preflight_refuses(resources, devices, message):
    with pytest.raises(InputError, match=message):
        preflight(resources, devices)


def test_without_ray(images, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(InputError, match=r"needs the package ray, which is missing: pip install '\.\[ray\]'"):
        stubs.run(images, tmp_path / "out", engine="ray")
    assert not (tmp_path / "out").exists()


def test_done_by_shard():
    done = ["a/1", "a/b/2", "a/b/c/3", "x/1"]
    assert _by_shard(done, ["a", "a/b", "y"]) == {
        "a": {"a/1", "a/b/2", "a/b/c/3"},
        "a/b": {"a/b/2", "a/b/c/3"},
        "y": set(),
    }


def test_fence(tmp_path):
    old = Fence.renew(tmp_path)
    with old.inside():
        renewed = []
        thread = threading.Thread(target=lambda: renewed.append(Fence.renew(tmp_path)))
        thread.start()
        # The renewal waits for the commit that is under way.
        thread.join(0.2)
        assert not renewed
    thread.join(10)
    with renewed[0].inside():
        pass
    with pytest.raises(RunError, match="another run has begun"), old.inside():
        pass


@pytest.mark.parametrize("size", [(500, 375), (100, 300), (128, 128)])
def test_crops_are_half_the_way(size):
    """The crops that travel between Ray's stages give the model's input, bit for bit."""
    prepare = Mapper(MapSettings("demo", options={"noise_alpha": 0.5}), "cpu").prepare
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    image = Image.fromarray(pixels)
    crop = prepare.crop(image)
    assert crop.dtype == np.uint8 and crop.shape == (128, 128, 3)
    np.testing.assert_array_equal(prepare.normalised(crop).numpy(), prepare.transform(image).numpy())
    assert preprocessing(dave_fast.DAVE("demo", noise_alpha=0.5).model).config == prepare.config


PREPARE = {"input_size": (3, 8, 8), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic"}
PREPARE |= {"crop_pct": 1.0, "crop_mode": "center"}


def board(stopping=lambda: False, failed=None):
    """A board that is no actor; `ray.get` of what it gives is that itself."""
    methods = {"stopping": stopping, "fail": (failed if failed is not None else []).append}
    return SimpleNamespace(**{name: SimpleNamespace(remote=call) for name, call in methods.items()})


@pytest.mark.parametrize(
    "error", [ValueError("odd"), OSError(5, "Odd"), MemoryError(), UnicodeDecodeError("utf-8", b"", 0, 0, "odd")]
)
def test_a_record_that_cannot_be_prepared_is_a_row_as_in_the_local_engine(pictures, error):
    fails = Mock(side_effect=error)
    fails.crop = fails
    record, prepare = Record("a", str(next(pictures.rglob("*.png")))), fails
    row = _decoded(prepare, record, Limits())
    assert "crop" not in row and row["error"].startswith(f"cannot prepare {record.uri}: ")
    mapper = Mapper.__new__(Mapper)
    mapper.settings, mapper.prepare = MapSettings("demo"), prepare
    with pytest.raises(ImageError) as raised:
        mapper.decode(record)
    assert str(raised.value) == row["error"]


def test_a_read_task_reads_a_record_when_the_one_before_is_decoded(monkeypatch):
    monkeypatch.setattr("ray.get", lambda given: given)
    monkeypatch.setattr(ray_tasks, "_decoded", lambda prepare, record, limits: held.remove(record) or {"id": record.id})
    held, failed = [], []

    def records():
        for number in range(40):
            held.append(Record(str(number), "in a tar", content=b"an image"))
            assert len(held) == 1
            yield held[0]
        raise InputError("the tar is damaged")

    tables = list(_read(records, board(failed=failed), PREPARE, Limits()))
    assert [len(table) for table in tables] == [16, 16, 8] and failed == ["the tar is damaged"]
    stops = iter([False, True])
    assert len(list(_read(records, board(lambda: next(stops)), PREPARE, Limits()))) == 1


# Runs


@pytest.mark.slow
def test_killed_and_resumed(pictures, tmp_path):
    """A driver that is killed is resumed by another one; the local engine then finds every record done."""
    out, settings = tmp_path / "out", {"seconds": 0.02, "engine": "ray", "shard_rows": 10, "watchdog_s": 300.0}
    assert kill_until_done(pictures, out, random.Random(0), 1, whole_group=False, **settings) == 1
    assert finish(start(pictures, out))["images"] == 0


@pytest.fixture
def tars(tmp_path):
    scene = np.asarray(demo_scene().image)
    for shard in range(2):
        with tarfile.open(tmp_path / f"t-{shard}.tar", "w") as tar:
            for number in range(4):
                content = io.BytesIO()
                Image.fromarray(np.roll(scene, 9 * (4 * shard + number), 1)).save(content, "PNG")
                bad = (shard, number) == (1, 2)
                for name, data in (
                    (f"{number}.png", b"no image" if bad else content.getvalue()),
                    (f"{number}.cls", b"%d" % number),
                ):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return str(tmp_path / "t-{0..1}.tar")


def test_same_rows_as_the_local_engine(cluster, tars, tmp_path):
    settings = MapSettings(
        "demo", n_samples=2, target="label", raw=True, options={"precision": "fp32", "noise_alpha": 0.5}
    )
    local = run_dataset(tars, tmp_path / "local", settings)
    # Begun by one engine, finished by the other.
    run_dataset(tars, tmp_path / "ray", settings, limit=3)
    summary = run_dataset(tars, tmp_path / "ray", settings, engine="ray")
    assert (summary.images, summary.records, summary.errors) == (5, 8, 1) and local.records == 8
    one, other = dave_fast.open_maps(tmp_path / "local"), dave_fast.open_maps(tmp_path / "ray")
    assert sorted(one.ids) == sorted(other.ids) and one.identity == other.identity
    for record_id in one.ids:
        a, b = one[record_id], other[record_id]
        assert (a.uri, a.target, a.prediction, a.seed, a.status) == (b.uri, b.target, b.prediction, b.seed, b.status)
        if a.map is not None:
            np.testing.assert_allclose(a.map, b.map, atol=2e-3)
            np.testing.assert_allclose(a.raw, b.raw, atol=2e-3 * np.abs(a.raw).max())


@pytest.mark.slow
def test_a_damaged_tar_fails_the_run_after_all_else_is_explained(cluster, tars, tmp_path):
    path = tmp_path / "t-0.tar"
    members = path.read_bytes().rstrip(b"\0")
    path.write_bytes(members + bytes(-len(members) % 512) + b"garbage " * 64)
    with pytest.raises(RunError, match=r"cannot read .*t-0\.tar: .*a header is damaged.* What came before it is kept"):
        stubs.run(tars, tmp_path / "out", engine="ray")
    found = sorted(dave_fast.open_maps(tmp_path / "out").ids)
    assert found == [f"t-{shard}/{number}" for shard in range(2) for number in range(4)]


@pytest.mark.slow
def test_limit_counts_the_records_of_tars(cluster, tars, tmp_path):
    assert stubs.run(tars, tmp_path / "out", engine="ray", limit=3).records == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "message"),
    [("memory", "out of memory with one image at a time"), ("raise", "ZeroDivisionError: in the mapper")],
)
def test_finished_records_are_kept_when_the_mapper_fails(cluster, pictures, tmp_path, fault, message):
    out = tmp_path / "out"
    with pytest.raises(RunError, match=message):
        stubs.run(pictures, out, engine="ray", fault=(fault, 40))
    assert len(check(out, ids_of(pictures), all_done=False)) == 40


class StopsAfter(Report):
    """A report that sends SIGTERM once some images are done, when the handlers are in place."""

    def __init__(self, images):
        self.images = images

    def update(self, tally):
        if tally.images >= self.images:
            self.images = float("inf")
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
def test_stopped_in_order(cluster, pictures, tmp_path):
    out = tmp_path / "out"
    summary = stubs.run(
        pictures,
        out,
        engine="ray",
        seconds=0.3,
        shard_rows=1000,
        reporter=lambda total, before: nullcontext(StopsAfter(8)),
    )
    assert summary.stopped == "SIGTERM" and 0 < summary.records < 120
    assert len(check(out, ids_of(pictures), all_done=False)) == summary.records
    assert stubs.run(pictures, out, engine="ray").records == 120
    check(out, ids_of(pictures))


@pytest.mark.slow
def test_actor_that_dies_is_replaced(cluster, pictures, tmp_path):
    out = tmp_path / "out"
    once = tmp_path / "died"
    assert stubs.run(pictures, out, engine="ray", fault=("die-once", 40, str(once))).records == 120
    assert once.exists()
    check(out, ids_of(pictures))


@pytest.mark.slow
def test_watchdog(pictures, tmp_path):
    error = finish(start(pictures, tmp_path / "out", engine="ray", fault=("hang", 40), watchdog_s=15.0), code=2)
    assert "no progress for" in error and "ray status" in error
