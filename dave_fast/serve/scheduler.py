"""The scheduler: chooses the samples of the next micro-batch.

A request is S independent samples, so that rows (request, sample) are queued and batched. A worker takes a micro-batch
whenever it is free, full if enough rows wait. The module is pure Python and deterministic, with the time as an
argument; threads that share a `Scheduler` need a lock.

Rows of one micro-batch belong to one bucket (model, number of classes, depths). There are two rules:

    bucket   micro-batches go in turns to the bucket of the earliest deadline and to the bucket that was served longest
             ago; a bucket that is new comes before that of the latest micro-batch.
    rows     three quarters of a micro-batch are filled by deadline, earliest first (exactly three quarters over four
             consecutive micro-batches of a bucket). Each row of the last quarter goes to the request with the fewest
             rows in this micro-batch; among equals, to the one that has waited longest for a row. Without a deadline,
             a request is ordered as if it had one that grows with its samples: small ones go first.

This gives a bound on waiting. With R rows a micro-batch, Q requests in the bucket and B buckets waiting, each request
gets a row at least every 4⌈Q/R⌉ micro-batches of its bucket, and its bucket at least every 2B-th micro-batch, whatever
arrives later and however large or urgent the others are: a request of n rows is handed out within 8·B·n·⌈Q/R⌉
micro-batches. (The last quarters of four micro-batches are R rows, each for the request that has waited longest for
one; requests that were served or arrived later come after it.)
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

from dave_fast.errors import RefusedError
from dave_fast.serve.account import Account
from dave_fast.serve.limits import Limits

# A request without a deadline is ordered as if it had one, this many seconds a sample after its arrival.
PATIENCE = 0.02
# One row in this many is given by turn, the others by deadline.
BY_TURN = 4
# The least and most seconds that a refused client is told to wait.
RETRY_AFTER = (1, 60)
# Weight of the latest micro-batch in the estimated rate.
NEWEST = 0.1


@dataclass(eq=False)
class Queued:
    """A request as the scheduler sees it.

    Attributes:
        bucket: key of its samples; rows with equal keys may share a micro-batch.
        samples: number of samples S.
        size: bytes that it needs until it has ended.
        deadline: on the caller's clock, or infinity.
        first: bucket of the additional row −1, the prediction, computed before samples 0 to S − 1; None without one.
        issued: samples handed out so far, in order.
        in_flight: rows handed out that have not come back.
        ended: whether it is answered, failed or cancelled.
        urgency: the time by which it is ordered.
        number: its number in the order of arrival.
        served: number of the micro-batch that last had a row of it.
    """

    bucket: Hashable
    samples: int
    size: int = 0
    deadline: float = math.inf
    first: Hashable | None = None
    issued: int = field(default=0, init=False)
    in_flight: int = field(default=0, init=False)
    ended: bool = field(default=False, init=False)
    urgency: float = field(default=math.inf, init=False)
    number: int = field(default=0, init=False)
    served: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.issued = 0 if self.first is None else -1

    @property
    def waiting(self) -> int:
        """Rows that are still to be handed out."""
        return 0 if self.ended else self.samples - self.issued

    @property
    def place(self) -> Hashable:
        """The bucket in which its next row waits."""
        return self.bucket if self.first is None or self.issued >= 0 else self.first

    @property
    def available(self) -> int:
        """Rows that may be handed out now."""
        return 1 if self.issued < 0 else self.samples - self.issued


@dataclass(frozen=True)
class Part:
    """Samples start … stop − 1 of one request."""

    request: Queued
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one bucket; `capacity` is the most that it could have."""

    bucket: Any
    parts: tuple[Part, ...]
    capacity: int

    def __len__(self) -> int:
        return sum(map(len, self.parts))


@dataclass
class _Bucket:
    """The requests with waiting rows of one bucket.

    Attributes:
        served: the turn in which the bucket was last served; of a new bucket, the turn before the latest.
        turns: how often it was served.
        requests: the requests by number.
    """

    served: int
    turns: int = 0
    requests: dict[int, Queued] = field(default_factory=dict)

    def alive(self, now: float) -> list[Queued]:
        return [request for request in self.requests.values() if request.deadline > now]


