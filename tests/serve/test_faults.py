"""Tests of faults: clients that disconnect, are slow or send wrong headers, workers that fail, and shutdown."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace

import httpx
import pytest
import torch
from typer.testing import CliRunner

from dave_fast.cli import app as cli
from dave_fast.client import Client, ServerError
from dave_fast.engine.levels import Pulled
from dave_fast.errors import InputError, NonFiniteError
from dave_fast.serve.api import EventResponse
from dave_fast.serve.limits import Limits
from dave_fast.serve.schemas import MOST_DEPTHS
from tests.serve.tiny_server import PATIENCE, serve_model, serving, until


def connect(address):
    host, port = address.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=PATIENCE)


def head(length, path="/v1/explain?n_samples=1000"):
    return f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: image/png\r\ncontent-length: {length}\r\n\r\n".encode()


QUICK = Limits(header_seconds=0.4, upload_seconds=0.6, body_bytes=1 << 20)


@pytest.fixture(scope="module")
def quick():
    """Serve with short time limits and small upload limits; yield the address and the service."""
    with serving(QUICK, [serve_model(rows=2)]) as served:
        yield served


def held(address):
    """Return the requests, rows and bytes that the queue still counts."""
    _, service = address
    scheduler = service.scheduler
    return scheduler.requests, scheduler.rows, scheduler.bytes


def test_a_client_that_vanishes_mid_upload_leaves_nothing(quick, photo):
    for cut in (0, 1, len(photo) // 2):
        with connect(quick[0]) as client:
            client.sendall(head(len(photo)) + photo[:cut])
    assert held(quick) == (0, 0, 0)
    with Client(quick[0]) as client:
        assert client.explain(photo, n_samples=2).samples == 2


def test_a_client_that_vanishes_while_it_waits_frees_its_rows(quick, photo):
    with connect(quick[0]) as client:
        client.sendall(head(len(photo)) + photo)
        until(lambda: quick[1].scheduler.requests == 1)
    until(lambda: held(quick) == (0, 0, 0))
    assert quick[1].metrics.cancelled._value.get() >= 1


def test_a_client_that_vanishes_mid_stream_frees_its_rows(quick, photo):
    with connect(quick[0]) as client:
        client.sendall(head(len(photo), "/v1/explain/stream?n_samples=1000") + photo)
        seen = b""
        while b"event: maps" not in seen:
            seen += client.recv(65536)
    until(lambda: held(quick) == (0, 0, 0))


def test_leaving_a_stream_of_the_client_frees_its_rows(quick, photo):
    with Client(quick[0]) as client:
        for update in client.stream(photo, n_samples=1000):
            assert not update.final
            break
        until(lambda: held(quick) == (0, 0, 0))


@pytest.mark.parametrize("sent", [b"", b"GET /healthz HT", b"GET /healthz HTTP/1.1\r\nhost: x\r\n"])
def test_slow_headers_are_cut_off(quick, sent):
    with connect(quick[0]) as client:
        client.sendall(sent)
        answer = b""
        while piece := client.recv(65536):
            answer += piece
        assert b" 408 " in answer


def test_slow_headers_on_a_connection_that_was_used_are_cut_off_too(quick):
    with connect(quick[0]) as client:
        client.sendall(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b"200 OK" in client.recv(65536)
        client.sendall(b"GET /hea")
        answer = b""
        while piece := client.recv(65536):
            answer += piece
        assert b" 408 " in answer


def test_slow_bodies_are_cut_off_though_a_byte_comes_now_and_then(quick, photo):
    with connect(quick[0]) as client:
        client.sendall(head(len(photo)))
        answer, sent = b"", 0
        client.settimeout(0.05)
        while b"\r\n\r\n" not in answer and sent < len(photo) - 1:
            try:
                client.sendall(photo[sent : sent + 1])
                answer += client.recv(65536)
            except TimeoutError:
                pass
            sent += 1
        assert b" 408 " in answer


def test_bodies_that_are_too_large_are_not_read(quick):
    with connect(quick[0]) as client:
        client.sendall(head(10**12))
        assert b" 413 " in client.recv(65536)
    with httpx.Client(base_url=quick[0]) as http:
        # without a declared length, and with one
        pieces = (bytes(1 << 18) for _ in range(8))
        with suppress(httpx.WriteError):
            assert http.post("/v1/explain", content=pieces).status_code == 413
        large = {"inputs": [{"name": "image", "shape": [1], "datatype": "BYTES", "data": ["A" * (1 << 21)]}]}
        with suppress(httpx.WriteError):
            assert http.post("/v2/models/tiny/infer", content=json.dumps(large)).status_code == 413


def test_many_uploads_at_once_are_refused_before_memory_is_short():
    """Two slow uploads exceed the limit together: one is refused with Retry-After, the other times out."""
    size, limits = 1 << 20, replace(QUICK, memory_bytes=3 << 20)
    with serving(limits) as (address, _), connect(address) as first, connect(address) as second:
        for client in (first, second):
            client.sendall(head(size) + bytes(900_000))
        # the server may read either one first
        refused, late = sorted(
            (client.recv(65536) for client in (first, second)), key=lambda told: b" 503 " not in told
        )
    assert b" 503 " in refused and b"retry-after" in refused.lower()
    assert b" 408 " in late


def test_garbage_is_no_request(quick):
    with connect(quick[0]) as client:
        client.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 this is no HTTP\r\n\r\n")
        assert b" 400 " in client.recv(65536)


def test_a_broken_engine_answers_500_and_the_next_request_is_served(photo, monkeypatch, caplog):
    model = serve_model()
    honest, broken = model.explainers[0].samples, []

    def samples(images, draws, targets, levels):
        if broken:
            raise broken[-1]
        return honest(images, draws, targets, levels)

    monkeypatch.setattr(model.explainers[0], "samples", samples)
    with serving(models=[model]) as (address, _), Client(address, retries=0) as client:
        broken.append(ArithmeticError("a sum in a secret place"))
        with pytest.raises(ServerError, match="ArithmeticError") as failed:
            client.explain(photo, n_samples=2)
        assert failed.value.status == 500 and "secret" not in failed.value.detail
        with pytest.raises(ServerError, match="500"):
            list(client.stream(photo, n_samples=2))
        broken.append(MemoryError("out of memory in a secret place"))
        with pytest.raises(ServerError, match="memory ran out") as failed:
            client.explain(photo, n_samples=2)
        assert failed.value.status == 503 and failed.value.retry_after
        broken.clear()
        assert client.explain(photo, n_samples=2).samples == 2


def test_nan_is_an_error_and_never_a_map(photo, monkeypatch):
    model = serve_model()
    monkeypatch.setattr(
        model.explainers[0],
        "samples",
        lambda images, draws, targets, levels: Pulled(torch.full((1, len(draws), 3, 32, 32), torch.nan), ()),
    )
    with serving(models=[model]) as (address, _), Client(address, retries=0) as client:
        with pytest.raises(ServerError, match="NaN") as failed:
            client.explain(photo, n_samples=2)
        assert failed.value.status == 500


CHUNKED = b"host: x\r\ncontent-type: image/png\r\ntransfer-encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("line", "then"),
    [
        (b"GET /openapi.json HTTP/1.1\r\n" + CHUNKED, b"no chunk\r\n"),
        (b"POST /nowhere HTTP/1.1\r\n" + CHUNKED, b"no chunk\r\n"),
        (b"POST /v1/models HTTP/1.1\r\n" + CHUNKED + b"5\r\nhello\r\n", b"-1\r\n"),
        (b"GET /v1/explain/stream?n_samples=1024&image=ID HTTP/1.1\r\n" + CHUNKED, b"no chunk\r\n"),
        (b"GET /v1/explain/stream?n_samples=1024&image=ID HTTP/1.1\r\n" + CHUNKED, b"f" * 40 + b"\r\n"),
        (b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n", b"\0\r\n\r\n"),
    ],
)
def test_bytes_that_are_no_http_amid_or_behind_an_answer_end_the_connection(server, photo, line, then, caplog):
    address, service = server
    image = httpx.post(f"{address}/v1/images", content=photo, headers={"content-type": "image/png"}).json()["image"]
    with connect(address) as client:
        client.sendall(line.replace(b"ID", image.encode()))
        read = client.recv(1 << 16)
        assert read.startswith(b"HTTP/1.1 ")
        client.sendall(then)
        with suppress(ConnectionResetError):
            while piece := client.recv(1 << 16):
                read += piece
    until(lambda: not service.jobs())
    wrong = [record.getMessage() for record in caplog.records if record.levelname == "ERROR" or record.exc_info]
    assert not wrong and httpx.get(f"{address}/healthz").status_code == 200


@pytest.mark.parametrize(
    "path",
    [b"/nowhere", b"/healthz", b"/readyz", b"/metrics", b"/v1/models", b"/v1/explain?n_samples=x", b"/openapi.json"],
)
def test_bytes_that_are_no_http_in_one_packet_with_a_request_leave_no_traceback(server, path, caplog):
    with connect(server[0]) as client:
        client.sendall(b"GET " + path + b" HTTP/1.1\r\n" + CHUNKED + b"no chunk\r\n")
        read = b""
        while piece := client.recv(1 << 16):
            read += piece
    assert read.startswith(b"HTTP/1.1 400 ") and read.count(b"HTTP/1.1 ") == 1
    assert httpx.get(f"{server[0]}/healthz").status_code == 200
    assert not [record.getMessage() for record in caplog.records if record.levelname == "ERROR" or record.exc_info]


@pytest.mark.parametrize("sends", [b"100001\r\n" + bytes(0x100001) + b"\r\n", b""], ids=["too much", "nothing"])
def test_a_body_that_goes_wrong_amid_the_answer_ends_the_connection(quick, photo, sends, caplog):
    address, service = quick
    image = httpx.post(f"{address}/v1/images", content=photo, headers={"content-type": "image/png"}).json()["image"]
    with connect(address) as client, suppress(ConnectionError):
        client.sendall(f"GET /v1/explain/stream?n_samples=1024&image={image} HTTP/1.1\r\n".encode() + CHUNKED)
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
        client.sendall(sends)
        while client.recv(1 << 16):
            pass
    until(lambda: not service.jobs())
    wrong = [record.getMessage() for record in caplog.records if record.levelname == "ERROR" or record.exc_info]
    assert not wrong and httpx.get(f"{address}/healthz").status_code == 200


def test_an_answer_that_is_not_read_is_held_in_the_account_until_it_is_or_its_time_is_up(photo):
    """4 MB of maps, of which the system's buffers take a part only."""
    with serving(Limits(upload_seconds=3), [serve_model()]) as (address, service):
        depths = ",".join(["pixels"] * MOST_DEPTHS)
        request = head(len(photo), f"/v1/explain?n_samples=1&top_k=10&depth={depths}") + photo
        request = request.replace(b"content-type", b"accept: application/x-npy\r\ncontent-type")
        host, port = address.removeprefix("http://").split(":")
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.settimeout(PATIENCE)
            client.connect((host, int(port)))
            client.sendall(request)
            client.recv(1)
            answers = service.metrics.answers.labels("tiny", "samples")._value
            until(lambda: answers.get() and not service.jobs())
            assert service.account.now > 3 << 20
            until(lambda: service.account.now == 0)


