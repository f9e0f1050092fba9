"""Tests of the maps' thread: whose class comes next, what is dropped, and how long before a deadline a job is cut."""

import itertools
import time
from types import SimpleNamespace

import pytest
import torch

from dave_fast.client import Client
from dave_fast.engine.levels import Pulled
from dave_fast.errors import NonFiniteError
from dave_fast.explain.convergence import Refined
from dave_fast.serve.jobs import Ask, Job
from dave_fast.serve.maps import FIXED_SAMPLES, HEAD_START, LEAST_MARGIN, MARGIN, PATIENCE, MapMaker
from dave_fast.serve.scheduler import Queued
from dave_fast.serve.service import Service
from tests.serve.tiny_server import file_of, serve_model


def fake_job(name, classes=1, places=(None,), tolerance=None):
    ask = SimpleNamespace(classes=classes, places=places, tolerance=tolerance)
    return SimpleNamespace(name=name, ask=ask, kept="samples", making=[])


class Bench:
    """A maker of maps on a clock of its own, on which a class takes `seconds`, and what it has done.

    Attributes:
        steps: the classes that were made, with their job's name.
        told: (name, samples, classes, why) of each report.
        failed: names of the jobs that failed.
        before: a function of a job and a class that is called before it is made.
    """

    def __init__(self, monkeypatch):
        self.now, self.seconds = 0.0, 1.0
        self.steps, self.told, self.failed = [], [], []
        self.before = lambda job, number: None
        self.maker = MapMaker(self.report, lambda job, error: self.failed.append(job.name), lambda: self.now)
        monkeypatch.setattr("dave_fast.serve.maps.make_class", self.make_class)

    def report(self, job, made, why):
        self.told.append((job.name, made.samples, len(made.maps), why))

    def make_class(self, job, kept, samples, number):
        self.before(job, number)
        self.steps.append(f"{job.name}{number}")
        self.now += self.seconds
        return Refined(torch.zeros(1, 2, 2), torch.zeros(1, 3, 2, 2), samples, [0.1], [0.2], True)

    def run(self):
        self.maker.stop()
        self.maker.run()


@pytest.fixture
def bench(monkeypatch):
    return Bench(monkeypatch)


def test_a_map_waits_for_one_class_of_a_request_with_many(bench):
    for job in (fake_job("a", 4), fake_job("b"), fake_job("c", 2)):
        bench.maker.put(job, 8, None)
    bench.run()
    assert bench.steps == ["a0", "b0", "c0", "a1", "c1", "a2", "a3"]
    assert bench.told == [("b", 8, 1, None), ("c", 8, 2, None), ("a", 8, 4, None)]


def test_many_classes_come_in_turn_however_many_small_maps_come(bench):
    """One small map after the other comes as soon as the last is made; three classes are done when ten were."""
    large, small = fake_job("a", 3), iter(range(40))

    def another(job, number):
        for _ in itertools.islice(small, 1):
            bench.maker.put(fake_job("b"), 8, None)

    bench.before = another
    bench.maker.put(large, 8, None)
    bench.maker.put(fake_job("b"), 8, None)
    bench.run()
    assert bench.steps.index("a2") <= 2 * PATIENCE * bench.seconds + 3
    assert ("a", 8, 3, None) in bench.told


def test_what_is_cut_goes_before_what_came_in_the_second_before_it(bench):
    bench.maker.put(fake_job("old"), 8, None)
    bench.now = 0.5 + HEAD_START
    bench.maker.put(fake_job("new"), 8, None)
    bench.now += 0.1
    bench.maker.put(fake_job("cut"), 8, "deadline")
    bench.run()
    assert bench.steps == ["old0", "cut0", "new0"]


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_request_that_is_closed_amid_its_classes_is_dropped_and_holds_nothing(bench, after):
    job = fake_job("a", 3)

    def close(other, number):
        if (other, number) == (job, after):
            job.kept, job.making = None, []

    bench.before = close
    bench.maker.put(job, 8, None)
    bench.maker.put(fake_job("b"), 8, None)
    bench.run()
    assert [step for step in bench.steps if step != "b0"] == [f"a{number}" for number in range(after + 1)]
    assert bench.told == [("b", 8, 1, None)] and not bench.failed and not job.making


def test_maps_that_a_cut_overtakes_are_dropped(bench):
    job = fake_job("a", 3)
    bench.before = lambda job, number: bench.steps == ["a0"] and bench.maker.put(job, 6, "deadline")
    bench.maker.put(job, 8, None)
    bench.run()
    assert bench.steps == ["a0", "a1", "a0", "a1", "a2"] and bench.told == [("a", 6, 3, "deadline")]


