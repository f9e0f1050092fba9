"""A load generator: ordinary clients of a server, hostile ones beside them, and a probe of its health.

    echo PORT ALONE_SECONDS BESIDE_SECONDS | python -m tests.serve.hostile

runs it in a process of its own and prints what happened as JSON: how many ordinary requests were answered in time alone
and beside the hostile ones, the latencies of /healthz, and for every behaviour how often it had which outcome. The
bodies are made before the line on stdin is read.

A behaviour is a function with a rate, a bound of how many run at a time (together well below the 512 connections of a
server), and the outcomes that it may have: a status, or
    cut      the server ended the connection, with no answer
    left     the client left by its own plan
    silent   there was neither an answer nor an end in `PATIENCE` seconds: never allowed
    stopped  the run ended before
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import socket
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Self

from dave_fast.client import AsyncClient, ServerError
from tests.serve import hostile_bodies as bodies

Outcome = int | str
# Seconds for what the server has to end by its limits, which are 10 s for headers and 20 s for bodies and answers.
PATIENCE = 45.0
PIECE, MEBIBYTE = 1 << 18, 1 << 20

# Ordinary requests: a second, milliseconds that each allows, and seconds beyond that are not held against the server.
RATE, DEADLINE_MS, MARGIN = 3.0, 4000, 1.0
PROBE_SECONDS, PROBE_TIMEOUT = 0.1, 10.0

# What any request may be told by a server that is busy, and by one that does not like it.
BUSY = frozenset({429, 503})
REFUSED = frozenset({400, 404, 405, 406, 408, 411, 413, 414, 415, 417, 422, 426, 431, 501, 505}) | BUSY
CUT = frozenset({"cut"})


class OpenConnections:
    """The connections that a server on loopback holds open, by the ports of their clients.

    Args:
        port: of the server.
    """

    def __init__(self, port: int) -> None:
        self._server, self._read, self._ports = f"0100007F:{port:04X}", 0.0, frozenset[int]()

    def __call__(self) -> frozenset[int]:
        """Return the ports of the clients, as they were half a second ago or later: the table is slow to read."""
        if time.monotonic() > self._read + 0.5:
            rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
            # 01: established; 08: the client has closed its side, the server has not
            open_rows = [row for row in rows if row[1] == self._server and row[3] in ("01", "08")]
            self._ports = frozenset(int(row[2].split(":")[1], 16) for row in open_rows)
            self._read = time.monotonic()
        return self._ports


open_connections = cache(OpenConnections)


class Connection:
    """A connection that reads and writes only as it is told.

    Args:
        port: of the server, on loopback.
        receive_buffer: bytes of the kernel's buffer; None: its default.
    """

    def __init__(self, port: int, receive_buffer: int | None = None) -> None:
        self.port = port
        self.socket = socket.socket()
        self.socket.setblocking(False)
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.read = b""

    async def __aenter__(self) -> Self:
        await asyncio.get_running_loop().sock_connect(self.socket, ("127.0.0.1", self.port))
        return self

    async def __aexit__(self, *details: object) -> None:
        self.socket.close()

    async def send(self, content: bytes) -> None:
        """Send bytes; those that the server does not want any more are dropped."""
        view, loop = memoryview(content), asyncio.get_running_loop()
        with suppress(ConnectionError):
            for at in range(0, len(view), PIECE):
                await loop.sock_sendall(self.socket, view[at : at + PIECE])
                # other clients have their turn
                await asyncio.sleep(0)

    async def receive(self, pattern: bytes, seconds: float) -> re.Match[bytes] | str:
        """Read until a pattern has come, and return it; or how it ended without: cut, silent."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(seconds):
                while (found := re.search(pattern, self.read)) is None:
                    piece = await loop.sock_recv(self.socket, PIECE)
                    if not piece:
                        return "cut"
                    self.read += piece
                return found
        except ConnectionError:
            return "cut"
        except TimeoutError:
            return "silent"

    async def status(self, seconds: float = PATIENCE) -> Outcome:
        """Return the status of the first answer, of which no more is read."""
        found = await self.receive(rb"HTTP/1\.1 ([2-9]\d\d)", seconds)
        return found if isinstance(found, str) else int(found[1])

    async def ended(self, seconds: float = PATIENCE) -> Outcome:
        """Read nothing, and return whether the server ended the connection: cut, silent."""
        own, until = self.socket.getsockname()[1], time.monotonic() + seconds
        await asyncio.sleep(1)
        while time.monotonic() < until:
            if own not in open_connections(self.port)():
                return "cut"
            await asyncio.sleep(1)
        return "silent"