@pytest.fixture
def stuck(monkeypatch):
    """Let maps wait until the event that this returns is set."""
    go_on = threading.Event()

    def wait(*_):
        assert go_on.wait(PATIENCE)
        raise NonFiniteError("nobody waits for this map any more")

    monkeypatch.setattr("dave_fast.serve.maps.make_class", wait)
    yield go_on
    go_on.set()


TIMED = Limits(answer_seconds=0.3, upload_seconds=60)


def test_maps_that_are_not_made_in_time_are_answered_with_504(stuck, photo, caplog):
    with serving(TIMED) as (address, service), Client(address, retries=0) as client:
        with pytest.raises(ServerError, match=r"not made in 0.6 s; ask for fewer classes") as failed:
            client.explain(photo, n_samples=2)
        assert failed.value.status == 504
        with pytest.raises(ServerError, match=r"504.*not made in 0.6 s"):
            list(client.stream(photo, n_samples=2))
        until(lambda: not service.jobs())
        stuck.set()
    assert not [record for record in caplog.records if record.levelname == "ERROR" or record.exc_info]


@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
def test_a_stream_that_is_read_too_slowly_ends_with_its_connection(spec_version):
    ended, left = asyncio.Event(), []

    async def events():
        while True:
            yield b": waiting\n\n"

    async def receive():
        await ended.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        await asyncio.sleep(0.01)

    connection = SimpleNamespace(transport=SimpleNamespace(abort=ended.set))
    scope = {"type": "http", "asgi": {"spec_version": spec_version}, "state": {"connection": connection}}
    response = EventResponse(events(), lambda: left.append(ended.is_set()), 0.1)
    asyncio.run(asyncio.wait_for(response(scope, receive, send), PATIENCE))
    assert left == [True]


