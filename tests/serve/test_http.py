"""Tests over HTTP on loopback: routes, formats, refusals and their statuses, API keys, the client."""

import asyncio
import base64
import io
import json
import re
import struct
import zlib
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from dave_fast.client import AsyncClient, Client, ServerError, picture_bytes
from dave_fast.errors import InputError
from dave_fast.images import as_rgb, decode_image
from dave_fast.ops.smooth import smooth
from dave_fast.serve import page
from dave_fast.serve.limits import Limits
from tests.serve.tiny_server import NAMES, SIZE, file_of, serve_model, serving


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


# Formats.


def test_json_is_the_default(http, photo, alone):
    answer = http.post("/v1/explain", content=photo, params={"n_samples": 20, "seed": 3})
    assert answer.status_code == 200 and answer.headers["content-type"] == "application/json"
    told = answer.json()
    truth = alone(n_samples=20, seed=3)
    (only,) = told["maps"]
    assert only["map"]["dtype"] == "float32" and only["map"]["shape"] == [SIZE, SIZE]
    values = np.frombuffer(base64.b64decode(only["map"]["data"]), "<f4").reshape(SIZE, SIZE)
    assert np.array_equal(values, truth.maps[0].numpy())
    assert only["target"] == int(truth.target) and only["class_name"] == NAMES[only["target"]]
    assert only["probability"] == pytest.approx(float(truth.probability), abs=1e-6)
    assert (told["model"], told["samples"], told["n_samples"], told["seed"]) == ("tiny", 20, 20, 3)
    assert told["cut_short"] is None and 0 < told["error"] < told["error_bound"]
    assert [one["probability"] for one in told["top"]] == sorted((o["probability"] for o in told["top"]), reverse=True)
    assert len(told["top"]) == 5 and told["total_ms"] >= told["queue_ms"] >= 0
    assert answer.headers["x-dave-samples"] == "20" and answer.headers["x-request-id"]


def test_npy_holds_the_maps_of_all_classes(http, photo, alone):
    params = {"target": ["cat", "3"], "n_samples": 9}
    answer = http.post("/v1/explain", content=photo, params=params, headers={"accept": "application/x-npy"})
    maps = np.load(io.BytesIO(answer.content))
    assert maps.shape == (2, SIZE, SIZE) and maps.dtype == np.float32
    assert np.array_equal(maps[1], alone(target=3, n_samples=9).maps[0].numpy())
    assert answer.headers["x-dave-targets"] == "0,3"


def test_npz_holds_everything(http, photo, alone):
    answer = http.post("/v1/explain?target=dog&n_samples=9", content=photo, headers={"accept": "application/x-npz"})
    with np.load(io.BytesIO(answer.content)) as arrays:
        truth = alone(target=1, n_samples=9)
        assert np.array_equal(arrays["raw"], truth.raw.numpy()) and np.array_equal(arrays["maps"], truth.maps.numpy())
        assert arrays["input"].shape == (SIZE, SIZE, 3) and arrays["class_names"].tolist() == ["dog"]
        assert arrays["samples"] == arrays["n_samples"] == 9 and len(arrays["top_targets"]) == 5
        assert np.isfinite(arrays["errors"]).all() and str(arrays["model"]) == "tiny"


@pytest.mark.parametrize(("params", "expected"), [({}, True), ({"shrink": True}, True), ({"shrink": False}, False)])
def test_every_form_of_an_answer_says_whether_it_is_shrunk(server, http, photo, alone, params, expected):
    given, shrunk = {"target": "dog", "n_samples": 9, **params}, alone(target=1, n_samples=9)
    truth = shrunk.maps if expected else smooth(shrunk.raw)

    def answer(kind):
        return http.post("/v1/explain", content=photo, params=given, headers={"accept": kind})

    told = answer("application/json").json()
    assert told["shrink"] is expected
    values = np.frombuffer(base64.b64decode(told["maps"][0]["map"]["data"]), "<f4").reshape(SIZE, SIZE)
    assert np.array_equal(values, truth[0].numpy())
    npy = answer("application/x-npy")
    assert npy.headers["x-dave-shrink"] == str(expected).lower()
    assert np.array_equal(np.load(io.BytesIO(npy.content)), truth.numpy())
    with np.load(io.BytesIO(answer("application/x-npz").content)) as arrays:
        assert arrays["shrink"] == expected and np.array_equal(arrays["maps"], truth.numpy())
        assert np.array_equal(arrays["raw"], shrunk.raw.numpy())
    (image,) = [{"name": "image", "shape": [1], "datatype": "BYTES", "data": [base64.b64encode(photo).decode()]}]
    parameters = {"target": ["1"], "n_samples": 9, **params}
    inferred = http.post("/v2/models/tiny/infer", json={"inputs": [image], "parameters": parameters}).json()
    assert inferred["parameters"]["shrink"] is expected
    assert np.array_equal(np.array(inferred["outputs"][0]["data"], np.float32).reshape(truth.shape), truth.numpy())
    with Client(server[0]) as client:
        assert client.models()[0]["shrink"] is True
        explained = client.explain(photo, 1, n_samples=9, **params)
        updates = list(client.stream(photo, 1, n_samples=9, **params))
        assert {each.shrink for each in (explained, *updates)} == {expected}
        assert np.array_equal(explained.maps, truth.numpy()) and np.array_equal(updates[-1].maps, truth.numpy())