def test_newer_maps_take_the_place_of_those_that_wait(bench):
    job = fake_job("a", 2)
    for samples in (4, 8, 16, 32):
        bench.maker.put(job, samples, None)
    assert len(job.making) == 2
    bench.run()
    assert [samples for _, samples, _, _ in bench.told] == [4, 32]


def test_with_a_tolerance_the_maps_of_every_checkpoint_are_made_in_turn(bench):
    job = fake_job("a", 2, tolerance=0.1)
    for samples in (8, 12, 16):
        bench.maker.put(job, samples, None)
    bench.run()
    assert [samples for _, samples, _, _ in bench.told] == [8, 12, 16] and bench.steps == ["a0", "a1"] * 3


@pytest.mark.parametrize(("error", "is_logged"), [(NonFiniteError("NaN"), False), (RuntimeError("broken"), True)])
def test_an_error_in_a_class_fails_its_request_alone(bench, caplog, error, is_logged):
    def broken(job, number):
        if (job.name, number) == ("a", 1):
            raise error

    bench.before = broken
    bench.maker.put(fake_job("a", 3), 8, None)
    bench.maker.put(fake_job("b", 2), 8, None)
    bench.run()
    assert (bench.told, bench.failed) == ([("b", 8, 2, None)], ["a"])
    assert ("a map could not be made" in caplog.text) == is_logged


def test_an_error_in_a_report_fails_its_request_and_the_others_go_on(bench):
    honest = bench.maker._report

    def report(job, made, why):
        if job.name == "a":
            raise MemoryError
        honest(job, made, why)

    bench.maker._report = report
    bench.maker.put(fake_job("a"), 8, None)
    bench.maker.put(fake_job("b"), 8, None)
    bench.run()
    assert (bench.told, bench.failed) == ([("b", 8, 1, None)], ["a"])


@pytest.mark.parametrize(("classes", "places", "samples"), [(1, 1, 0), (10, 1, 64), (1, 6, 64), (10, 10, 1024)])
def test_the_margin_is_in_proportion_to_classes_depths_and_samples(classes, places, samples):
    maker = MapMaker(lambda *_: None, lambda *_: None)
    job = fake_job("a", classes, tuple(range(places)))
    assert maker.margin(job, samples) == LEAST_MARGIN
    maker.sample_seconds = 0.001
    expected = LEAST_MARGIN + MARGIN * 0.001 * classes * places * (samples + FIXED_SAMPLES)
    assert maker.margin(job, samples) == pytest.approx(expected)


def test_equal_depths_are_made_once_and_count_once_in_the_estimate(bench):
    bench.maker.put(fake_job("a", places=(None,) * 100), 8, None)
    bench.run()
    assert bench.maker.sample_seconds == pytest.approx(1 / (8 + FIXED_SAMPLES))
    assert bench.maker.seconds(fake_job("b", places=(3,) * 50), 8) == pytest.approx(1)


@pytest.fixture
def stopped():
    """A service whose threads do not run."""
    model = serve_model()
    return Service({model.name: model})


def job_of(service, image, ready, **options):
    job = Job(
        service.models["tiny"], Ask(image, **options), Queued("bucket", options["n_samples"]), lambda event: None, 0
    )
    job.kept = Pulled(torch.zeros(1, options["n_samples"], 3, 32, 32), ())
    job.ready = ready
    return job


@pytest.mark.parametrize(("ready", "tolerance", "cut"), [(20, None, False), (19, None, True), (20, 0.1, True)])
def test_a_job_with_all_samples_is_not_cut_since_its_last_maps_are_queued(stopped, images, ready, tolerance, cut):
    job = job_of(stopped, images[0], ready, n_samples=20, tolerance=tolerance)
    stopped.cut(job, "deadline")
    assert job.cutting == cut


def test_the_time_left_shrinks_as_samples_are_done(stopped, images):
    stopped.maps.sample_seconds = 0.01
    deadline = time.monotonic() + 10
    left = [stopped.time_left(job_of(stopped, images[0], ready, n_samples=500), deadline) for ready in (0, 100, 500)]
    assert left[0] > left[1] > left[2] and left[2] == pytest.approx(10 - 0.015 * 516, abs=0.5)


def test_a_request_is_answered_by_its_deadline_where_maps_take_long(server, pixels):
    """As many samples are taken as maps can be made of in time."""
    address, service = server
    service.maps.sample_seconds = 0.5
    began = time.monotonic()
    with Client(address) as client:
        told = client.explain(file_of(pixels), n_samples=1024, deadline_ms=30_000)
    assert told.cut_short == "deadline" and 1 <= told.samples < 1024
    assert time.monotonic() - began < 29