@pytest.mark.parametrize("error", [TimeoutError("of the model"), RuntimeError("broken")])
def test_an_error_amid_a_stream_is_not_taken_for_a_slow_client(error):
    left = []

    async def events():
        yield b": waiting\n\n"
        raise error

    async def receive():
        await asyncio.sleep(PATIENCE)

    async def send(message):
        pass

    scope = {"type": "http", "asgi": {"spec_version": "2.3"}, "state": {"connection": None}}
    with pytest.raises((type(error), ExceptionGroup)) as raised:
        asyncio.run(EventResponse(events(), lambda: left.append(True), PATIENCE)(scope, receive, send))
    assert error in (raised.value, *getattr(raised.value, "exceptions", ())) and left == [True]


# Shutdown.


def test_maps_that_are_not_made_at_the_shutdown_are_answered_with_504(stuck, photo, caplog):
    told = []

    def ask():
        with Client(address, retries=0) as client, pytest.raises(ServerError) as failed:
            client.explain(photo, n_samples=2)
        told.append((failed.value.status, failed.value.detail))
        stuck.set()

    asking = threading.Thread(target=ask)
    with serving(Limits(drain_seconds=0.2)) as (address, service):
        asking.start()
        until(lambda: any(job.making for job in service.jobs()))
    asking.join(PATIENCE)
    assert told == [(504, "the server was shut down.")]
    assert not [record for record in caplog.records if record.levelname == "ERROR" or record.exc_info]