def test_a_server_without_shrinkage_shrinks_where_it_is_asked_to(photo):
    with serving(models=[serve_model(shrink=False)]) as (address, _), Client(address) as client:
        assert client.models()[0]["shrink"] is False
        plain, shrunk = (client.explain(photo, 1, n_samples=9, shrink=each) for each in (None, True))
        assert (plain.shrink, shrunk.shrink) == (False, True) and not np.array_equal(plain.maps, shrunk.maps)


@pytest.mark.parametrize("view", ["overlay", "map"])
def test_png_shows_the_classes_side_by_side(http, photo, view):
    answer = http.post(f"/v1/explain?top_k=3&n_samples=4&view={view}", content=photo, headers={"accept": "image/*"})
    assert answer.headers["content-type"] == "image/png"
    picture = Image.open(io.BytesIO(answer.content))
    assert picture.width == 3 * picture.height and picture.mode == "RGB"


def test_accept_is_weighed(http, photo):
    wanted = "text/html, application/x-npy;q=0.5, image/png;q=0.9"
    answer = http.post("/v1/explain?n_samples=2", content=photo, headers={"accept": wanted})
    assert answer.headers["content-type"] == "image/png"
    refused = http.post("/v1/explain?n_samples=2", content=photo, headers={"accept": "text/html"})
    assert refused.status_code == 406 and "image/png" in refused.json()["detail"]


def test_a_form_brings_image_and_options(http, photo, alone):
    form = {"target": ["4", "dog"], "n_samples": "7", "encoding": "uint8"}
    told = http.post("/v1/explain", files={"image": ("x.png", photo)}, data=form).json()
    assert [one["target"] for one in told["maps"]] == [4, 1] and told["samples"] == 7
    values = np.frombuffer(base64.b64decode(told["maps"][0]["map"]["data"]), np.uint8).reshape(SIZE, SIZE)
    assert np.abs(values / 255 - alone(target=4, n_samples=7).maps[0].numpy()).max() <= 0.5 / 255 + 1e-6


def scan():
    """Return a PNG of sixteen bits whose samples use twelve."""
    file = io.BytesIO()
    Image.fromarray(np.linspace(0, 4095, SIZE * SIZE).astype(np.uint16).reshape(SIZE, SIZE)).save(file, "PNG")
    return file.getvalue()


def test_what_was_assumed_about_an_image_is_told(http, photo):
    (note,) = http.post("/v1/explain?n_samples=2", content=scan()).json()["notes"]
    assert note.startswith("the image: its samples run from 0 to 4095, as data of 12 bits would")
    picture = http.post("/v1/explain?n_samples=2", content=scan(), headers={"accept": "image/png"})
    assert picture.headers["x-dave-notes"] == note
    plain = http.post("/v1/explain?n_samples=2", content=photo)
    assert plain.json()["notes"] == [] and "x-dave-notes" not in plain.headers


def test_client_is_told_what_was_assumed(server):
    with Client(server[0]) as client:
        assert "as data of 12 bits would" in client.explain(scan(), n_samples=2).notes[0]
        assert client.explain(Image.open(io.BytesIO(scan())), n_samples=2).notes


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "F", "I;16"])
def test_client_sends_pictures_of_every_mode(mode):
    values = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    image = Image.fromarray(values)
    if mode in ("I", "F", "I;16"):
        image = Image.fromarray(values.astype({"I": np.int32, "F": np.float32, "I;16": np.uint16}[mode]) * 257)
    else:
        image = image.convert(mode)
    expected = as_rgb(image)
    assert np.array_equal(np.asarray(decode_image(picture_bytes(image), "a")), np.asarray(expected))


