"""Tests of the scheduler under a virtual clock: its rules, its bound on waiting, and its counts under random load."""

import heapq
import math
import random
from collections import Counter, defaultdict

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dave_fast.errors import RefusedError
from dave_fast.serve.limits import Limits
from dave_fast.serve.scheduler import PATIENCE, Queued, Scheduler

WIDE = Limits(requests=10**6, rows=10**9, queue_bytes=10**12)


def takes(scheduler, rows, now=0.0):
    """Take micro-batches until nothing waits; return them as lists of (request, start, stop)."""
    while batch := scheduler.take(lambda bucket: rows, now):
        yield batch
        scheduler.done(batch, 1.0)


def counts(batch):
    return {part.request: part.stop - part.start for part in batch.parts}


# The rules.


def test_one_request_starts_at_once_and_goes_out_in_order():
    scheduler, request = Scheduler(), Queued("a", 10)
    scheduler.submit(request, 0.0)
    ranges = [(part.start, part.stop) for batch in takes(scheduler, 4) for part in batch.parts]
    assert ranges == [(0, 4), (4, 8), (8, 10)]
    assert scheduler.rows == 0 and scheduler.requests == 1
    scheduler.end(request)
    assert scheduler.requests == 0


def test_newcomers_join_the_next_micro_batch():
    scheduler, large, small = Scheduler(), Queued("a", 100), Queued("a", 3)
    scheduler.submit(large, 0.0)
    scheduler.take(lambda bucket: 8, 0.0)
    scheduler.submit(small, 0.1)
    assert counts(scheduler.take(lambda bucket: 8, 0.1)) == {large: 5, small: 3}


def test_three_quarters_go_by_deadline_and_a_quarter_by_turn():
    scheduler = Scheduler()
    late, soon, never = Queued("a", 50, deadline=9.0), Queued("a", 50, deadline=1.0), Queued("a", 500)
    for request in (late, soon, never):
        scheduler.submit(request, 0.0)
    batches = list(takes(scheduler, 8))
    assert counts(batches[0]) == {soon: 6, late: 1, never: 1}
    given = Counter()
    for batch in batches[:4]:
        given.update(counts(batch))
    # 32 rows, 8 of them by turn: the most urgent has a row in every micro-batch already
    assert given == {soon: 24, late: 4, never: 4}


def test_without_deadlines_small_requests_go_first_and_patience_ends():
    scheduler = Scheduler()
    large, small, later = Queued("a", 400), Queued("a", 4), Queued("a", 4)
    scheduler.submit(large, 0.0)
    scheduler.submit(small, 0.0)
    assert counts(scheduler.take(lambda bucket: 4, 0.0))[small] == 3
    scheduler.submit(later, 400 * PATIENCE)
    assert later.urgency > large.urgency > small.urgency


def test_single_row_micro_batches_alternate_between_the_rules():
    """With one row a micro-batch, every fourth one is given by turn, so that the large request starves no other."""
    scheduler, large = Scheduler(), Queued("a", 1000, deadline=1.0)
    scheduler.submit(large, 0.0)
    small = [Queued("a", 1) for _ in range(3)]
    for request in small:
        scheduler.submit(request, 0.0)
    served = [next(iter(counts(batch))) for batch, _ in zip(takes(scheduler, 1), range(16), strict=False)]
    assert all(request in served for request in small)


def test_rows_of_a_passed_deadline_are_not_handed_out():
    scheduler, request = Scheduler(), Queued("a", 8, deadline=5.0)
    scheduler.submit(request, 0.0)
    assert len(scheduler.take(lambda bucket: 4, 4.9)) == 4
    assert scheduler.take(lambda bucket: 4, 5.0) is None


def test_buckets_are_never_mixed_and_none_starves():
    scheduler = Scheduler()
    for _ in range(20):
        scheduler.submit(Queued("urgent", 50, deadline=1.0), 0.0)
    scheduler.submit(Queued("quiet", 4), 0.0)
    kinds = [batch.bucket for batch in takes(scheduler, 4)]
    assert "quiet" in kinds[:4]
    assert Counter(kinds) == {"urgent": 250, "quiet": 1}


