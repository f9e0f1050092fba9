"""Tests of attacks on the server, one at a time: what each is told, and that the others do not notice it.

`test_hostile_soak` has them all at once.
"""

from __future__ import annotations

import asyncio
import random
import socket
import time
from collections.abc import Iterator

import httpx
import pytest

from dave_fast.serve.limits import Limits
from dave_fast.serve.service import Service
from tests.serve import hostile_bodies as bodies
from tests.serve.hostile import (
    BUSY,
    GET_OPENAPI,
    REFUSED,
    SHORT,
    UPLOADS,
    Connection,
    Outcome,
    exchange,
    open_connections,
    request,
)
from tests.serve.server_process import ServerProcess, serving_process
from tests.serve.tiny_server import serving

# Seconds of /healthz, and mebibytes of the server, that one request may cost; a picture is refused within PICTURE_S.
HEALTHZ_S, GROWTH_MIB, PICTURE_S = 0.5, 300, 5.0
GET_HEALTHZ = b"GET /healthz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
# The statuses of a client's own mistake.
MISTAKE = frozenset(status for status in REFUSED - BUSY if status < 500)


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Serve the demo model from a process of its own, with all that it starts at the first requests started."""
    with serving_process(tmp_path_factory.mktemp("attacks")) as server:
        ask = request(SHORT, bodies.photo())
        asyncio.run(_together(*(exchange(server.port, ask) for _ in range(8))))
        yield server


async def _together(*given):
    return await asyncio.gather(*given)


@pytest.fixture
def server(process: ServerProcess) -> Iterator[ServerProcess]:
    """The server, whose log has no new error after the test."""
    before = len(process.lines())
    yield process
    wrong = [line for line in process.lines()[before:] if "Traceback" in line or not line.startswith("{")]
    # of a traceback its last lines
    assert not wrong, "tracebacks, or lines that are no JSON, in the log:\n" + "\n".join(line[-300:] for line in wrong)


def attacked(port: int, content: bytes) -> tuple[Outcome, float, float]:
    """Send a request; return its outcome, its seconds, and the longest that /healthz took meanwhile."""

    async def attack() -> tuple[Outcome, float, float]:
        began, longest = time.monotonic(), 0.0
        task = asyncio.create_task(exchange(port, content, 30))
        while not task.done():
            asked = time.monotonic()
            status = await exchange(port, GET_HEALTHZ, 30)
            longest = max(longest, time.monotonic() - asked)
            assert status == 200, f"/healthz: {status}"
            await asyncio.wait((task,), timeout=0.02)
        return task.result(), time.monotonic() - began, longest

    return asyncio.run(attack())


PICTURES = bodies.THIN | bodies.BOMBS


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_that_grow_are_refused_before_they_do(server, name):
    content = request(SHORT, PICTURES[name]())
    server.forget_peak()
    before = server.mebibytes()
    outcome, seconds, _ = attacked(server.port, content)
    grown = server.mebibytes("VmHWM") - before
    assert outcome in MISTAKE, f"{outcome}; expected 4xx. {grown:.0f} MiB more, {seconds:.1f} s"
    assert grown < GROWTH_MIB, f"{grown:.0f} MiB more"
    assert seconds < PICTURE_S, f"refused after {seconds:.1f} s"


@pytest.mark.parametrize("name", bodies.ODD)
def test_pictures_that_are_odd_do_not_grow(server, name):
    content = request(SHORT, bodies.ODD[name]())
    server.forget_peak()
    before = server.mebibytes()
    outcome, seconds, _ = attacked(server.port, content)
    grown = server.mebibytes("VmHWM") - before
    assert outcome in MISTAKE | {200}, f"{outcome}; expected 200 or 4xx. {grown:.0f} MiB more, {seconds:.1f} s"
    assert grown < GROWTH_MIB, f"{grown:.0f} MiB more"
    assert seconds < PICTURE_S, f"answered after {seconds:.1f} s"


@pytest.mark.parametrize("seed", range(12))
def test_pictures_with_changed_bytes_are_answered_or_refused(server, seed):
    rng = random.Random(seed)
    for _ in range(6):
        outcome = asyncio.run(exchange(server.port, request(SHORT, bodies.mutated(rng))))
        assert outcome in MISTAKE | {200}, f"{outcome}; expected 200 or 4xx"


@pytest.mark.parametrize("name", bodies.JSON)
def test_json_that_takes_long_to_parse_keeps_nobody_waiting(server, name):
    outcome, _, longest = attacked(
        server.port, request("/v2/models/demo/infer", bodies.JSON[name](), "application/json")
    )
    assert longest < HEALTHZ_S, f"/healthz took {longest:.1f} s; the request itself: {outcome}"
    assert outcome in REFUSED | {"cut"}, f"{outcome}; expected 4xx, 503 or an end"


@pytest.mark.parametrize("name", bodies.SLOW)
def test_pictures_that_take_long_to_decode_keep_nobody_waiting(server, name):
    outcome, seconds, longest = attacked(server.port, request(f"{SHORT}&deadline_ms=500", bodies.SLOW[name]()))
    assert longest < HEALTHZ_S, f"/healthz took {longest:.1f} s; the request itself: {outcome}"
    assert outcome in REFUSED | {200, 504}, f"{outcome}; expected 200, 4xx, 503 or 504"
    # the deadline, and time to send, to refuse and to be late on a busy machine
    assert seconds < 3, f"answered {outcome} after {seconds:.1f} s, by a deadline of 0.5 s"


@pytest.mark.parametrize("name", bodies.FORMS)
def test_forms_of_odd_shape_are_refused(server, name):
    content_type, make = bodies.FORMS[name]
    outcome, _, longest = attacked(server.port, request(SHORT, make(), content_type))
    # a head that is refused while its body still comes may be cut off
    assert outcome in MISTAKE | {"cut"}, f"{outcome}; expected 4xx or an end"
    assert longest < HEALTHZ_S, f"/healthz took {longest:.1f} s; the request itself: {outcome}"


@pytest.mark.parametrize("name", bodies.QUERIES)
@pytest.mark.parametrize("path", ["/v1/explain", "/v1/explain/stream"])
def test_numbers_and_names_that_are_none_are_refused(server, path, name):
    query = f"{path}?{bodies.QUERIES[name]}"
    outcome = asyncio.run(exchange(server.port, request(query, bodies.photo())))
    assert outcome in MISTAKE, f"{outcome}; expected 4xx"


@pytest.mark.parametrize("name", bodies.GARBAGE)
def test_garbage_is_refused(server, name):
    outcome = asyncio.run(exchange(server.port, bodies.GARBAGE[name](), 30))
    # 200: a server may take a request without a host, or one to an address elsewhere
    assert outcome in REFUSED | {200, "cut"}, f"{outcome}; expected 200, a refusal or an end"


# Connections that never read, or stall.

# Seconds: twice `answer_seconds` and `upload_seconds` for a stream, 5 s in which uvicorn waits for another request, and
# as many for a process that is busy with all of these at once.
GONE_S = 14.0
PHOTO = bodies.photo()
NPZ = request("/v1/explain?n_samples=1", PHOTO).replace(b"host: x\r\n", b"host: x\r\naccept: application/x-npz\r\n")
EXPECT = UPLOADS["explain"].split(b"\r\n\r\n")[0] + b"\r\nexpect: 100-continue\r\n\r\n"
# What is sent at once, and what comes after it.
STALLS = {
    "documents that are not read": (GET_OPENAPI * 100, "wait"),
    "metrics that are not read": (b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n" * 1000, "wait"),
    "pages that are not read": (b"GET / HTTP/1.1\r\nhost: x\r\n\r\n" * 200, "wait"),
    "a stream that is not read": (request("/v1/explain/stream?n_samples=1024", PHOTO), "wait"),
    "streams that are not read": (request("/v1/explain/stream?n_samples=64", PHOTO) * 5, "wait"),
    "arrays that are not read": (NPZ * 20, "wait"),
    "refusals that are not read": (request("/v1/explain?n_samples=0", PHOTO) * 100, "wait"),
    "documents read byte by byte": (GET_OPENAPI * 100, "read slowly"),
    "documents of a client that sends no more": (GET_OPENAPI * 100, "end"),
    **{f"a stalled upload: {name}": (content, "wait") for name, content in UPLOADS.items() if name != "megabytes"},
    "an upload byte by byte": (UPLOADS["explain"], "send slowly"),
    "chunks byte by byte": (UPLOADS["chunks"], "send slowly"),
    "headers byte by byte": (b"GET /healthz HTTP/1.1\r\nx: ", "send slowly"),
    "half a request": (b"GET /heal", "wait"),
    "nothing": (b"", "wait"),
    "nothing and an end": (b"", "end"),
    "nothing after an answer": (b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n", "wait"),
    "half a request after an answer": (b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\nGET /heal", "wait"),
    "100-continue and no body": (EXPECT, "wait"),
}


async def stall(port: int, content: bytes, then: str) -> float:
    """Send bytes, do not read, and return the seconds after which the server has ended the connection."""
    began = time.monotonic()
    loop = asyncio.get_running_loop()
    async with Connection(port, receive_buffer=4096) as connection:

        async def go_on() -> None:
            await connection.send(content)
            while then == "send slowly":
                await asyncio.sleep(0.1)
                await connection.send(b"0")
            while then == "read slowly":
                await asyncio.sleep(0.1)
                await loop.sock_recv(connection.socket, 1)
            if then == "end":
                connection.socket.shutdown(socket.SHUT_WR)

        going = asyncio.create_task(go_on())
        told = await connection.ended(GONE_S + 4)
        going.cancel()
        await asyncio.gather(going, return_exceptions=True)
    return time.monotonic() - began if told == "cut" else float("inf")


@pytest.fixture(scope="module")
def stalled() -> Iterator[tuple[dict[str, float], list[float]]]:
    """Stall in all ways at once; yield the seconds that each connection was open, and those of /healthz meanwhile."""
    limits = Limits(header_seconds=0.5, upload_seconds=1.0, answer_seconds=2.0)

    async def run(port: int) -> tuple[dict[str, float], list[float]]:
        probes = []
        stalls = asyncio.gather(*(stall(port, content, then) for content, then in STALLS.values()))
        while not stalls.done():
            asked = time.monotonic()
            assert await exchange(port, GET_HEALTHZ, 30) == 200
            probes.append(time.monotonic() - asked)
            await asyncio.sleep(0.1)
        return dict(zip(STALLS, stalls.result(), strict=True)), probes

    with serving(limits) as (address, _):
        port = int(address.rsplit(":", 1)[1])
        yield asyncio.run(run(port))
        assert not open_connections(port)(), "connections are left whose clients are gone"


@pytest.mark.parametrize("name", STALLS)
def test_connections_that_never_read_or_stall_are_ended(stalled, name):
    assert stalled[0][name] < GONE_S, f"the connection was open for {stalled[0][name]:.1f} s"


def test_connections_that_never_read_or_stall_keep_nobody_waiting(stalled):
    # this process runs the server, its model and all of the clients
    assert sorted(stalled[1])[int(0.95 * len(stalled[1]))] < HEALTHZ_S


# Stored images.

KIBIBYTE = 1 << 10
MEMORY, LARGEST, STORED_S = 8 << 20, 1 << 20, 0.5
# The sizes, in KiB, of the images that one client stores: together more than what may be held.
STORES = {
    "most of few": [1023] * 12,
    "halves": [512] * 24,
    "thirds": [680] * 18,
    "quarters": [256] * 40,
    "hundreds": [100] * 90,
    "small ones": [32] * 260,
    "the smallest": [8] * 390,
    "halved each time": [1023 >> n for n in range(7)] * 8,
    "doubled each time": [8 << n for n in range(7)] * 8,
    "small, then large": [8] * 50 + [1000] * 10,
    "large, then small": [1000] * 10 + [8] * 50,
    "by chance": random.Random(0).choices(range(8, 1000), k=36),
}


@pytest.fixture(scope="module")
def storing() -> Iterator[tuple[str, Service]]:
    """Serve with little memory, and stored images for a short time; yield the address and the service."""
    limits = Limits(memory_bytes=MEMORY, body_bytes=LARGEST, stored_seconds=STORED_S, stored_images=400)
    with serving(limits) as served:
        yield served


def padded(photo: bytes, size: int) -> bytes:
    """Return a picture with bytes behind its end, which are stored with it."""
    return photo + bytes(size - len(photo))


@pytest.mark.parametrize("name", STORES)
def test_stored_images_leave_room_for_others_and_expire_by_the_clock(storing, photo, name):
    address, service = storing
    before = service.account.now
    with httpx.Client(base_url=address) as http:
        stored = [http.post("/v1/images", content=padded(photo, size * KIBIBYTE)) for size in STORES[name]]
        told = {f"{size} bytes": _asked(http, padded(photo, size)) for size in (len(photo), 64_000, 250_000, LARGEST)}
        told["to store"] = http.post("/v1/images", content=padded(photo, 64_000)).status_code
        assert set(told.values()) == {200}, f"others, while images are stored: {told}"
        # nobody asks the server for anything meanwhile
        time.sleep(STORED_S + 0.1)
        assert service.account.now == before, "bytes are held though all images have expired"
        last = [answer.json()["image"] for answer in stored if answer.status_code == 200][-1]
        assert http.get(f"/v1/images/{last}/crop").status_code == 404


def _asked(http: httpx.Client, content: bytes) -> int:
    return http.post("/v1/explain?n_samples=1", content=content).status_code