def test_client_sends_pictures_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    values = np.arange(32, dtype=np.uint8).reshape(4, 8) * 8
    Image.fromarray(np.ascontiguousarray(np.rot90(values))).save(file, "PNG", exif=exif)
    with Image.open(file) as image:
        found = np.asarray(decode_image(picture_bytes(image), "a"))
    assert np.array_equal(found[..., 0], values)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_every_usual_format_is_read(http, pixels, kind):
    assert http.post("/v1/explain?n_samples=1", content=file_of(pixels, kind)).status_code == 200


# Streams, stored images, models.


def events(text):
    for block in text.strip().split("\n\n"):
        if block.startswith("event:"):
            name, data = block.split("\n")
            yield name[7:], json.loads(data[6:])


@pytest.mark.parametrize("method", ["POST", "GET"])
def test_a_stream_refines_to_the_answer(http, photo, alone, method):
    if method == "POST":
        answer = http.post("/v1/explain/stream?n_samples=40", content=photo)
    else:
        name = http.post("/v1/images", content=photo).json()["image"]
        answer = http.get("/v1/explain/stream", params={"n_samples": 40, "image": name})
    assert answer.headers["content-type"].startswith("text/event-stream")
    told = list(events(answer.text))
    names = [name for name, _ in told]
    assert names[0] == "prediction" and names[-1] == "done" and set(names[1:-1]) == {"maps"}
    counts = [event["samples"] for name, event in told if name != "prediction"]
    # steps that a busy machine comes to late are left out
    assert counts == sorted(set(counts)) and counts[-1] == 40 and len(counts) >= 2
    truth = alone(n_samples=40).maps[0].numpy()
    last = np.frombuffer(base64.b64decode(told[-1][1]["maps"][0]["map"]["data"]), "<f4").reshape(SIZE, SIZE)
    assert np.array_equal(last, truth)


def test_stored_images_serve_several_requests_and_can_be_looked_at(http, photo):
    stored = http.post("/v1/images", content=photo).json()
    assert (stored["width"], stored["height"]) == (50, 40)
    for target in (1, 2):
        told = http.post("/v1/explain", params={"image": stored["image"], "target": target, "n_samples": 2}).json()
        assert told["maps"][0]["target"] == target
    crop = http.get(f"/v1/images/{stored['image']}/crop", params={"model": "other"})
    assert Image.open(io.BytesIO(crop.content)).size == (SIZE, SIZE)
    assert http.get("/v1/images/none/crop").status_code == 404
    assert http.post("/v1/explain?image=none").status_code == 404


def test_models_are_told_apart(http, photo):
    told = http.get("/v1/models").json()
    assert [model["name"] for model in told] == ["tiny", "other"]
    assert told[0]["class_names"] == NAMES and told[0]["height"] == SIZE and told[0]["route"] == "engine"
    maps = [
        http.post("/v1/explain", params={"model": name, "target": 1, "n_samples": 3}, content=photo).json()["maps"]
        for name in ("tiny", "other")
    ]
    assert maps[0] != maps[1]


def test_health_documentation_metrics_and_page(http, photo):
    assert http.get("/healthz").json() == {"status": "ok", "reason": None}
    assert http.get("/readyz").status_code == 200
    assert http.get("/docs").status_code == 200
    assert "/v1/explain" in http.get("/openapi.json").json()["paths"]
    http.post("/v1/explain?n_samples=5&deadline_ms=60000", content=photo)
    text = http.get("/metrics").text
    names = ("queue_wait_seconds", "batch_fill", "device_seconds", "samples", "deadline_misses", "errors")
    for name in (*names, "held_bytes", "most_bytes"):
        assert f"dave_fast_{name}" in text
    assert 'dave_fast_requests_total{route="/v1/explain",status="200"}' in text
    page = http.get("/")
    assert page.headers["content-type"].startswith("text/html") and "default-src 'none'" in str(page.headers)
    assert http.get("/page.css").status_code == http.get("/page.js").status_code == 200


