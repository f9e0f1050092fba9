"""Tests of the service without HTTP: a map depends on its request alone, all ways to end, isolation of faults."""

import threading
import time

import pytest
import torch

from dave_fast.errors import InputError, NonFiniteError, RefusedError
from dave_fast.explain.convergence import checkpoints
from dave_fast.serve.jobs import DeadlineError, Ended, Failed, Predicted
from dave_fast.serve.limits import Limits
from dave_fast.serve.service import Service
from dave_fast.serve.workers import FAILURES
from tests.serve.tiny_server import DirectClient, serve_model, started, until


@pytest.fixture(scope="module")
def service():
    with started() as running:
        yield running


def test_an_answer_is_what_explain_gives(service, images):
    wants = DirectClient(service)
    told = wants.all(wants.ask(images[0], n_samples=20, seed=5))
    assert [type(event) for event in told] == [Predicted, Ended]
    alone = service.models["tiny"].explainers[0].explain(images[0], n_samples=20, seed=5)
    ended = told[-1]
    assert torch.equal(ended.refined.maps, alone.maps) and torch.equal(ended.refined.raw, alone.raw)
    assert ended.predicted.targets == (int(alone.target),)
    assert ended.predicted.probabilities.sum().item() == pytest.approx(1)
    assert (ended.refined.samples, ended.cut_short) == (20, None)
    assert 0 <= ended.queue_seconds <= ended.seconds


def test_the_same_request_gives_the_same_map_whatever_else_is_in_flight(service, images):
    """Bit-equal in float32 on a CPU, where a row of a matrix product does not depend on the other rows."""
    wants = DirectClient(service)
    alone = wants.end(wants.ask(images[0], targets=(1, 7), n_samples=33, seed=2))
    crowd = [wants.ask(image, n_samples=3 + 7 * i, seed=i, top_k=1 + i % 3) for i, image in enumerate(images)]
    again = wants.ask(images[0], targets=(1, 7), n_samples=33, seed=2)
    crowd += [wants.ask(image, n_samples=40, targets=(2, 3)) for image in images]
    busy = wants.end(again)
    for job in crowd:
        assert isinstance(wants.end(job), Ended)
    assert torch.equal(alone.refined.raw, busy.refined.raw)
    assert torch.equal(alone.refined.maps, busy.refined.maps)
    assert alone.refined.errors == busy.refined.errors


def test_where_a_tolerance_stops_does_not_depend_on_the_load_either(service, images):
    wants = DirectClient(service)
    full = wants.all(wants.ask(images[1], n_samples=256, refined=True, tolerance=1e-9))
    bounds = {event.samples: event.bound for event in full[1:-1]}
    tolerance = sorted(bounds.values())[2]
    first = next(samples for samples, bound in sorted(bounds.items()) if bound <= tolerance)
    quiet = wants.end(wants.ask(images[1], n_samples=256, tolerance=tolerance))
    crowd = [wants.ask(image, n_samples=60) for image in images]
    busy = wants.end(wants.ask(images[1], n_samples=256, tolerance=tolerance))
    for job in crowd:
        wants.end(job)
    assert quiet.cut_short == busy.cut_short == "tolerance"
    assert quiet.refined.samples == busy.refined.samples == first
    assert torch.equal(quiet.refined.maps, busy.refined.maps)
    assert busy.refined.bound <= tolerance


