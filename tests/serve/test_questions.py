"""Tests of questions other than classes over HTTP: each map is the one that `DAVE.explain` makes."""

from __future__ import annotations

import asyncio
import io
import json

import httpx
import numpy as np
import pytest
from PIL import Image

from dave_fast.client import AsyncClient, Client, ServerError
from dave_fast.errors import UnknownModelError
from dave_fast.images import drawing
from dave_fast.ops.smooth import signed_map
from dave_fast.serve.account import Account
from dave_fast.serve.models import load_models
from dave_fast.targets import Contrast, Patch, Sum, Text
from tests.serve.tiny_server import (
    DirectClient,
    TinyClip,
    serve_clip,
    serve_embedding,
    serve_model,
    serve_tokens,
    serving,
    started,
)

pytestmark = pytest.mark.filterwarnings("ignore:the frozen route")
# odd, so that a median and its opposite are opposite
SAMPLES = 13


@pytest.fixture(scope="module")
def served():
    models = [serve_model(), serve_clip(), serve_tokens()]
    with serving(models=models) as (address, service):
        yield address, service.models


@pytest.fixture
def alone(served, photo):
    """Return a function that explains the photograph without a server."""

    def explain(name, question, **settings):
        model = served[1][name]
        inputs = model.prepare(Image.open(io.BytesIO(photo)))[0]
        return model.explainers[0].explain(inputs, question, n_samples=SAMPLES, **settings)

    return explain


ASKED = [
    ("tiny", "dog-cat", Contrast(1, 0), "dog − cat"),
    ("tiny", '"dog"+3-4', Contrast(Sum(1, 3), 4), "dog + thing 3 − thing 4"),
    ("clip", "text:a cat", Text("a cat"), "“a cat”"),
    ("clip", "text:a cat - text:a dog", Contrast(Text("a cat"), Text("a dog")), "“a cat” − “a dog”"),
    ("tokens", "patch:1,2", Patch(1, 2), "patch 1, 2"),
]


@pytest.mark.parametrize(("name", "text", "question", "words"), ASKED, ids=[row[1] for row in ASKED])
def test_map_is_that_of_a_call_and_the_signed_one_is_blended(served, alone, photo, name, text, question, words):
    truth = alone(name, question)
    with Client(served[0]) as client:
        told = client.explain(photo, text, model=name, n_samples=SAMPLES, signed=True)
    assert np.array_equal(told.maps, truth.maps.numpy())
    assert np.array_equal(told.signed, signed_map(truth.signed).numpy())
    assert told.targets == [-1] and told.class_names == [words] and np.isnan(told.probabilities).all()
    assert len(told.top) == (5 if name == "tiny" else 0)


def test_questions_and_classes_of_one_request_are_those_of_their_own(served, photo):
    with Client(served[0]) as client:
        asked = ["dog-cat", "dog", "cat-dog"]
        told = client.explain(photo, asked, n_samples=SAMPLES, signed=True)
        assert told.targets == [-1, 1, -1]
        for number, text in enumerate(asked):
            assert np.array_equal(client.explain(photo, text, n_samples=SAMPLES).maps[0], told.maps[number])
        # the opposite question has the opposite signed map
        np.testing.assert_allclose(told.signed[0], -told.signed[2], atol=1e-6)
        assert client.explain(photo, "dog", n_samples=2).signed is None


def test_requests_that_share_micro_batches_keep_their_own_questions(served, photo):
    texts = [f"text:{word}" for word in ("one", "two", "three", "four")]

    async def together():
        async with AsyncClient(served[0]) as client:
            return await asyncio.gather(*(client.explain(photo, t, model="clip", n_samples=SAMPLES) for t in texts))

    with Client(served[0]) as client:
        for found, text in zip(asyncio.run(together()), texts, strict=True):
            assert np.array_equal(found.maps, client.explain(photo, text, model="clip", n_samples=SAMPLES).maps)


def test_threads_of_several_workers_embed_texts_one_at_a_time(images):
    model = serve_clip(workers=2)
    inside, most = [], []

    def embedding(texts):
        inside.append(texts)
        most.append(len(inside))
        found = TinyClip.text_embedding(model.explainers[0].model, texts)
        inside.pop()
        return found

    model.explainers[0].model.text_embedding = embedding
    with started(models=[model]) as service:
        client = DirectClient(service)
        jobs = [client.ask(image, "clip", targets=(Text(f"text {n}"),), n_samples=4) for n, image in enumerate(images)]
        ends = [client.end(job) for job in jobs]
    assert all(end.refined.maps.isfinite().all() for end in ends) and max(most) == 1 and len(most) > len(images)


def test_events_name_the_question_and_hold_signed_maps_as_integers(served, photo):
    options = {
        "target": ["dog-cat", "1"],
        "signed": "true",
        "encoding": "uint8",
        "n_samples": SAMPLES,
        "depth": "pixels,0",
    }
    answer = httpx.post(f"{served[0]}/v1/explain/stream", params=options, content=photo)
    events = [block.split("\n") for block in answer.text.split("\n\n") if block.startswith("event")]
    told = {name.removeprefix("event: "): json.loads(data.removeprefix("data: ")) for name, data in events}
    assert told["prediction"]["targets"] == [-1, 1] and told["prediction"]["class_names"] == ["dog − cat", "dog"]
    assert [one["target"] for one in told["prediction"]["accounts"]] == [-1, 1]
    for one in told["done"]["maps"]:
        assert one["signed"] is None and [each["signed"]["dtype"] for each in one["depths"]] == ["int16", "int16"]
    with Client(served[0]) as client:
        expected = client.explain(photo, ["dog-cat", "1"], signed=True, n_samples=SAMPLES, depth=["pixels", 0])
        asked = dict(signed=True, n_samples=SAMPLES, depth=["pixels", 0], encoding="uint8")
        *_, found = client.stream(photo, ["dog-cat", "1"], **asked)
    assert found.signed.shape == found.maps.shape == (2, 2, 32, 32)
    np.testing.assert_allclose(found.signed, expected.signed, atol=1 / 32767)
    assert np.abs(found.signed).max(axis=(2, 3)) == pytest.approx(1)