def test_the_page_asks_no_other_origin_for_anything(http):
    names = sorted(path.name for path in Path(page.__file__).parent.iterdir() if path.suffix in (".js", ".css"))
    texts = {name: http.get(f"/{name}").raise_for_status().text for name in ["", *names]}
    assert len(texts) > 8
    for text in texts.values():
        assert len(text) > 500 and "http://" not in text.replace("http://www.w3.org/2000/svg", "")
        assert "https://" not in text and "@import" not in text
    # the page has every element that a script looks up by its id, and the scripts import only each other
    scripts = "".join(text for name, text in texts.items() if name.endswith(".js"))
    wanted = set(re.findall(r'\$\("([a-z-]+)"\)', scripts))
    assert len(wanted) > 40 and wanted <= set(re.findall(r'id="([a-z-]+)"', texts[""]))
    assert {f'"./{name}"' for name in names if name.endswith(".js")} > set(re.findall(r'from ("[^"]+")', scripts))
    assert Image.open(io.BytesIO(http.get("/example.png").content)).size == (128, 128)


# Tolerances and deadlines.


def test_a_tolerance_stops_early_and_says_so(http, photo):
    told = http.post("/v1/explain?n_samples=1000&tolerance=0.9", content=photo).json()
    assert told["cut_short"] == "tolerance" and told["samples"] < 1000 and told["error_bound"] <= 0.9


def test_a_deadline_is_kept_with_what_there_is(http, photo):
    answer = http.post("/v1/explain?n_samples=1000&deadline_ms=150", content=photo)
    told = answer.json()
    if answer.status_code == 200:
        assert told["cut_short"] == "deadline" and 1 <= told["samples"] < 1000
    else:
        assert answer.status_code == 504 and "in time" in told["detail"]
    late = http.post("/v1/explain?n_samples=1000&deadline_ms=1", content=photo)
    assert late.status_code == 504


def test_without_deadlines_small_requests_overtake_large_ones(server, photo):
    """The server's own time limit is no deadline to the scheduler, so that small requests go first over HTTP too."""
    order = []

    async def ask(client, samples):
        await client.explain(photo, n_samples=samples)
        order.append(samples)

    async def both():
        async with AsyncClient(server[0]) as client:
            large = asyncio.create_task(ask(client, 300))
            while not server[1].jobs():
                await asyncio.sleep(0.005)
            await ask(client, 8)
            await large

    asyncio.run(both())
    assert order == [8, 300]


# Refusals.


@pytest.mark.parametrize(
    ("params", "status", "word"),
    [
        ({"model": "absent"}, 404, "tiny, other"),
        # a name of a client's is never imported
        ({"model": "os:getcwd"}, 404, "tiny, other"),
        ({"target": "zebra"}, 422, "no class"),
        ({"target": "10"}, 422, "out of range"),
        ({"target": "thing"}, 422, "fits 8 classes"),
        ({"target": ["1", "dog"]}, 422, "twice"),
        ({"target": "1", "top_k": 2}, 422, "one of them"),
        ({"top_k": 11}, 422, "at most 10"),
        ({"n_samples": 0}, 422, "n_samples"),
        ({"n_samples": 2000}, 422, "up to 1024"),
        ({"n_samples": "many"}, 422, "n_samples"),
        ({"tolerance": "nan"}, 422, "tolerance"),
        ({"seed": 2**63}, 422, "seed"),
        ({"deadline_ms": 0}, 422, "deadline_ms"),
        ({"samples": 3}, 422, "samples"),
        ({"image": "x"}, 422, "both"),
    ],
)
def test_options_that_cannot_be_met(http, photo, params, status, word):
    answer = http.post("/v1/explain", params=params, content=photo)
    assert answer.status_code == status and word in answer.json()["detail"]


