"""Tests of the maps' thread: whose class comes next, what is dropped, and how long before a deadline a job is cut."""

import time
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from dave_fast.client import Client
from dave_fast.engine.levels import Pulled
from dave_fast.errors import NonFiniteError
from dave_fast.explain.convergence import Refined
from dave_fast.serve.jobs import Ask, Job
from dave_fast.serve.maps import FIXED_SAMPLES, LEAST_MARGIN, MARGIN, Making, MapMaker
from dave_fast.serve.scheduler import Queued
from dave_fast.serve.service import Service
from tests.serve.tiny_server import file_of, serve_model


def fake_job(name, classes=1, places=1):
    ask = SimpleNamespace(classes=classes, places=(None,) * places)
    return SimpleNamespace(name=name, ask=ask, kept="samples", cutting=False)


@dataclass
class Noted(Making):
    """A making whose steps are noted in `steps`, and which closes its job before a step, or fails in one."""

    steps: list = None
    closed_at: int | None = None
    fails_at: int | None = None

    def step(self, of_all):
        number = len(self.made)
        if number == self.fails_at:
            raise NonFiniteError("NaN")
        self.steps.append(f"{self.job.name}{number}")
        if number + 1 == self.closed_at:
            self.job.kept = None
        self.made.append(Refined(torch.zeros(1, 2, 2), torch.zeros(1, 3, 2, 2), self.samples, [0.1], [0.2], True))


def run_all(makings):
    """Make the maps of all; return the steps in their order, the jobs with maps, and those that failed."""
    steps, told, failed = [], [], []
    maker = MapMaker(
        lambda job, made, why: told.append((job.name, len(made.maps), why)), lambda job, error: failed.append(job.name)
    )
    for making in makings:
        making.steps = steps
        maker.put(making)
    maker.stop()
    maker.run()
    return steps, told, failed


def test_a_map_waits_for_one_class_of_another_request_at_most():
    large = Noted(fake_job("a", 4), 8, None)
    steps, told, _ = run_all([large, Noted(fake_job("b"), 8, None), Noted(fake_job("c", 2), 8, None)])
    assert steps == ["a0", "b0", "c0", "a1", "c1", "a2", "a3"]
    assert told == [("b", 1, None), ("c", 2, None), ("a", 4, None)]


def test_what_is_cut_comes_first_among_those_with_as_many_classes_done():
    steps, told, _ = run_all([Noted(fake_job("a", 2), 8, None), Noted(fake_job("b", 2), 8, "deadline")])
    assert steps == ["b0", "a0", "b1", "a1"]
    assert told == [("b", 2, "deadline"), ("a", 2, None)]


def test_a_request_that_is_closed_amid_its_classes_is_dropped():
    steps, told, failed = run_all([Noted(fake_job("a", 3), 8, None, closed_at=1), Noted(fake_job("b"), 8, None)])
    assert (steps, told, failed) == (["a0", "b0"], [("b", 1, None)], [])


def test_maps_that_are_overtaken_by_a_cut_are_dropped():
    job = fake_job("a", 2)
    job.cutting = True
    steps, told, _ = run_all([Noted(job, 16, None), Noted(job, 8, "deadline")])
    assert (steps, told) == (["a0", "a1"], [("a", 2, "deadline")])


def test_an_error_in_a_class_fails_its_request_alone(caplog):
    steps, told, failed = run_all([Noted(fake_job("a", 3), 8, None, fails_at=1), Noted(fake_job("b", 2), 8, None)])
    assert (steps, told, failed) == (["a0", "b0", "b1"], [("b", 2, None)], ["a"])
    assert "a map could not be made" in caplog.text


@pytest.mark.parametrize(("classes", "places", "samples"), [(1, 1, 0), (10, 1, 64), (1, 6, 64), (10, 10, 1024)])
def test_the_margin_is_in_proportion_to_classes_depths_and_samples(classes, places, samples):
    maker = MapMaker(lambda *_: None, lambda *_: None)
    job = fake_job("a", classes, places)
    assert maker.margin(job, samples) == LEAST_MARGIN
    maker.sample_seconds = 0.001
    expected = LEAST_MARGIN + MARGIN * 0.001 * classes * places * (samples + FIXED_SAMPLES)
    assert maker.margin(job, samples) == pytest.approx(expected)


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