def test_signed_picture_is_the_overlay_in_two_colours(served, alone, photo, pixels):
    options = {"target": "dog-cat", "view": "signed", "n_samples": SAMPLES}
    answer = httpx.post(f"{served[0]}/v1/explain", params=options, content=photo, headers={"accept": "image/png"})
    assert answer.headers["x-dave-targets"] == "-1"
    signed = signed_map(alone("tiny", Contrast(1, 0)).signed)[0].numpy()
    crop = served[1]["tiny"].prepare(Image.open(io.BytesIO(photo)))[1]
    expected = np.asarray(drawing.overlay(crop, signed, signed=True))
    assert np.abs(np.asarray(Image.open(io.BytesIO(answer.content)), int) - expected).max() <= 2


def test_kserve_has_questions_and_signed_maps(served, photo):
    import base64

    image = {"name": "image", "shape": [1], "datatype": "BYTES", "data": [base64.b64encode(photo).decode()]}
    parameters = {"target": ["dog-cat"], "signed": True, "n_samples": SAMPLES}
    told = httpx.post(f"{served[0]}/v2/models/tiny/infer", json={"inputs": [image], "parameters": parameters}).json()
    outputs = {one["name"]: one for one in told["outputs"]}
    assert outputs["targets"]["data"] == [-1] and outputs["signed"]["shape"] == [1, 32, 32]
    assert min(outputs["signed"]["data"]) < 0 < max(outputs["signed"]["data"])


def test_models_say_what_may_be_asked(served):
    with Client(served[0]) as client:
        told = {one["name"]: (one["questions"], one["grid"], one["classes"]) for one in client.models()}
    assert told == {
        "tiny": (["classes"], None, 10),
        "clip": (["texts"], None, 0),
        "tokens": (["patches"], [4, 4], 0),
    }


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("tiny", "image:/etc/hostname", "names a file"),
        ("tokens", "patch:0,0@/etc/hostname", "names a file"),
        ("tiny", "cat-dog-2-3-4", "at most 3"),
        ("clip", "-".join(["text:a"] * 5), "at most 3"),
        ("clip", "text: ", "prompt is empty"),
        ("clip", "tiger", "no classes"),
        ("clip", None, "ask target=text:PROMPT"),
        ("tokens", None, "ask target=patch:ROW,COLUMN"),
        ("tiny", "text:a cat", "takes no text prompts"),
        ("tiny", "patch:0,0", "a patch needs tokens"),
        ("tokens", "patch:4,0", "4 rows and 4 columns"),
        ("tiny", "walrus", "no class"),
        ("tiny", "x" * 401, "at most 400"),
        ("clip", ["text:a", "text:a"], "twice"),
    ],
)
def test_questions_that_cannot_be_asked_are_refused_in_words(served, photo, name, text, words):
    with Client(served[0], retries=0) as client:
        with pytest.raises(ServerError, match=words) as refused:
            client.explain(photo, text, model=name, n_samples=2)
        assert refused.value.status == 422
        good = {"tiny": "cat", "clip": "text:a", "tokens": "patch:0,0"}[name]
        assert client.explain(photo, good, model=name, n_samples=2).samples == 2


def test_memory_of_signed_maps_is_held_before_they_are_made(served, photo, monkeypatch):
    held = []
    hold = Account.hold
    monkeypatch.setattr(Account, "hold", lambda account, more: held.append(more) or hold(account, more))
    model = served[1]["tiny"]
    with Client(served[0]) as client:
        client.explain(photo, "dog-cat", n_samples=2, signed=True)
        client.explain(photo, "dog-cat", n_samples=2)
    # twice the maps, beside what an answer has without any
    assert 2 * model.answer_bytes(1, 1) - (1 << 16) in held and model.answer_bytes(1, 1) in held


def test_deadline_ends_a_question_too(served, photo):
    with Client(served[0]) as client:
        told = client.explain(photo, "text:a cat", model="clip", n_samples=1024, deadline_ms=400)
    assert told.cut_short == "deadline" and 0 < told.samples < 1024


def test_tokens_of_a_model_are_served_beside_its_classes():
    loaded = load_models(["demo", "patches=tokens:demo"], [None], precision="fp32")
    assert loaded["demo"].questions == ("classes",) and loaded["patches"].questions == ("patches",)
    (rows, columns), explainer = loaded["patches"].grid, loaded["patches"].explainers[0]
    assert explainer.predict(loaded["patches"].example()).shape[1] >= rows * columns
    assert explainer.sampling == loaded["demo"].explainers[0].sampling


def test_text_tower_that_cannot_be_loaded_is_an_error_at_the_start():
    class NoTokenizer(TinyClip):
        def text_embedding(self, texts):
            raise UnknownModelError("no tokenizer")

    with pytest.raises(UnknownModelError, match="no tokenizer"), started(models=[serve_embedding(NoTokenizer(), "x")]):
        pass