@pytest.fixture
def process(tmp_path):
    """Return a function that starts `dave-fast serve demo`: address, process and path of the log."""
    started = []

    def start(*options):
        command = [sys.executable, "-m", "dave_fast", "serve", "demo", "--port", "0", "--precision", "fp32", *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with open(tmp_path / "log", "w") as log:
            server = subprocess.Popen(command, stderr=log, stdout=log, env=environment)
        started.append(server)
        told = ""

        def listens():
            nonlocal told
            assert server.poll() is None, told
            told = (tmp_path / "log").read_text()
            return '"listening"' in told

        until(listens)
        return told.split('"address": "')[1].split('"')[0], server, tmp_path / "log"

    yield start
    for server in started:
        if server.poll() is None:
            server.kill()
        server.wait()


def test_sigterm_answers_what_was_accepted_and_refuses_the_rest(process, photo):
    address, server, log = process("--drain-seconds", "60", "--max-requests", "8")
    answers, statuses = [], []

    def ask():
        with Client(address, retries=0, timeout=PATIENCE) as client:
            answers.append(client.explain(photo, n_samples=100))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    with httpx.Client(base_url=address) as http:
        until(lambda: "dave_fast_queued_requests 4.0" in http.get("/metrics").text)
        server.send_signal(signal.SIGTERM)
        until(lambda: http.get("/readyz").status_code == 503)
        assert http.get("/healthz").status_code == 200
        refused = http.post("/v1/explain", content=photo)
        statuses.append((refused.status_code, refused.headers.get("retry-after")))
    for thread in threads:
        thread.join()
    assert server.wait(timeout=PATIENCE) == 0
    assert statuses == [(503, "1")]
    assert [answer.samples for answer in answers] == [100] * 4 and not any(answer.cut_short for answer in answers)
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    assert any(line["message"] == "draining" and line["open"] == 4 for line in lines)
    assert sum(line.get("route") == "/v1/explain" and line["status"] == 200 for line in lines) == 4


def test_at_the_drain_deadline_answers_have_the_samples_that_are_there(process, photo):
    address, server, _ = process("--drain-seconds", "0.5")
    with Client(address, retries=0, timeout=PATIENCE) as client:
        updates = client.stream(photo, n_samples=1024)
        next(updates)
        server.send_signal(signal.SIGTERM)
        last = list(updates)[-1]
    assert last.cut_short == "shutdown" and 1 <= last.samples < 1024
    assert server.wait(timeout=PATIENCE) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_second_signal_ends_it_at_once_with_the_code_that_shells_give(process, photo, number):
    address, server, log = process("--drain-seconds", str(PATIENCE))
    with Client(address, retries=0, timeout=PATIENCE) as client:
        updates = client.stream(photo, n_samples=1024)
        next(updates)
        server.send_signal(number)
        until(lambda: '"draining"' in log.read_text())
        server.send_signal(number)
        assert server.wait(timeout=PATIENCE) == 128 + number
        with pytest.raises((ServerError, httpx.HTTPError)):
            list(updates)
    told = [json.loads(line)["message"] for line in log.read_text().splitlines() if line.startswith("{")]
    assert told[-1] == "ended at once, by a second signal" and "Traceback" not in log.read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_it_serves_ends_it_with_exit_code_0(tmp_path, number):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    def is_bound():
        assert server.poll() is None, (tmp_path / "log").read_text()
        with socket.socket() as other, suppress(OSError):
            other.bind(("127.0.0.1", port))
            return False
        return True

    with open(tmp_path / "log", "w") as log:
        command = [sys.executable, "-m", "dave_fast", "serve", "demo", "--port", str(port)]
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        until(is_bound)
        server.send_signal(number)
        assert server.wait(timeout=PATIENCE) == 0
    finally:
        server.kill()
        server.wait()
    lines = [json.loads(line)["message"] for line in (tmp_path / "log").read_text().splitlines()]
    assert lines[-1] == "ended while it started" and lines[:-1] in ([], ["model: demo"])


def test_a_port_that_is_taken_is_told_before_a_model_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "dave_fast", "serve", "absent", "--port", port]
        second = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert second.returncode == 2 and "address already in use" in second.stderr and "--port" in second.stderr