async def exchange(port: int, request: bytes, seconds: float = PATIENCE) -> Outcome:
    """Send a request, read while it is sent, and return the status of the answer, or how it ended without."""
    try:
        async with Connection(port) as connection:
            sending = asyncio.create_task(connection.send(request))
            try:
                return await connection.status(seconds)
            finally:
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)
    except ConnectionError:
        return "cut"


def request(path: str, body: bytes = b"", content_type: str = "image/png", method: str = "POST") -> bytes:
    """Return the bytes of a request."""
    return head(path, len(body), content_type, method) + body


def head(path: str, length: int, content_type: str = "image/png", method: str = "POST") -> bytes:
    """Return the head of a request with a body of a length."""
    lines = [f"{method} {path} HTTP/1.1", "host: x", f"content-type: {content_type}", f"content-length: {length}"]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


GET_OPENAPI = b"GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n"

# Behaviours.


@dataclass(frozen=True)
class Behaviour:
    """A way to be hostile.

    Attributes:
        run: what it does with a port and a variant; it returns the outcome.
        every: seconds between two beginnings.
        most: how many run at a time.
        may: the outcomes that it may have.
        variants: what it does in turn.
    """

    run: Callable[[int, Any], Awaitable[Outcome]]
    every: float
    most: int
    may: frozenset[Outcome]
    variants: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.run.__name__


BEHAVIOURS: list[Behaviour] = []


def hostile(
    every: float, most: int, may: Iterable[Outcome], variants: Mapping[str, Any] | None = None
) -> Callable[[Any], Any]:
    """Return a decorator that makes a function of a port and a variant one of the behaviours."""

    def add(run: Callable[[int, Any], Awaitable[Outcome]]) -> Callable[[int, Any], Awaitable[Outcome]]:
        BEHAVIOURS.append(Behaviour(run, every, most, frozenset(may), variants or {"": None}))
        return run

    return add


SHORT = "/v1/explain?n_samples=2"
LONG = "/v1/explain/stream?n_samples=1024"


@hostile(0.5, 8, REFUSED, bodies.THIN)
async def thin_pictures(port, make):
    return await exchange(port, request(SHORT, make()))


@hostile(1.0, 8, {200, 504} | REFUSED, bodies.SLOW)
async def slow_pictures(port, make):
    return await exchange(port, request(f"{SHORT}&deadline_ms=1000", make()))


@hostile(2.0, 8, {200} | REFUSED, bodies.SLOW)
async def slow_pictures_to_store(port, make):
    return await exchange(port, request("/v1/images", make()))


@hostile(0.5, 8, REFUSED, bodies.BOMBS)
async def bombs(port, make):
    return await exchange(port, request(SHORT, make()))


@hostile(1.0, 8, {200} | REFUSED, bodies.ODD)
async def odd_pictures(port, make):
    return await exchange(port, request(SHORT, make()))


@hostile(0.2, 8, {200} | REFUSED, {str(seed): random.Random(seed) for seed in range(8)})
async def mutated_pictures(port, rng):
    return await exchange(port, request(SHORT, bodies.mutated(rng)))


# A picture may have bytes behind its end, which are stored with it.
@hostile(0.25, 8, {200} | REFUSED, {f"{size} MiB": size for size in (8, 19, 1, 12)})
async def stored_pictures(port, size):
    content = bodies.photo()
    return await exchange(port, request("/v1/images", content + bytes(size * MEBIBYTE - len(content))))


@hostile(
    2.0,
    30,
    CUT,
    {
        "documents": GET_OPENAPI * 100,
        # with deadlines: without, a busy server takes its two minutes, and has written little that is not read
        "a stream": request(f"{LONG}&encoding=float32&deadline_ms=20000", bodies.photo()),
        "pages": b"GET / HTTP/1.1\r\nhost: x\r\n\r\n" * 200,
        "streams in a row": request("/v1/explain/stream?n_samples=64&deadline_ms=2000", bodies.photo()) * 5,
        "refusals": request("/v1/explain?n_samples=0", bodies.photo()) * 50,
        "metrics": b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n" * 1000,
    },
)
async def never_reading(port, content):
    async with Connection(port, receive_buffer=4096) as connection:
        sending = asyncio.create_task(connection.send(content))
        try:
            return await connection.ended()
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)