class Scheduler:
    """The queue; its rules are in the module's docstring.

    Args:
        limits: the bounds of the queue (`requests`, `rows`, `queue_bytes`); None: the defaults.
        account: of memory that the bytes of requests are held in too, or None.
    """

    def __init__(self, limits: Limits | None = None, account: Account | None = None) -> None:
        self.limits = limits or Limits()
        self.account = account
        self.draining = False
        self.requests = 0
        self.rows = 0
        self.bytes = 0
        self.rate = 0.0
        self._buckets: dict[Hashable, _Bucket] = {}
        self._turn = 0
        self._arrivals = 0

    # Requests.

    def submit(self, request: Queued, now: float) -> None:
        """Add a request to the queue, or raise RefusedError."""
        limits = self.limits
        most_bytes = math.inf if limits.queue_bytes is None else limits.queue_bytes
        if self.draining:
            raise RefusedError("draining", "the server is shutting down", RETRY_AFTER[0])
        if request.samples > limits.rows or request.size > most_bytes:
            raise RefusedError(
                "too large",
                f"the request needs {request.samples} samples and {request.size / 2**20:.0f} MiB; this server takes "
                f"{limits.rows} and {most_bytes / 2**20:.0f} MiB at most",
            )
        for count, more, most, what in (
            (self.requests, 1, limits.requests, "requests"),
            (self.rows, request.samples, limits.rows, "samples"),
            (self.bytes, request.size, most_bytes, "bytes"),
        ):
            if count + more > most:
                raise RefusedError("full", f"the queue is full ({count} of {most} {what})", self.retry_after())
        if self.account is not None:
            self.account.hold(request.size)
        self._arrivals += 1
        request.number, request.served = self._arrivals, self._turn
        request.urgency = now + PATIENCE * request.samples if request.deadline == math.inf else request.deadline
        self.requests += 1
        self.rows += request.waiting
        self.bytes += request.size
        self._enter(request)

    def proceed(self, request: Queued) -> None:
        """Let the samples of a request be handed out: its first row is done."""
        if not request.ended:
            self._enter(request)

    def end(self, request: Queued) -> None:
        """End a request and drop its waiting rows; idempotent."""
        if request.ended:
            return
        self.rows -= request.waiting
        self._leave(request, request.place)
        request.ended = True
        if request.in_flight == 0:
            self._release(request)

    def drain(self) -> None:
        """Refuse new requests from now on."""
        self.draining = True

    def retry_after(self) -> int:
        """Return the whole seconds until the rows that wait now are computed, within RETRY_AFTER."""
        seconds = math.ceil(self.rows / self.rate) if self.rate > 0 else 0
        return min(max(RETRY_AFTER[0], seconds), RETRY_AFTER[1])

    # Micro-batches.

    def take(self, capacity: Callable[[Any], int], now: float) -> MicroBatch | None:
        """Return the next micro-batch, or None if nothing waits.

        Rows of a request whose deadline has passed are not handed out.

        Args:
            capacity: the most rows of a micro-batch, by the bucket's key.
            now: the time on the caller's clock.
        """
        alive = {key: requests for key, bucket in self._buckets.items() if (requests := bucket.alive(now))}
        if not alive:
            return None
        self._turn += 1
        key = self._next_bucket(alive)
        bucket, requests, rows = self._buckets[key], alive[key], max(1, capacity(key))
        bucket.served = self._turn
        by_turn = (rows + bucket.turns % BY_TURN) // BY_TURN
        bucket.turns += 1
        counts = _by_deadline(requests, rows - by_turn)
        _by_turn(requests, counts, min(rows, sum(r.available for r in requests)))
        return MicroBatch(key, tuple(self._hand_out(request, count) for request, count in counts.items()), rows)

    def done(self, batch: MicroBatch, seconds: float) -> None:
        """Note that a micro-batch has ended after so many seconds, computed or failed."""
        if seconds > 0:
            rate = len(batch) / seconds
            self.rate = rate if self.rate == 0 else (1 - NEWEST) * self.rate + NEWEST * rate
        for part in batch.parts:
            part.request.in_flight -= len(part)
            if part.request.ended and part.request.in_flight == 0:
                self._release(part.request)

    def _next_bucket(self, alive: dict[Hashable, list[Queued]]) -> Hashable:
        if self._turn % 2:
            return min(alive, key=lambda key: min((request.urgency, request.number) for request in alive[key]))
        return min(alive, key=lambda key: self._buckets[key].served)

    def _hand_out(self, request: Queued, count: int) -> Part:
        place, part = request.place, Part(request, request.issued, request.issued + count)
        request.issued += count
        request.in_flight += count
        request.served = self._turn
        self.rows -= count
        if request.waiting == 0 or request.place != place:
            self._leave(request, place)
        return part

    def _enter(self, request: Queued) -> None:
        # a bucket that is new while a micro-batch is computed has waited longer than that of the micro-batch
        self._buckets.setdefault(request.place, _Bucket(served=self._turn - 1)).requests[request.number] = request

    def _leave(self, request: Queued, place: Hashable) -> None:
        """Remove a request from its bucket, and the bucket if it is empty."""
        bucket = self._buckets.get(place)
        if bucket is not None:
            bucket.requests.pop(request.number, None)
            if not bucket.requests:
                del self._buckets[place]

    def _release(self, request: Queued) -> None:
        self.requests -= 1
        self.bytes -= request.size
        if self.account is not None:
            self.account.release(request.size)


def _by_deadline(requests: list[Queued], rows: int) -> dict[Queued, int]:
    """Return the number of rows of each request, given by deadline, earliest first."""
    counts: dict[Queued, int] = {}
    for request in sorted(requests, key=lambda request: (request.urgency, request.number)):
        if rows <= 0:
            break
        counts[request] = min(rows, request.available)
        rows -= counts[request]
    return counts


def _by_turn(requests: list[Queued], counts: dict[Queued, int], total: int) -> None:
    """Fill `counts` up to `total` rows: each row goes to the request with the fewest, on a tie to the longest wait."""
    line = [(counts.get(r, 0), r.served, r.number, r) for r in requests if counts.get(r, 0) < r.available]
    heapq.heapify(line)
    for _ in range(total - sum(counts.values())):
        count, served, number, request = line[0]
        counts[request] = count + 1
        if count + 1 < request.available:
            heapq.heapreplace(line, (count + 1, served, number, request))
        else:
            heapq.heappop(line)