def broken_images(pixels):
    whole = file_of(pixels)
    yield "nothing", b""
    yield "text", b"hello"
    yield "a png's head", whole[:8]
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        content = file_of(np.tile(pixels, (4, 4, 1)), kind)
        yield f"half a {kind}", content[: len(content) // 2]
    yield "a wrong checksum", whole[:40] + bytes([whole[40] ^ 255]) + whole[41:]
    yield "an svg", b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>"
    yield "postscript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"


def test_invalid_images_are_refused_in_words(http, pixels):
    for what, content in broken_images(pixels):
        answer = http.post("/v1/explain?n_samples=1", content=content)
        assert answer.status_code == (422 if not content else 400), what
        assert len(answer.json()["detail"]) > 10, what


def bomb(side):
    """Return a small PNG file whose header declares side × side pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1000) * 100)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [10_000, 60_000])
def test_images_of_too_many_pixels_are_not_decoded(http, side):
    answer = http.post("/v1/explain", content=bomb(side))
    assert answer.status_code == 413 and "pixels" in answer.json()["detail"]


def test_an_image_ten_thousand_pixels_long_is_explained(http):
    assert http.post("/v1/explain?n_samples=1", content=file_of(np.zeros((8, 10_000, 3), np.uint8))).status_code == 200


def test_other_bodies_are_refused(http, photo):
    assert http.post("/v1/explain", json={"image": "x"}).status_code == 415
    broken = {"content-type": "multipart/form-data"}
    assert http.post("/v1/explain", content=photo, headers=broken).status_code == 400
    unfinished = {"content-type": "multipart/form-data; boundary=x"}
    body = b'--x\r\ncontent-disposition: form-data; name="image"; filename="a"\r\n\r\nabc'
    assert http.post("/v1/explain", content=body, headers=unfinished).status_code in (400, 422)
    assert http.post("/v1/explain", files={"photo": photo}).status_code == 422
    twice = http.post("/v1/explain?n_samples=2", files={"image": photo}, data={"n_samples": "3"})
    assert twice.status_code == 422 and "address" in twice.json()["detail"]
    unknown = http.post("/v1/explain", files={"image": photo}, data={"colour": "red"})
    assert unknown.status_code == 422 and "colour" in unknown.json()["detail"]
    assert http.put("/v1/explain", content=photo).status_code == 405


# KServe v2.


def test_kserve_clients_are_understood(http, photo, pixels, alone):
    assert http.get("/v2").json()["name"] == "dave-fast"
    assert http.get("/v2/health/live").json() == {"live": True}
    assert http.get("/v2/health/ready").status_code == http.get("/v2/models/tiny/ready").status_code == 200
    assert http.get("/v2/models/tiny").json()["outputs"][0]["shape"] == [-1, SIZE, SIZE]
    truth = alone(target=2, n_samples=6).maps[0].numpy()
    images = [
        {"shape": [1], "datatype": "BYTES", "data": [base64.b64encode(photo).decode()]},
        {"shape": list(pixels.shape), "datatype": "UINT8", "data": pixels.ravel().tolist()},
    ]
    for image in images:
        asked = {"id": "7", "inputs": [{"name": "image", **image}], "parameters": {"target": ["2"], "n_samples": 6}}
        told = http.post("/v2/models/tiny/infer", json=asked).json()
        outputs = {output["name"]: output for output in told["outputs"]}
        assert told["id"] == "7" and outputs["targets"]["data"] == [2]
        assert outputs["maps"]["shape"] == [1, SIZE, SIZE]
        assert np.allclose(np.array(outputs["maps"]["data"]).reshape(SIZE, SIZE), truth, atol=1e-7)


@pytest.mark.parametrize(
    ("image", "parameters"),
    [
        ({"shape": [1], "datatype": "BYTES", "data": ["%%%"]}, {}),
        ({"shape": [1], "datatype": "BYTES", "data": [7]}, {}),
        ({"shape": [2, 2, 3], "datatype": "UINT8", "data": [1, 2]}, {}),
        ({"shape": [1, 3, 2, 2], "datatype": "FP32", "data": [0.0] * 12}, {}),
        ({"shape": [1], "datatype": "INT64", "data": [1]}, {}),
        ({"shape": [1, 1, 3], "datatype": "UINT8", "data": [1, 2, 3]}, {"n_samples": -1}),
        ({"shape": [1, 1, 3], "datatype": "UINT8", "data": [1, 2, 3]}, {"image": "x"}),
    ],
)
def test_kserve_requests_that_cannot_be_met(http, image, parameters):
    asked = {"inputs": [{"name": "image", **image}], "parameters": parameters}
    assert http.post("/v2/models/tiny/infer", json=asked).status_code == 422
    assert http.post("/v2/models/absent/infer", json=asked).status_code == 404


PIXEL = {"name": "image", "shape": [1, 1, 3], "datatype": "UINT8", "data": [1, 2, 3]}
ODD_TENSORS = [
    *({"datatype": value} for value in ([], {}, ["UINT8"], None, 5, True, "\ud800", "uint8")),
    *(
        {"shape": value}
        for value in ("\ud800", ["\ud800"], {}, None, "1" * 10**5, [[1]], [1e400], [-1, -1, 3], [2**70])
    ),
    *({"data": value} for value in ([[1]], [None], [True], [1e400], ["1"], [2**70], "123", {"0": 1}, ["\ud800"], [-1])),
    *({"name": value} for value in ("\ud800", 5, [], None)),
    *(
        {"shape": [1, 3, SIZE, SIZE], "datatype": "FP32", "data": [value] * (3 * SIZE * SIZE)}
        for value in (3e38, -3e38, 1.1e6, float("inf"), float("nan"), 1e39)
    ),
]


@pytest.mark.parametrize("changes", ODD_TENSORS, ids=range(len(ODD_TENSORS)))
def test_kserve_tensors_that_are_odd_are_refused_in_words(http, changes, caplog):
    """Strict JSON has no NaN, and Python's has."""
    told = http.post("/v2/models/tiny/infer", content=json.dumps({"inputs": [PIXEL | changes]}))
    assert told.status_code in (400, 413, 422) and told.json()["detail"]
    assert not [record for record in caplog.records if record.exc_info or record.levelname == "ERROR"]


@pytest.mark.parametrize("deep", [15, 17, 30, 500, *range(900, 1000, 4), 2000])
@pytest.mark.parametrize("where", ["parameters", "inputs", "id", "beside"])
def test_kserve_requests_of_any_depth_are_answered_in_words(http, deep, where, caplog):
    nested = "[" * deep + "]" * deep
    pixel, plain = json.dumps(PIXEL), '"parameters": {"n_samples": 1}'
    body = {
        "parameters": f'{{"inputs": [{pixel}], "parameters": {{"x": {nested}}}}}',
        "inputs": f'{{"inputs": [{pixel[:-1]}, "parameters": {nested}}}], {plain}}}',
        "id": f'{{"inputs": [{pixel}], {plain}, "id": {nested}}}',
        "beside": f'{{"inputs": [{pixel}], {plain}, "beside": {nested}}}',
    }[where]
    told = http.post("/v2/models/tiny/infer", content=body)
    assert told.status_code == 422 or (told.status_code == 200 and deep == 15)
    assert not [record for record in caplog.records if record.exc_info or record.levelname == "ERROR"]


@pytest.mark.parametrize("key", ["target", "model", "encoding", "depth", "view", "image", "x", "\ud800"])
def test_kserve_parameters_that_are_no_unicode_are_refused_in_words(http, key, caplog):
    told = http.post("/v2/models/tiny/infer", content=json.dumps({"inputs": [PIXEL], "parameters": {key: "\ud800"}}))
    assert told.status_code == 422 and told.json()["detail"]
    assert not [record for record in caplog.records if record.exc_info or record.levelname == "ERROR"]


# API keys and other origins.


def test_keys_and_origins(photo):
    with serving(api_keys=("secret", "other"), cors_origins=("https://example.org",)) as (address, _):
        with httpx.Client(base_url=address) as http:
            assert http.get("/healthz").status_code == http.get("/metrics").status_code == 200
            for headers in ({}, {"x-api-key": "wrong"}, {"authorization": "Basic secret"}):
                assert http.post("/v1/explain?n_samples=1", content=photo, headers=headers).status_code == 401
                assert http.get("/v2/models/tiny", headers=headers).status_code == 401
            for headers in ({"x-api-key": "other"}, {"authorization": "Bearer secret"}):
                assert http.post("/v1/explain?n_samples=1", content=photo, headers=headers).status_code == 200
            allowed = http.get("/healthz", headers={"origin": "https://example.org"})
            assert allowed.headers["access-control-allow-origin"] == "https://example.org"
            assert "access-control-allow-origin" not in http.get("/healthz", headers={"origin": "https://x.y"}).headers
        with Client(address, api_key="secret") as client:
            assert client.explain(photo, n_samples=1).samples == 1
        with Client(address) as client, pytest.raises(ServerError, match="key"):
            client.models()


# The client.


def test_the_client_explains_paths_bytes_pictures_and_pixels(server, photo, pixels, alone, tmp_path):
    (tmp_path / "x.png").write_bytes(photo)
    truth = alone(target=1, n_samples=5, seed=2)
    with Client(server[0]) as client:
        assert client.ready() and client.models()[0]["name"] == "tiny"
        for picture in (tmp_path / "x.png", str(tmp_path / "x.png"), photo, Image.fromarray(pixels), pixels):
            told = client.explain(picture, "dog", n_samples=5, seed=2)
            assert np.array_equal(told.maps, truth.maps.numpy()) and told.final
        several = client.explain(photo, [1, "cat"], n_samples=5)
        assert several.targets == [1, 0] and several.class_names == ["dog", "cat"] and len(several.top) == 5
        assert several.error_bound == float("inf")
        with pytest.raises(ServerError, match="no class") as refused:
            client.explain(photo, "zebra")
        assert refused.value.status == 422
        with pytest.raises(InputError, match="cannot read"):
            client.explain(tmp_path / "absent.png")
        with pytest.raises(InputError, match="uint8"):
            client.explain(pixels.astype(np.float32))


def test_the_client_streams(server, photo):
    with Client(server[0]) as client:
        updates = list(client.stream(photo, n_samples=60))
        assert [update.final for update in updates] == [False] * (len(updates) - 1) + [True]
        assert updates[-1].samples == 60 and len(updates) > 2
        with pytest.raises(ServerError, match="404"):
            list(client.stream(photo, model="absent"))


def test_the_asynchronous_client_does_the_same(server, photo):
    async def ask():
        async with AsyncClient(server[0]) as client:
            assert await client.ready() and len(await client.models()) == 2
            many = await asyncio.gather(*(client.explain(photo, i, n_samples=4) for i in range(10)))
            updates = [update async for update in client.stream(photo, n_samples=30)]
            return many, updates

    many, updates = asyncio.run(ask())
    assert [one.targets for one in many] == [[i] for i in range(10)]
    assert updates[-1].final and updates[-1].samples == 30


class Script(httpx.BaseTransport):
    """A transport that gives prepared answers: statuses with Retry-After, or errors."""

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), 0

    def handle_request(self, request):
        self.asked += 1
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        status, headers, told = answer
        return httpx.Response(status, headers=headers, json=told)