@pytest.mark.parametrize("before", [1, 2])
def test_a_first_row_waits_for_one_micro_batch_at_most_beside_an_earlier_deadline(before):
    scheduler = Scheduler()
    scheduler.submit(Queued("explain", 100, deadline=1.0), 0.0)
    for _ in range(before):
        scheduler.take(lambda bucket: 4, 0.0)
    scheduler.submit(Queued("explain", 4, deadline=2.0, first="predict"), 0.0)
    assert "predict" in [scheduler.take(lambda bucket: 4, 0.0).bucket for _ in range(2)]


def test_the_first_row_comes_back_before_samples_go_out():
    scheduler, request = Scheduler(), Queued("explain", 3, first="predict")
    scheduler.submit(request, 0.0)
    assert scheduler.rows == 4
    batch = scheduler.take(lambda bucket: 8, 0.0)
    assert batch.bucket == "predict" and [(p.start, p.stop) for p in batch.parts] == [(-1, 0)]
    assert scheduler.take(lambda bucket: 8, 0.0) is None
    scheduler.done(batch, 1.0)
    scheduler.proceed(request)
    batch = scheduler.take(lambda bucket: 8, 0.0)
    assert batch.bucket == "explain" and [(p.start, p.stop) for p in batch.parts] == [(0, 3)]
    scheduler.done(batch, 1.0)
    scheduler.end(request)
    scheduler.proceed(request)
    assert scheduler.take(lambda bucket: 8, 0.0) is None
    assert (scheduler.rows, scheduler.requests) == (0, 0)


@pytest.mark.parametrize("when", ["before", "during", "after"])
def test_a_request_may_end_around_its_first_row(when):
    scheduler, request = Scheduler(), Queued("explain", 3, first="predict", size=5)
    scheduler.submit(request, 0.0)
    if when == "before":
        scheduler.end(request)
    else:
        batch = scheduler.take(lambda bucket: 8, 0.0)
        if when == "during":
            scheduler.end(request)
        scheduler.done(batch, 1.0)
        scheduler.end(request)
        scheduler.proceed(request)
    assert scheduler.take(lambda bucket: 8, 0.0) is None
    assert (scheduler.rows, scheduler.requests, scheduler.bytes) == (0, 0, 0)


# Admission.


@pytest.mark.parametrize(
    ("limits", "what"),
    [
        (Limits(requests=2), "2 of 2 requests"),
        (Limits(rows=25), "20 of 25 samples"),
        (Limits(queue_bytes=250), "200 of 250 bytes"),
    ],
)
def test_a_full_queue_refuses_and_says_when(limits, what):
    scheduler = Scheduler(limits)
    first = Queued("a", 10, size=100)
    scheduler.submit(first, 0.0)
    scheduler.submit(Queued("a", 10, size=100), 0.0)
    with pytest.raises(RefusedError, match=what) as refused:
        scheduler.submit(Queued("a", 10, size=100), 0.0)
    assert refused.value.kind == "full" and refused.value.retry_after == 1
    scheduler.end(first)
    scheduler.submit(Queued("a", 10, size=100), 0.0)


def test_retry_after_is_the_time_the_queue_takes():
    scheduler = Scheduler(Limits(rows=1000))
    scheduler.submit(Queued("a", 1000), 0.0)
    batch = scheduler.take(lambda bucket: 10, 0.0)
    scheduler.done(batch, 0.1)
    with pytest.raises(RefusedError) as refused:
        scheduler.submit(Queued("a", 100), 0.0)
    assert refused.value.retry_after == math.ceil(990 / 100)


@pytest.mark.parametrize("most", [10, 0])
def test_requests_that_can_never_fit_are_refused(most):
    with pytest.raises(RefusedError, match="at most") as refused:
        Scheduler(Limits(queue_bytes=most)).submit(Queued("a", 1, size=11), 0.0)
    assert refused.value.kind == "too large" and refused.value.retry_after is None


def test_draining_takes_nothing_new_and_finishes_what_it_has():
    scheduler = Scheduler()
    scheduler.submit(Queued("a", 6), 0.0)
    scheduler.drain()
    with pytest.raises(RefusedError) as refused:
        scheduler.submit(Queued("a", 1), 0.0)
    assert refused.value.kind == "draining"
    assert sum(len(batch) for batch in takes(scheduler, 4)) == 6


