"""Tests of `depth` in requests: the bits of `DAVE.explain`, every form of an answer, refusals, admission, cuts."""

import base64
import io
import time

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from dave_fast.client import Client, ServerError
from dave_fast.engine.levels import Levels
from dave_fast.errors import RefusedError
from dave_fast.explain.convergence import factor
from dave_fast.serve.api import WAITING, Events
from dave_fast.serve.jobs import Ended, Failed, Predicted
from dave_fast.serve.limits import Limits
from tests.serve.tiny_server import SIZE, DirectClient, serve_model, started, until

PLACES = (None, 0, 1)
NAMES = ["pixels", 0, 1]


@pytest.fixture(scope="module")
def service():
    with started() as running:
        yield running


@pytest.fixture
def http(server):
    with httpx.Client(base_url=server[0], timeout=60) as client:
        yield client


@pytest.fixture
def alone(server, pixels):
    """Explain the picture without the server, for comparison with answers."""
    model = server[1].models["tiny"]
    image = model.prepare.transform(Image.fromarray(pixels))
    return lambda **options: model.explainers[0].explain(image, **options)


# The service.


@pytest.mark.parametrize("place", [None, 0, 1])
def test_one_depth_is_what_explain_gives(service, images, place):
    wants = DirectClient(service)
    ended = wants.end(wants.ask(images[0], targets=(1, 7), n_samples=20, seed=5, places=(place,)))
    explainer = service.models["tiny"].explainers[0]
    depth = "pixels" if place is None else place
    truth = explainer.explain(images[0], targets=[1, 7], n_samples=20, seed=5, depth=depth)
    assert torch.equal(ended.refined.maps, truth.maps[0]) and torch.equal(ended.refined.raw, truth.raw[0])
    assert len(ended.refined.errors) == 2 and (ended.predicted.accounts is None) == (place is None)


def test_several_depths_among_other_requests_are_each_as_alone(service, images):
    wants = DirectClient(service)
    alone = [wants.end(wants.ask(images[0], targets=(1, 7), n_samples=33, places=(place,))) for place in PLACES]
    crowd = [wants.ask(image, n_samples=9 + i, top_k=2, places=PLACES[i % 3 :]) for i, image in enumerate(images)]
    ended = wants.end(wants.ask(images[0], targets=(1, 7), n_samples=33, places=PLACES))
    assert all(isinstance(wants.end(job), Ended) for job in crowd)
    assert ended.refined.maps.shape == (2, 3, SIZE, SIZE)
    for level, own in enumerate(alone):
        assert torch.equal(ended.refined.maps[:, level], own.refined.maps)
        assert torch.equal(ended.refined.raw[:, level], own.refined.raw)
        assert ended.refined.errors[level::3] == own.refined.errors
        assert ended.refined.bounds[level::3] == own.refined.bounds
        known = factor(33, shrink=True, block=PLACES[level] is not None)
        assert own.refined.bounds == [known * error for error in own.refined.errors]
    assert ended.refined.bound == max(own.refined.bound for own in alone)


def test_walks_end_at_the_first_depth_that_is_asked_for(service, images, monkeypatch):
    explainer, seen = service.models["tiny"].explainers[0], []
    honest = explainer.samples

    def samples(images, draws, targets, levels):
        seen.append(levels)
        return honest(images, draws, targets, levels)

    monkeypatch.setattr(explainer, "samples", samples)
    wants = DirectClient(service)
    job = wants.ask(images[0], n_samples=4, places=(1, 0))
    assert isinstance(wants.end(job), Ended)
    assert set(seen) == {Levels(False, (0, 1))}


def test_a_tolerance_waits_for_the_largest_bound_of_the_depths(service, images):
    wants = DirectClient(service)
    told = wants.all(wants.ask(images[1], n_samples=64, refined=True, tolerance=1e-9, places=PLACES))
    bounds = {event.samples: event.bounds for event in told[1:-1] if event.samples >= 8}
    tolerance = sorted(max(each) for each in bounds.values())[1]
    first = min(samples for samples, each in bounds.items() if max(each) <= tolerance)
    ended = wants.end(wants.ask(images[1], n_samples=64, tolerance=tolerance, places=PLACES))
    assert (ended.cut_short, ended.refined.samples) == ("tolerance", first)


def test_a_cut_and_a_cancelled_request_of_several_depths(service, images):
    wants = DirectClient(service)
    job = wants.ask(images[0], n_samples=1000, places=PLACES)
    while job.ready < 10:
        time.sleep(0.001)
    service.cut(job, "deadline")
    ended = wants.end(job)
    explainer = service.models["tiny"].explainers[0]
    truth = explainer.explain(images[0], n_samples=ended.refined.samples, depth=NAMES)
    assert ended.cut_short == "deadline" and torch.equal(ended.refined.maps[0], truth.maps[0])
    left = wants.ask(images[0], n_samples=1000, places=PLACES)
    service.cancel(left)
    until(lambda: not service.scheduler.requests)
    assert (service.scheduler.rows, service.scheduler.bytes) == (0, 0) and left.kept is None
    assert all(isinstance(event, Predicted) for event in wants.events[left].queue)