BUSY = (429, {"retry-after": "2"}, {"detail": "the queue is full"})


@pytest.fixture
def scripted(monkeypatch):
    """Return a function that makes a client with prepared answers: client, seconds that it slept, transport."""
    slept = []
    monkeypatch.setattr("dave_fast.client.time.sleep", slept.append)

    def make(*answers, **settings):
        client = Client("http://nowhere", **settings)
        client._http = httpx.Client(base_url="http://nowhere", transport=Script(*answers))
        return client, slept, client._http._transport

    return make


def test_the_client_waits_as_it_is_told_and_tries_again(scripted):
    client, slept, script = scripted(BUSY, httpx.ConnectError("refused"), (503, {}, {"detail": "x"}), (200, {}, []))
    assert client.models() == []
    assert script.asked == 4 and 2 <= slept[0] <= 3
    assert 0 <= slept[1] <= 0.2 and 0 <= slept[2] <= 0.4


def test_the_client_gives_up_when_it_was_told_so_or_time_is_over(scripted):
    client, slept, script = scripted(*[BUSY] * 3, retries=2)
    with pytest.raises(ServerError, match="full") as refused:
        client.models()
    assert script.asked == 3 and refused.value.retry_after == 2
    client, slept, script = scripted(BUSY, timeout=1.0)
    slept.clear()
    with pytest.raises(ServerError, match="full"):
        client.models()
    assert script.asked == 1 and not slept
    client, _, script = scripted((422, {}, {"detail": "no"}))
    with pytest.raises(ServerError, match="422: no"):
        client.models()
    assert script.asked == 1


def test_a_busy_server_refuses_and_says_when_to_come_again(photo):
    limits = Limits(requests=2)
    with serving(limits, [serve_model(rows=2)]) as (address, service):

        async def ask():
            async with AsyncClient(address, retries=0) as client:
                return await asyncio.gather(
                    *(client.explain(photo, n_samples=300) for _ in range(12)), return_exceptions=True
                )

        told = asyncio.run(ask())
        refused = [error for error in told if isinstance(error, ServerError)]
        assert refused and len(told) - len(refused) >= 2
        assert all(error.status == 429 and error.retry_after >= 1 for error in refused)
        assert "full" in refused[0].detail
        with Client(address, timeout=60) as client:
            assert client.explain(photo, n_samples=2).samples == 2
        assert service.scheduler.requests <= 1