def test_options_that_cannot_be_met_are_told(tmp_path):
    def refused(*options):
        return CliRunner().invoke(cli.app, ["serve", "--port", "0", *options])

    (tmp_path / "empty").write_text("\n")
    for options, word in (
        (["absent-model"], "timm has no model"),
        (["demo", "--device", "tpu"], "tpu"),
        (["--api-keys", str(tmp_path / "none")], "cannot read the API keys"),
        (["--api-keys", str(tmp_path / "empty")], "has no API key"),
        (["--host", "203.0.113.1"], "cannot listen"),
    ):
        result = refused(*options)
        assert result.exit_code == 2 and word in result.output, options


@pytest.mark.parametrize(
    ("options", "expected"),
    [([], (None, True)), (["--noise-alpha", "0.3", "--no-shrink"], (0.3, False)), (["--shrink"], (None, True))],
)
def test_settings_of_the_method_reach_the_models(monkeypatch, options, expected):
    given = {}

    def load(names, devices, **settings):
        given.update(settings)
        raise InputError("no model is loaded here")

    monkeypatch.setattr("dave_fast.serve.models.load_models", load)
    result = CliRunner().invoke(cli.app, ["serve", "--port", "0", *options])
    assert "no model is loaded here" in result.output
    assert (given["noise_alpha"], given["shrink"]) == expected


def test_a_missing_package_is_told_with_what_installs_it(monkeypatch):
    for name in list(sys.modules):
        if name.startswith("dave_fast.serve."):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    result = CliRunner().invoke(cli.app, ["serve", "--port", "0"])
    assert result.exit_code == 2 and "pip install '.[serve]'" in result.output