async def trickle(port: int, first: bytes, rest: bytes, pause: float) -> Outcome:
    """Send bytes, then a byte at each pause, until there is an answer; return its status."""

    async def send(connection: Connection) -> None:
        await connection.send(first)
        for at in range(len(rest)):
            await asyncio.sleep(pause)
            await connection.send(rest[at : at + 1])

    async with Connection(port) as connection:
        sending = asyncio.create_task(send(connection))
        try:
            return await connection.status()
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)


@hostile(1.0, 20, {408, "cut"} | BUSY, {"at once": b"", "after a request": b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n"})
async def slow_headers(port, before):
    if not before:
        return await trickle(port, b"GET /healthz HTTP/1.1\r\n", b"x: y\r\n" * 100, 1.0)
    async with Connection(port) as connection:
        await connection.send(before)
        await connection.status()
        connection.read = b""
        await connection.send(b"GET /hea")
        found = await connection.receive(rb"HTTP/1\.1 4(\d\d)", PATIENCE)
        return found if isinstance(found, str) else int(b"4" + found[1])


HALF = bodies.photo()[: len(bodies.photo()) // 2]
UPLOADS = {
    "explain": head(SHORT, len(bodies.photo())) + HALF,
    "images": head("/v1/images", len(bodies.photo())) + HALF,
    "infer": head("/v2/models/demo/infer", 1000, "application/json") + b'{"inputs":[',
    "form": head(SHORT, 100_000, "multipart/form-data; boundary=b") + b"--b\r\n",
    "chunks": b"POST /v1/explain HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n",
    "megabytes": head("/v1/images", 15 * MEBIBYTE) + bytes(4 * MEBIBYTE),
}


@hostile(1.0, 30, {408, "cut"} | BUSY, UPLOADS)
async def stalling_uploads(port, first):
    return await exchange(port, first)


@hostile(1.0, 30, {408, "cut"} | BUSY, {name: UPLOADS[name] for name in ("explain", "images", "infer", "form")})
async def trickling_uploads(port, first):
    return await trickle(port, first, b"0" * 100, 1.0)


@hostile(
    1.0,
    30,
    {404, 408, "cut"} | BUSY,
    {
        "a picture": head(SHORT, 20 * MEBIBYTE),
        "to store": head("/v1/images", 20 * MEBIBYTE),
        "JSON": head("/v2/models/demo/infer", 20 * MEBIBYTE, "application/json"),
        "no chunk": b"POST /v1/explain HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n",
        "to an address that is none": head("/nowhere", 20 * MEBIBYTE),
    },
)
async def bodies_never_sent(port, content):
    return await exchange(port, content)


@hostile(1.0, 30, {408, "cut"} | BUSY)
async def idle_connections(port, _):
    return await exchange(port, b"")


@hostile(0.1, 4, {"left", "cut"}, {"at once": b"", "amid headers": b"GET / HT", "amid a body": UPLOADS["explain"]})
async def reset_connections(port, content):
    async with Connection(port) as connection:
        await connection.send(content)
        # a linger of 0 s makes a reset of the end
        connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    return "left"


@hostile(3.0, 4, REFUSED | CUT, bodies.JSON)
async def large_json(port, make):
    return await exchange(port, request("/v2/models/demo/infer", make(), "application/json"))


@hostile(0.5, 8, REFUSED | CUT, bodies.FORMS)
async def odd_forms(port, given):
    content_type, make = given
    return await exchange(port, request(SHORT, make(), content_type))


@hostile(0.1, 8, REFUSED, bodies.QUERIES)
async def odd_queries(port, query):
    return await exchange(port, request(f"/v1/explain?{query}", bodies.photo()))


@hostile(0.2, 8, {200, 504} | BUSY, {"answer": "/v1/explain", "stream": "/v1/explain/stream"})
async def deadlines_of_a_millisecond(port, path):
    return await exchange(port, request(f"{path}?n_samples=1024&deadline_ms=1", bodies.photo()))


@hostile(0.5, 8, {"left"} | BUSY)
async def most_samples_and_away(port, _):
    async with Connection(port) as connection:
        await connection.send(request("/v1/explain?n_samples=1024&top_k=2", bodies.photo()))
        told = await connection.status(0.3)
        return "left" if told == "silent" else told


@hostile(0.5, 8, {"left", 504} | BUSY)
async def streams_dropped(port, _):
    async with Connection(port) as connection:
        await connection.send(request(f"{LONG}&deadline_ms=20000", bodies.photo()))
        told = await connection.status()
        if told == 200:
            told = await connection.receive(rb"event: (maps|error)", PATIENCE)
        return "left" if isinstance(told, re.Match) else told


# Their deadline comes before that of ordinary requests, so that their rows do too: they ask for a part of what the
# server can compute, and the others above, with later deadlines or none, for all the rest.
@hostile(
    4.0,
    4,
    {200, 504} | BUSY,
    {
        "10 classes": "top_k=10",
        "6 depths": "depth=pixels&depth=0,1,2,3,4",
        "10 classes at 6 depths": "top_k=10&depth=pixels,0,1,2,3,4",
        "10 ranges": "top_k=10&depth=" + ",".join(f"{i}-{j}" for i in range(5) for j in range(i + 1, 5)),
        "another each time": "target=3&depth=auto&tolerance=0.01",
    },
)
async def many_classes_and_depths(port, options):
    return await exchange(port, request(f"/v1/explain?n_samples=64&deadline_ms=3000&{options}", bodies.photo()))


@hostile(0.2, 8, REFUSED | {200, 408} | CUT, bodies.GARBAGE)
async def garbage(port, make):
    return await exchange(port, make())


@hostile(
    1.0,
    8,
    REFUSED | CUT,
    {"no such page": ("GET", "/nowhere"), "a page": ("GET", "/openapi.json"), "JSON": ("POST", "/v2")},
)
async def garbage_behind_an_answer(port, asked):
    method, path = asked
    async with Connection(port) as connection:
        await connection.send(f"{method} {path} HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n".encode())
        await connection.status()
        await connection.send(b"no chunk\r\n")
        return await connection.ended()


# The run.


@dataclass
class Phase:
    """What happened in a part of the run.

    Attributes:
        sent: ordinary requests that were sent.
        good: those answered in time.
        failures: how often others ended in which way.
        seconds: what those with an answer took.
        probes: seconds that /healthz took, in order.
        lags: seconds that this process was late to begin a probe.
    """

    sent: int = 0
    good: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    probes: list[float] = field(default_factory=list)
    lags: list[float] = field(default_factory=list)

    def told(self) -> dict[str, Any]:
        """Return it as JSON may have it."""
        milliseconds = {"healthz_ms": self.probes, "lag_ms": self.lags, "ordinary_ms": self.seconds}
        parts = {"p50": 0.5, "p99": 0.99, "most": 1.0}
        return {
            "sent": self.sent,
            "good": self.good,
            "goodput": round(self.good / max(1, self.sent), 4),
            "failures": dict(self.failures),
            "probes": len(self.probes),
        } | {
            name: {part: round(1000 * quantile(values, share), 1) for part, share in parts.items()}
            for name, values in milliseconds.items()
        }


def quantile(values: list[float], share: float) -> float:
    """Return the value below or at which a share of the values lies; 0 for none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


async def regularly(every: float, seconds: float, start: Callable[[float], Awaitable[None]], most: int) -> None:
    """Start something at a rate for some seconds, unless too many of it run; at the end what runs is stopped.

    Args:
        every: seconds between two beginnings.
        seconds: how long.
        start: what is started, with the time when it was due.
        most: how many may run at a time.
    """
    running: set[asyncio.Task[None]] = set()
    began = time.monotonic()
    for number in range(max(1, int(seconds / every))):
        due = began + number * every
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        for task in [task for task in running if task.done()]:
            running.remove(task)
            # an error of the load generator itself ends the run
            task.result()
        if len(running) < most:
            running.add(asyncio.create_task(start(due)))
    await asyncio.sleep(max(0.0, began + seconds - time.monotonic()))
    for task in running:
        task.cancel()
    for told in await asyncio.gather(*running, return_exceptions=True):
        if isinstance(told, Exception):
            raise told


async def ordinary_clients(port: int, seconds: float, phase: Phase) -> None:
    """Ask for explanations at a fixed rate, however long each takes."""
    content, allowed = bodies.photo(), DEADLINE_MS / 1000 + MARGIN
    async with AsyncClient(f"http://127.0.0.1:{port}", timeout=allowed) as client:

        async def ask(due: float) -> None:
            samples = 4 + phase.sent % 13
            phase.sent += 1
            try:
                await client.explain(content, n_samples=samples, seed=phase.sent, deadline_ms=DEADLINE_MS)
            except ServerError as error:
                phase.failures[str(error)[:100]] += 1
                return
            except asyncio.CancelledError:
                # the run ended before the time allowed to this request
                phase.sent -= 1
                raise
            took = time.monotonic() - due
            phase.seconds.append(took)
            if took <= allowed:
                phase.good += 1
            else:
                phase.failures["late"] += 1

        await regularly(1 / RATE, seconds, ask, 1000)


async def health_probe(port: int, seconds: float, phase: Phase) -> None:
    """Ask for /healthz at a fixed rate on fresh connections; what is no 200 counts as the longest time."""

    async def probe(due: float) -> None:
        phase.lags.append(time.monotonic() - due)
        status = await exchange(port, b"GET /healthz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n", PROBE_TIMEOUT)
        phase.probes.append(time.monotonic() - due if status == 200 else PROBE_TIMEOUT)

    await regularly(PROBE_SECONDS, seconds, probe, 1000)


@dataclass
class Tally:
    """The outcomes of the behaviours: counted, and for those that may not be also by variant."""

    outcomes: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    wrong: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))

    def add(self, behaviour: Behaviour, variant: str, outcome: Outcome) -> None:
        self.outcomes[behaviour.name][str(outcome)] += 1
        if outcome != "stopped" and outcome not in behaviour.may:
            self.wrong[f"{behaviour.name}: {variant}"][str(outcome)] += 1


async def misbehave(behaviour: Behaviour, port: int, seconds: float, tally: Tally) -> None:
    """Run a behaviour at its rate."""
    variants = bodies.cycle_of(behaviour.variants)

    async def run(due: float) -> None:
        name, variant = next(variants)
        try:
            outcome = await behaviour.run(port, variant)
        except ConnectionError:
            outcome = "cut"
        except asyncio.CancelledError:
            tally.add(behaviour, name, "stopped")
            raise
        tally.add(behaviour, name, outcome)

    await regularly(behaviour.every, seconds, run, behaviour.most)


async def load(port: int, alone_seconds: float, beside_seconds: float) -> dict[str, Any]:
    """Run the ordinary clients alone, then beside the hostile ones; return what happened."""
    alone, beside, tally = Phase(), Phase(), Tally()
    began, used = time.monotonic(), time.process_time()
    async with asyncio.TaskGroup() as group:
        group.create_task(ordinary_clients(port, alone_seconds, alone))
        group.create_task(health_probe(port, alone_seconds, alone))
    async with asyncio.TaskGroup() as group:
        group.create_task(ordinary_clients(port, beside_seconds, beside))
        group.create_task(health_probe(port, beside_seconds, beside))
        for behaviour in BEHAVIOURS:
            group.create_task(misbehave(behaviour, port, beside_seconds, tally))
    return {
        "alone": alone.told(),
        "beside": beside.told(),
        "hostile": {behaviour.name: dict(tally.outcomes[behaviour.name]) for behaviour in BEHAVIOURS},
        "wrong": {name: dict(counts) for name, counts in tally.wrong.items()},
        "generator_cpu": round((time.process_time() - used) / (time.monotonic() - began), 3),
    }


def make_bodies() -> None:
    """Make the bodies that take long to make."""
    for table in (bodies.THIN, bodies.BOMBS, bodies.ODD, bodies.SLOW, bodies.JSON):
        for make in table.values():
            make()
    for _, make in bodies.FORMS.values():
        make()


if __name__ == "__main__":
    make_bodies()
    port, alone_seconds, beside_seconds = sys.stdin.readline().split()
    print(json.dumps(asyncio.run(load(int(port), float(alone_seconds), float(beside_seconds)))))