def test_nan_in_the_evidence_of_a_block_fails_that_request_alone(service, images, monkeypatch):
    explainer = service.models["tiny"].explainers[0]
    honest = explainer.samples

    def samples(images_of_rows, draws, targets, levels):
        made = honest(images_of_rows, draws, targets, levels)
        for row, image in enumerate(draws.image_index.tolist()):
            if torch.equal(images_of_rows[image], images[3]):
                made.evidence[-1][:, row] = torch.nan
        return made

    monkeypatch.setattr(explainer, "samples", samples)
    wants = DirectClient(service)
    jobs = [wants.ask(image, n_samples=5, targets=(1,), places=(1,)) for image in images[2:5]]
    assert [isinstance(wants.end(job), Failed) for job in jobs] == [False, True, False]


def test_admission_counts_samples_and_maps_of_every_depth(images):
    model = serve_model()
    pixels, block, both = (model.request_bytes(1, 50, places) for places in ((None,), (0,), (None, 0)))
    image, tokens = 4 * 3 * SIZE * SIZE, model.blocks[0].prefix + model.blocks[0].patches
    assert pixels == 2 * (50 * image + 5 * image // 3) + image
    assert block == 2 * (50 * 4 * tokens + 5 * image // 3) + image
    assert both == pixels + block - image
    with started(Limits(queue_bytes=pixels)) as service:
        wants = DirectClient(service)
        with pytest.raises(RefusedError, match="at most"):
            wants.ask(images[0], n_samples=50, places=(None, 0))
        assert isinstance(wants.end(wants.ask(images[0], n_samples=50, places=(0,))), Ended)


def test_newer_maps_replace_those_that_a_slow_client_has_not_taken(service, images):
    wants = DirectClient(service)
    told = wants.all(wants.ask(images[0], n_samples=128, refined=True, tolerance=1e-9, places=PLACES))
    events = Events()
    for event in told:
        events.put_nowait(event)
    kept = [events.get_nowait() for _ in range(events.qsize())]
    assert len(kept) == WAITING + 1 < len(told)
    assert kept == [*told[: WAITING - 1], *told[-2:]]


# HTTP.


def heat(told):
    return np.frombuffer(base64.b64decode(told["data"]), "<f4").reshape(told["shape"])


@pytest.mark.parametrize(
    ("given", "expected"), [("pixels", "pixels"), ("1", 1), ("0.5", 1), ("auto", 1), (" 0.0", 0), ("1.0", 1)]
)
def test_every_form_of_one_depth_is_answered(http, photo, alone, given, expected):
    params = {"depth": given, "n_samples": 9, "target": "dog"}
    told = http.post("/v1/explain", content=photo, params=params).json()
    assert told["depth"] == expected and told["maps"][0]["depths"] is None
    assert np.array_equal(heat(told["maps"][0]["map"]), alone(target=1, n_samples=9, depth=expected).maps[0].numpy())
    assert (told["accounts"] is None) == (expected == "pixels")


def test_several_depths_by_commas_by_repetition_and_in_a_form_are_the_same(http, photo, alone):
    truth = alone(targets=[1, 4], n_samples=9, depth=NAMES)
    common = {"n_samples": 9, "target": ["1", "4"]}
    answers = [
        http.post("/v1/explain", content=photo, params={**common, "depth": "pixels,0, 1"}),
        http.post("/v1/explain", content=photo, params={**common, "depth": ["pixels", "0", "1"]}),
        http.post("/v1/explain", files={"image": photo}, data={**common, "depth": ["pixels", "0,1"]}),
    ]
    for answer in answers:
        told = answer.json()
        assert told["depth"] == NAMES and answer.headers["x-dave-depth"] == "pixels,0,1"
        for number, one in enumerate(told["maps"]):
            assert one["map"] is None and [each["depth"] for each in one["depths"]] == NAMES
            assert one["error_bound"] == max(each["error_bound"] for each in one["depths"])
            for level, each in enumerate(one["depths"]):
                assert np.array_equal(heat(each["map"]), truth.maps[0, number, level].numpy())
        assert told["error_bound"] == max(one["error_bound"] for one in told["maps"])


def test_accounts_are_those_of_the_explanation_and_add_up(http, photo, alone):
    truth = alone(targets=[1, 4], n_samples=1, depth=1).depths
    told = http.post("/v1/explain?depth=1&target=1&target=4&n_samples=1", content=photo).json()["accounts"]
    for number, one in enumerate(told):
        assert one["target"] == [1, 4][number]
        for name in ("score", "pixels", "patches", "prefix", "biases"):
            assert one[name] == getattr(truth, name)[0, number].tolist()
        total = np.add(np.add(one["patches"], one["prefix"]), one["biases"])
        assert total == pytest.approx([one["score"]] * 2, abs=1e-5)


@pytest.mark.parametrize(
    ("depth", "word"),
    [("2", "blocks 0 to 1"), ("zebra", "pixels"), ("-1", "share"), ("1.5", "share"), ("nan", "share"), ("", "depth")],
)
def test_depths_that_cannot_be_are_refused_in_words(http, photo, depth, word):
    for path in ("/v1/explain", "/v1/explain/stream"):
        answer = http.post(path, content=photo, params={"depth": depth})
        assert answer.status_code == 422 and word in answer.json()["detail"]


def test_too_many_depths_are_refused(http, photo):
    answer = http.post("/v1/explain", content=photo, params={"depth": ",".join(["0"] * 101)})
    assert answer.status_code == 422 and "at most 100" in answer.json()["detail"]


def test_pictures_and_arrays_hold_every_depth(http, photo, alone):
    params = {"depth": "pixels,1", "target": ["1", "4", "5"], "n_samples": 9}
    truth = alone(targets=[1, 4, 5], n_samples=9, depth=["pixels", 1])

    def answer(kind):
        return io.BytesIO(http.post("/v1/explain", content=photo, params=params, headers={"accept": kind}).content)

    assert Image.open(answer("image/png")).size == (1344, 896)
    assert np.array_equal(np.load(answer("application/x-npy")), truth.maps[0].numpy())
    with np.load(answer("application/x-npz")) as arrays:
        assert np.array_equal(arrays["maps"], truth.maps[0].numpy())
        assert np.array_equal(arrays["raw"], truth.raw[0].numpy())
        assert arrays["errors"].shape == arrays["error_bounds"].shape == (3, 2)
        assert arrays["depth"] == "pixels,1"
    params["depth"] = "1"
    with np.load(answer("application/x-npz")) as arrays:
        assert arrays["maps"].shape == (3, SIZE, SIZE) and arrays["depth"] == "1"


@pytest.mark.parametrize("depth", [1, [1], "1", ["pixels", 1], "pixels,0.9"])
def test_kserve_requests_give_depths_as_json(http, photo, alone, depth):
    image = {"name": "image", "shape": [1], "datatype": "BYTES", "data": [base64.b64encode(photo).decode()]}
    asked = {"inputs": [image], "parameters": {"target": ["1"], "n_samples": 9, "depth": depth}}
    told = http.post("/v2/models/tiny/infer", json=asked).json()
    places = [1] if depth in (1, [1], "1") else ["pixels", 1]
    assert told["parameters"]["depth"] == ",".join(map(str, places))
    maps, _, bounds = told["outputs"]
    truth = alone(targets=[1], n_samples=9, depth=places).maps[0]
    truth = truth if len(places) > 1 else truth[:, 0]
    assert maps["shape"] == list(truth.shape) and bounds["shape"] == list(truth.shape[:-2])
    assert np.array_equal(np.array(maps["data"], np.float32).reshape(truth.shape), truth.numpy())
    asked["parameters"]["depth"] = True
    assert http.post("/v2/models/tiny/infer", json=asked).status_code == 422


def test_a_model_without_blocks_has_pixels_and_says_why_not_more(http, photo, server, monkeypatch):
    model = server[1].models["other"]
    monkeypatch.setitem(vars(model), "_blocks", ((), "its stem is odd"))
    assert http.get("/v1/models").json()[1]["blocks"] == 0 and http.get("/v1/models").json()[0]["blocks"] == 2
    ask = {"model": "other", "n_samples": 1}
    assert http.post("/v1/explain", content=photo, params=ask).json()["depth"] == "pixels"
    refused = http.post("/v1/explain", content=photo, params={**ask, "depth": "auto"})
    assert refused.status_code == 422 and "its stem is odd" in refused.json()["detail"]


@pytest.mark.parametrize(("depth", "expected"), [(None, "pixels"), (1, 1), (0.9, 1), (("pixels", 0), ("pixels", 0))])
def test_the_client_asks_for_depths_and_tells_them(server, photo, alone, depth, expected):
    truth = alone(targets=[1, 4], n_samples=9, depth=expected)
    with Client(server[0]) as client:
        updates = list(client.stream(photo, [1, 4], n_samples=9, depth=depth))
        told = client.explain(photo, [1, 4], n_samples=9, depth=depth)
        assert {each.depth for each in (told, *updates)} == {expected}
        assert np.array_equal(told.maps, truth.maps[0].numpy())
        assert np.array_equal(updates[-1].maps, truth.maps[0].numpy())
        assert len(told.error_bounds) == 2 and (told.accounts is None) == (depth is None)
        if told.accounts:
            assert [one["score"] for one in told.accounts] == truth.depths.score[0].tolist()
        with pytest.raises(ServerError, match="blocks 0 to 1"):
            client.explain(photo, depth=2)