def test_ending_frees_rows_at_once_and_memory_when_the_last_row_is_back():
    scheduler, request = Scheduler(), Queued("a", 10, size=7)
    scheduler.submit(request, 0.0)
    batch = scheduler.take(lambda bucket: 4, 0.0)
    scheduler.end(request)
    scheduler.end(request)
    assert (scheduler.rows, scheduler.bytes, scheduler.requests) == (0, 7, 1)
    assert scheduler.take(lambda bucket: 4, 0.0) is None
    scheduler.done(batch, 1.0)
    assert (scheduler.rows, scheduler.bytes, scheduler.requests) == (0, 0, 0)


# Random sequences of calls.

ACTIONS = st.lists(
    st.one_of(
        st.tuples(
            st.just("submit"),
            st.sampled_from("abc"),
            st.integers(1, 40),
            st.integers(0, 50),
            st.one_of(st.just(math.inf), st.floats(0.0, 30.0)),
        ),
        st.tuples(st.just("take"), st.integers(1, 9)),
        st.tuples(st.just("done"), st.integers(0, 5)),
        st.tuples(st.just("end"), st.integers(0, 30)),
        st.tuples(st.just("wait"), st.floats(0.01, 3.0)),
    ),
    max_size=120,
)
MOST = (12, 150, 300)
LIMITS = Limits(requests=MOST[0], rows=MOST[1], queue_bytes=MOST[2])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(ACTIONS)
def test_nothing_is_lost_doubled_or_over_the_limits(actions):
    scheduler, now = Scheduler(LIMITS), 0.0
    live, flying, handed = [], [], defaultdict(list)
    for name, *values in actions:
        if name == "submit":
            bucket, samples, size, wait = values
            request = Queued(bucket, samples, size, now + wait)
            needed = (len(held(live)) + 1, rows(live) + samples, memory(live) + size)
            if all(need <= most for need, most in zip(needed, MOST, strict=True)):
                scheduler.submit(request, now)
                live.append(request)
            else:
                with pytest.raises(RefusedError, match="queue is full"):
                    scheduler.submit(request, now)
        elif name == "take":
            could = [r for r in live if r.waiting and r.deadline > now]
            batch = scheduler.take(lambda bucket, most=values[0]: most, now)
            # a worker gets no micro-batch only if nothing waits
            assert (batch is None) == (not could)
            if batch is not None:
                left = [r for r in could if r.bucket == batch.bucket and r.waiting]
                assert len(batch) == values[0] or (len(batch) < values[0] and not left)
                assert all(part.request.bucket == batch.bucket for part in batch.parts)
                for part in batch.parts:
                    handed[part.request] += range(part.start, part.stop)
                flying.append(batch)
        elif name == "done" and flying:
            scheduler.done(flying.pop(values[0] % len(flying)), 0.5)
        elif name == "end" and live:
            scheduler.end(live[values[0] % len(live)])
        elif name == "wait":
            now += values[0]
        assert scheduler.rows == rows(live)
        assert scheduler.requests == len(held(live)) <= LIMITS.requests
        assert scheduler.bytes == memory(live) <= LIMITS.queue_bytes
        assert scheduler.rows <= LIMITS.rows
    for batch in flying:
        scheduler.done(batch, 0.5)
    for batch in takes(scheduler, 7, now=-1.0):
        for part in batch.parts:
            handed[part.request] += range(part.start, part.stop)
    for request in live:
        complete = list(range(request.samples))
        assert handed[request] == (complete if not request.ended else complete[: len(handed[request])])
        scheduler.end(request)
    assert (scheduler.rows, scheduler.requests, scheduler.bytes) == (0, 0, 0)
    assert not scheduler._buckets


def held(live):
    return [r for r in live if not r.ended or r.in_flight]


def rows(live):
    return sum(r.waiting for r in live)