def test_refinements_are_the_maps_of_the_first_samples(service, images):
    wants = DirectClient(service)
    told = wants.all(wants.ask(images[2], n_samples=50, refined=True))
    refined = told[1:-1]
    assert refined and {event.samples for event in refined} <= set(checkpoints(50))
    assert [event.samples for event in refined] == sorted({event.samples for event in refined})
    explainer = service.models["tiny"].explainers[0]
    some = refined[len(refined) // 2]
    assert torch.equal(some.maps, explainer.explain(images[2], n_samples=some.samples).maps)


def test_several_engines_share_one_request(images):
    with started(workers=3) as service:
        wants = DirectClient(service)
        jobs = [wants.ask(image, n_samples=100) for image in images]
        ends = [wants.end(job) for job in jobs]
        explainer = service.models["tiny"].explainers[0]
        for image, ended in zip(images, ends, strict=True):
            assert torch.equal(ended.refined.maps, explainer.explain(image, n_samples=100).maps)
    # rows are counted when their micro-batch has come back, which may be after the last answer
    rows = [service.metrics.rows.labels(worker.name)._value.get() for worker in service.workers]
    assert sum(rows) == 6 * 101 and all(count > 0 for count in rows)


def test_a_cut_gives_what_is_there_and_an_error_where_nothing_is(service, images):
    wants = DirectClient(service)
    job = wants.ask(images[0], n_samples=1000, refined=True)
    while job.ready < 16:
        time.sleep(0.001)
    service.cut(job, "deadline")
    service.cut(job, "deadline")
    ended = wants.end(job)
    assert ended.cut_short == "deadline" and 16 <= ended.refined.samples < 1000
    explainer = service.models["tiny"].explainers[0]
    assert torch.equal(ended.refined.maps, explainer.explain(images[0], n_samples=ended.refined.samples).maps)
    crowd = [wants.ask(image, n_samples=200) for image in images]
    late = wants.ask(images[0], n_samples=10)
    service.cut(late, "deadline")
    assert isinstance(wants.end(late).error, DeadlineError)
    for job in crowd:
        wants.end(job)
    assert_empty(service)


def test_cancelled_requests_free_their_rows_and_hear_no_more(service, images):
    wants = DirectClient(service)
    job = wants.ask(images[0], n_samples=1000)
    other = wants.ask(images[1], n_samples=5)
    service.cancel(job)
    service.cancel(job)
    assert isinstance(wants.end(other), Ended)
    assert_empty(service)
    assert all(isinstance(event, Predicted) for event in wants.events[job].queue)


def assert_empty(service):
    """Check that the queue is empty once all is answered, after the last micro-batch has come back."""
    until(lambda: not service.scheduler.requests)
    assert (service.scheduler.rows, service.scheduler.requests, service.scheduler.bytes) == (0, 0, 0)
    assert service.jobs() == []


# Faults.


@pytest.fixture
def faulty(service, monkeypatch):
    """Make a worker fail on the images in `poison`: by an error, or by NaN."""
    explainer = service.models["tiny"].explainers[0]
    poison, honest, calls = {}, explainer.samples, []

    def samples(images, draws, targets, levels):
        calls.append(len(images))
        broken = [poison.get(float(image.sum())) for image in images]
        if "raise" in broken:
            raise RuntimeError("a broken kernel")
        made = honest(images, draws, targets, levels)
        for row, image in enumerate(draws.image_index.tolist()):
            if broken[image] == "nan":
                made.tensors()[-1][:, row] = torch.nan
        return made

    monkeypatch.setattr(explainer, "samples", samples)
    return poison, calls


@pytest.mark.parametrize(("kind", "error"), [("raise", RuntimeError), ("nan", NonFiniteError)])
def test_a_poisoned_request_fails_alone(service, images, faulty, kind, error, caplog):
    poison, calls = faulty
    poison[float(images[3].sum())] = kind
    wants = DirectClient(service)
    jobs = [wants.ask(image, n_samples=9, targets=(1,)) for image in images]
    ends = [wants.end(job) for job in jobs]
    assert isinstance(ends[3], Failed) and isinstance(ends[3].error, error)
    assert max(calls) > 1, "they were never in one micro-batch"
    explainer = service.models["tiny"].explainers[0]
    for number in (0, 1, 2, 4, 5):
        alone = explainer.explain(images[number], 1, n_samples=9)
        assert torch.equal(ends[number].refined.maps, alone.maps)
    assert service.why_not_ready() is None
    assert_empty(service)


def test_an_engine_that_keeps_failing_is_not_ready_until_it_works_again(service, images, faulty, caplog):
    poison, _ = faulty
    poison[float(images[0].sum())] = "raise"
    wants = DirectClient(service)
    for _ in range(FAILURES):
        # the request is alone in its micro-batch, and its prediction succeeds
        ended = wants.end(wants.ask(images[0], n_samples=2))
        assert isinstance(ended, Failed)
    assert "keeps failing" in service.why_not_ready()
    assert "a broken kernel" in caplog.text
    wants.end(wants.ask(images[1], n_samples=2))
    assert service.why_not_ready() is None


def test_an_engine_that_failed_is_tried_again_where_nobody_asks(service, images, faulty, monkeypatch, caplog):
    monkeypatch.setattr("dave_fast.serve.workers.PROBE_SECONDS", 0.05)
    poison, _ = faulty
    poison[float(images[0].sum())] = "raise"
    wants = DirectClient(service)
    for _ in range(FAILURES):
        wants.end(wants.ask(images[0], n_samples=2))
    assert service.why_not_ready() is not None
    until(lambda: service.why_not_ready() is None)


def test_a_model_of_nan_is_found_when_it_is_warmed():
    model = serve_model()
    with torch.no_grad():
        model.explainers[0].model.head.weight[0, 0] = torch.nan
    service = Service({"tiny": model})
    with pytest.raises(NonFiniteError, match="output"):
        service.start()


# Admission and shutdown.


def test_requests_are_taken_by_their_bytes(images):
    model = serve_model()
    one = model.request_bytes(1, 50)
    with started(Limits(queue_bytes=3 * one)) as service:
        wants = DirectClient(service)
        with pytest.raises(RefusedError, match="at most") as refused:
            wants.ask(images[0], n_samples=50, top_k=4)
        assert refused.value.kind == "too large"

        def too_many():
            for _ in range(50):
                wants.ask(images[0], n_samples=50)

        with pytest.raises(RefusedError, match="bytes") as refused:
            too_many()
        assert refused.value.kind == "full" and refused.value.retry_after >= 1
        for job in list(wants.events):
            assert isinstance(wants.end(job), Ended)
        assert_empty(service)


@pytest.mark.parametrize("targets", [(10,), (-1,), (0, 99)])
def test_invalid_classes_are_refused(service, images, targets):
    with pytest.raises(InputError, match="0 to 9"):
        DirectClient(service).ask(images[0], targets=targets)


def test_stopping_tells_whoever_waits_and_takes_nobody_new(images):
    with started() as service:
        wants = DirectClient(service)
        jobs = [wants.ask(image, n_samples=1000) for image in images]
        before = threading.active_count()
        service.stop()
        assert threading.active_count() == before - 2
        assert all(isinstance(wants.end(job).error, DeadlineError) for job in jobs)
        with pytest.raises(RefusedError, match="shutting down"):
            wants.ask(images[0])
        assert service.why_not_ready() == "shutting down"