def memory(live):
    return sum(r.size for r in held(live))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(1, 5),
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 60), st.floats(0.0, 5.0)), min_size=1, max_size=25),
    st.randoms(use_true_random=False),
)
def test_every_request_gets_its_rows_within_the_bound(capacity, buckets, arrivals, rng):
    """The bound is 8·B·n·⌈Q/R⌉ micro-batches; the other requests are larger, more urgent and keep arriving."""
    scheduler = Scheduler(WIDE)
    for bucket, samples, wait in arrivals:
        scheduler.submit(Queued(bucket % buckets, samples, deadline=100 + wait), 0.0)
    quiet = Queued(0, rng.randint(1, 8))
    scheduler.submit(quiet, 0.0)
    ahead = 1 + sum(1 for bucket, _, _ in arrivals if bucket % buckets == 0)
    waiting = len({bucket % buckets for bucket, _, _ in arrivals} | {0})
    bound = 8 * waiting * quiet.samples * math.ceil(ahead / capacity)
    for turn in range(bound):
        if quiet.waiting == 0:
            break
        # more requests arrive in this bucket and in others, all of them more urgent
        scheduler.submit(Queued(turn % buckets, 1000, deadline=50.0), 0.0)
        scheduler.done(scheduler.take(lambda bucket: capacity, 0.0), 1.0)
    assert quiet.waiting == 0


# Simulations.


def simulate(arrivals, load, *, capacity=12, row=0.003, overhead=0.002, seed=0):
    """Simulate Poisson arrivals at `load` times a worker's capacity; some clients leave early, some have deadlines."""
    rng = random.Random(seed)
    scheduler, now = Scheduler(Limits(requests=64, rows=2000, queue_bytes=64 * 50)), 0.0
    most_rows_a_second = capacity / (overhead + capacity * row)
    tally = Counter()
    leaving, next_arrival, free_at, flying, waits = [], 0.0, 0.0, None, []
    began = {}
    while tally["arrived"] < arrivals or scheduler.requests:
        if flying is None:
            flying = scheduler.take(lambda bucket: capacity, now)
            if flying is not None:
                free_at = now + overhead + row * len(flying)
                tally["batches"] += 1
                tally["rows"] += len(flying)
                waits += [now - began[part.request] for part in flying.parts if part.start == 0]
        soonest = [next_arrival if tally["arrived"] < arrivals else math.inf]
        soonest += [free_at if flying is not None else math.inf, leaving[0][0] if leaving else math.inf]
        now = min(soonest)
        assert now < math.inf
        if now == soonest[1]:
            scheduler.done(flying, overhead + row * len(flying))
            tally["busy"] += overhead + row * len(flying)
            for part in flying.parts:
                if part.stop == part.request.samples and not part.request.ended:
                    tally["answered"] += 1
                    scheduler.end(part.request)
            flying = None
        elif now == soonest[2]:
            _, _, request = heapq.heappop(leaving)
            if not request.ended:
                tally["left"] += 1
                scheduler.end(request)
        else:
            samples = rng.choice((4, 16, 16, 16, 50))
            request = Queued(rng.choice("ab"), samples, size=samples)
            tally["arrived"] += 1
            try:
                scheduler.submit(request, now)
                began[request] = now
                if rng.random() < 0.1:
                    heapq.heappush(leaving, (now + rng.expovariate(1.0), request.number, request))
            except RefusedError:
                tally["refused"] += 1
            next_arrival = now + rng.expovariate(load * most_rows_a_second / 20.4)
    assert tally["arrived"] == tally["answered"] + tally["refused"] + tally["left"]
    assert (scheduler.rows, scheduler.requests, scheduler.bytes) == (0, 0, 0)
    return tally, waits, now


def test_idle_requests_start_at_once_and_overload_keeps_micro_batches_full():
    quiet, waits, _ = simulate(3_000, load=0.05)
    assert quiet["refused"] == 0
    # at this load half of the requests need not wait
    assert sorted(waits)[len(waits) // 2] == 0.0
    busy, _, _ = simulate(20_000, load=2.0)
    assert busy["rows"] / busy["batches"] > 0.98 * 12
    assert 0.3 < busy["refused"] / busy["arrived"] < 0.6


@pytest.mark.slow
def test_two_million_arrivals():
    for load in (0.5, 0.95, 2.0, 10.0):
        tally, _, seconds = simulate(500_000, load=load, seed=int(100 * load))
        if load >= 2:
            assert tally["busy"] / seconds > 0.999


def test_the_same_arrivals_give_the_same_schedule():
    assert simulate(2_000, 1.5, seed=5) == simulate(2_000, 1.5, seed=5)
