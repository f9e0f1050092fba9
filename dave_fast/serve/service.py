"""Engines and jobs: micro-batches are computed, contributions gathered, maps and errors made of them.

One thread an engine takes micro-batches from the scheduler; one thread makes maps. They meet under one lock, which is
never held while anything is computed. What befalls a request is told to its listener, from these threads.

An error in a micro-batch is found by halves: its requests are tried again in two groups, and so on, until the one that
fails is alone. NaN among a request's contributions fails that request.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dave_fast.engine.free_memory import SHARE, free_bytes
from dave_fast.errors import DaveFastError, InputError, NonFiniteError
from dave_fast.explain.convergence import Refined, refine
from dave_fast.explain.explainer import DAVE
from dave_fast.sampling import join
from dave_fast.serve.jobs import Ask, Ended, Failed, Job, Listener, Predicted
from dave_fast.serve.limits import Limits
from dave_fast.serve.prometheus import Metrics
from dave_fast.serve.scheduler import MicroBatch, Part, Queued, QueueLimits, Scheduler
from dave_fast.serve.served import ServedModel

log = logging.getLogger("dave_fast.serve")

# failed micro-batches in a row after which an engine is no longer called ready
FAILURES = 5
# seconds after which it is tried again, where nobody asks
PROBE_SECONDS = 2.0
# the part of the latest time to make a map that is kept for it before a deadline, and seconds on top
MARGIN, LEAST_MARGIN = 1.5, 0.003


class DeadlineError(DaveFastError, TimeoutError):
    """No sample was there at the deadline."""


class Service:
    """Explanations for many callers at once. `start` before the first, `stop` after the last."""

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        limits: Limits | None = None,
        metrics: Metrics | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.models = dict(models)
        self.metrics = metrics or Metrics()
        self.clock = clock
        explainers = next(iter(self.models.values())).explainers
        self.engines = [f"{number}:{explainer.device}" for number, explainer in enumerate(explainers)]
        limits = limits or Limits()
        fitting = min(int(SHARE * free_bytes(explainer.device)) for explainer in explainers)
        self.scheduler = Scheduler(QueueLimits(limits.requests, limits.rows, limits.queue_bytes or fitting))
        self._jobs: dict[Queued, Job] = {}
        self._lock = threading.Condition()
        self._stopping = False
        self._failures = dict.fromkeys(self.engines, 0)
        self._rows: dict[tuple[int, str], int] = {}
        self._maps: queue.PriorityQueue[tuple[int, int, Callable[[], None]]] = queue.PriorityQueue()
        self._numbers = itertools.count()
        self._threads: list[threading.Thread] = []
        self.map_seconds = 0.0

    # ---- what callers use ----

    def start(self) -> None:
        """Warm every engine with a real explanation, check it, and start. Raises what the explanation raises."""
        for number in range(len(self.engines)):
            self._check(number)
            for model in self.models.values():
                self._rows[number, model.name] = model.explainers[number].fitting_rows(model.example())
        runs = [threading.Thread(target=self._run, args=(number,), daemon=True) for number in range(len(self.engines))]
        self._threads = [*runs, threading.Thread(target=self._make_maps, daemon=True)]
        for thread in self._threads:
            thread.start()

    def submit(self, name: str, ask: Ask, listener: Listener) -> Job:
        """Take a request for a model. Raises RefusedError, and InputError for a class that the model does not have."""
        model = self.models[name]
        if ask.classes > model.classes or any(not 0 <= target < model.classes for target in ask.targets or ()):
            raise InputError(f"the classes of {name!r} are 0 to {model.classes - 1}; {ask.targets or ask.top_k} asked.")
        now = self.clock()
        queued = Queued(
            ("explain", name, model.prepare.size, ask.classes),
            ask.n_samples,
            model.request_bytes(ask.classes, ask.n_samples),
            math.inf if ask.deadline is None else ask.deadline,
            first=("predict", name, model.prepare.size),
        )
        job = Job(model, ask, queued, listener, now)
        with self._lock:
            self.scheduler.submit(queued, now)
            self._jobs[queued] = job
            self._lock.notify_all()
        return job

    def cancel(self, job: Job) -> None:
        """The client is gone: nothing more is computed or told."""
        with self._lock:
            if not job.over:
                self.metrics.cancelled.inc()
                self._close(job)

    def cut(self, job: Job, why: str) -> None:
        """Answer with the samples that are there; DeadlineError where there is none."""
        with self._lock:
            if job.over or job.cutting:
                return
            job.cutting = True
            self.scheduler.end(job.queued)
            ready = job.ready
        if ready == 0:
            self._fail(job, DeadlineError(f"no sample was there in time ({why}); allow more time, or come again."))
        else:
            self._due(0, partial(self._refine, job, ready, why))

    def margin(self) -> float:
        """Seconds before a deadline at which a map has to be begun."""
        return LEAST_MARGIN + MARGIN * self.map_seconds

    def drain(self) -> None:
        """Take nothing new."""
        with self._lock:
            self.scheduler.drain()

    def jobs(self) -> list[Job]:
        """The requests that are not answered yet."""
        with self._lock:
            return list(self._jobs.values())

    def why_not_ready(self) -> str | None:
        """What keeps the service from serving, or None."""
        if self.scheduler.draining:
            return "shutting down"
        if not self._threads or not all(thread.is_alive() for thread in self._threads):
            return "the engines are not running"
        failing = [engine for engine, count in self._failures.items() if count >= FAILURES]
        return f"engine {', '.join(failing)} keeps failing" if len(failing) == len(self.engines) else None

    def stop(self) -> None:
        """End the threads; whoever still waits is told."""
        self.drain()
        for job in self.jobs():
            self._fail(job, DeadlineError("the server was shut down."))
        with self._lock:
            self._stopping = True
            self._lock.notify_all()
        self._due(2, lambda: None)
        for thread in self._threads:
            thread.join()
        self._threads = []

    # ---- engines ----

    def _run(self, number: int) -> None:
        """An engine's thread."""
        on_cpu = sum(engine.endswith("cpu") for engine in self.engines)
        if self.engines[number].endswith("cpu") and on_cpu > 1:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // on_cpu))
        while not self._stopping:
            batch = self._next(number)
            if batch is None:
                self._probe(number)
                continue
            began = self.clock()
            try:
                self._compute(number, batch.bucket, batch.parts)
            finally:
                self._account(number, batch, self.clock() - began)

    def _next(self, number: int) -> MicroBatch | None:
        """The next micro-batch, waited for; None at the end, and now and then where the engine fails."""
        with self._lock:
            while True:
                batch = self.scheduler.take(partial(self._capacity, number), self.clock())
                if batch is not None:
                    now = self.clock()
                    for part in batch.parts:
                        job = self._jobs.get(part.request)
                        if job is not None and job.started is None:
                            job.started = now
                            self.metrics.queue_wait.observe(now - job.admitted)
                    return batch
                failing = self._failures[self.engines[number]] >= FAILURES
                if self._stopping or (not self._lock.wait(PROBE_SECONDS if failing else None) and failing):
                    return None

    def _check(self, number: int) -> None:
        """A real explanation of every model; raises what it raises, NonFiniteError for a map that is not finite."""
        for model in self.models.values():
            made = model.explainers[number].explain(model.example(), n_samples=8)
            if not torch.isfinite(made.maps).all():
                raise NonFiniteError(f"engine {self.engines[number]}: a map of {model.name!r} is not finite.")

    def _probe(self, number: int) -> None:
        """An engine that kept failing is ready again when it explains the example: nobody may be sending it any."""
        if self._failures[self.engines[number]] < FAILURES or self._stopping:
            return
        try:
            self._check(number)
            self._failures[self.engines[number]] = 0
        except Exception:
            log.exception("an engine still fails", extra={"engine": self.engines[number]})

    def _capacity(self, number: int, bucket: Any) -> int:
        return self._rows[number, bucket[1]]

    def _account(self, number: int, batch: MicroBatch, seconds: float) -> None:
        with self._lock:
            self.scheduler.done(batch, seconds)
        self.metrics.batch_fill.observe(len(batch) / batch.capacity)
        self.metrics.device_time.labels(self.engines[number]).observe(seconds)
        self.metrics.rows.labels(self.engines[number]).inc(len(batch))

    def _compute(self, number: int, bucket: Any, parts: Sequence[Part]) -> None:
        """The parts that are still wanted; on an error by halves, until the one at fault is alone."""
        with self._lock:
            wanted = [(part, job) for part in parts if (job := self._jobs.get(part.request)) is not None]
        if not wanted:
            return
        compute = self._predict if bucket[0] == "predict" else self._contribute
        try:
            compute(number, wanted)
        except Exception as error:
            if len(wanted) > 1:
                middle = len(wanted) // 2
                for some in (wanted[:middle], wanted[middle:]):
                    self._compute(number, bucket, [part for part, _ in some])
                return
            if not isinstance(error, NonFiniteError | InputError):
                self._failures[self.engines[number]] += 1
                log.exception("an engine failed", extra={"engine": self.engines[number]})
            self._fail(wanted[0][1], error)

    def _predict(self, number: int, wanted: Sequence[tuple[Part, Job]]) -> None:
        """Unperturbed images: which classes are explained, and how probable they are."""
        explainer = wanted[0][1].model.explainers[number]
        output = explainer.predict(torch.stack([job.ask.image for _, job in wanted])).cpu()
        for (_, job), logits in zip(wanted, output, strict=True):
            probabilities = logits.softmax(0)
            targets = job.ask.targets or tuple(probabilities.topk(job.ask.top_k).indices.tolist())
            job.predicted = Predicted(probabilities, targets)
            job.listener(job.predicted)
            with self._lock:
                self.scheduler.proceed(job.queued)
                self._lock.notify_all()

    def _contribute(self, number: int, wanted: Sequence[tuple[Part, Job]]) -> None:
        """Perturbed rows: their contributions, each to its own job."""
        explainer = wanted[0][1].model.explainers[number]
        made = explainer.contributions(
            torch.stack([job.ask.image for _, job in wanted]),
            join([job.draws[part.start : part.stop] for part, job in wanted]),
            torch.tensor([job.predicted.targets for _, job in wanted if job.predicted is not None]),
        )
        self._failures[self.engines[number]] = 0
        row = 0
        for part, job in wanted:
            own = made[:, row : row + part.stop - part.start]
            row += part.stop - part.start
            if torch.isfinite(own).all():
                self._gather(job, part, own)
            else:
                self._fail(job, NonFiniteError("NaN or infinity in the attribution of this image. Try another image."))

    def _gather(self, job: Job, part: Part, own: Tensor) -> None:
        with self._lock:
            if job.over:
                return
            buffer = job.buffer(own)
        buffer[:, part.start : part.stop] = own
        with self._lock:
            due = job.arrived(part.start, part.stop)
        for samples in due:
            self._due(1, partial(self._refine, job, samples, None))

    # ---- maps ----

    def _due(self, priority: int, make: Callable[[], None]) -> None:
        """Have something done by the maps' thread: 0 at once, 1 in turn, 2 last of all."""
        self._maps.put((priority, next(self._numbers), make))

    def _make_maps(self) -> None:
        """The maps' thread."""
        while True:
            _, _, make = self._maps.get()
            make()
            if self._stopping and self._maps.empty():
                return

    def _refine(self, job: Job, samples: int, why: str | None) -> None:
        """The map of the first samples: an answer, or news on the way to it."""
        with self._lock:
            contributions = job.contributions
            if job.over or contributions is None or (job.cutting and why is None):
                return
        began = self.clock()
        try:
            refined = refine(self._explainer(job), contributions[:, :samples])
            if not torch.isfinite(refined.maps).all():
                raise NonFiniteError("NaN or infinity in the map of this image. Try another image.")
        except Exception as error:
            log.exception("a map could not be made")
            self._fail(job, error)
            return
        self.map_seconds = self.clock() - began
        tolerance = job.ask.tolerance
        if why is not None:
            self._end(job, refined, why)
        elif samples == job.ask.n_samples:
            self._end(job, refined, None)
        elif tolerance is not None and refined.bound <= tolerance:
            self._end(job, refined, "tolerance")
        elif job.ask.refined:
            job.listener(refined)

    @staticmethod
    def _explainer(job: Job) -> DAVE:
        """One whose device holds the contributions."""
        assert job.contributions is not None
        held = job.contributions.device
        return next(explainer for explainer in job.model.explainers if explainer.device == held)

    # ---- ends ----

    def _close(self, job: Job) -> bool:
        """Whether the job was still open; its rows and memory are given back. Under the lock."""
        if job.over:
            return False
        job.over = True
        job.contributions = None
        self._jobs.pop(job.queued, None)
        self.scheduler.end(job.queued)
        return True

    def _end(self, job: Job, refined: Refined, cut_short: str | None) -> None:
        with self._lock:
            if not self._close(job):
                return
        now = self.clock()
        assert job.predicted is not None and job.started is not None
        self.metrics.answers.labels(job.model.name, cut_short or "samples").inc()
        self.metrics.samples.observe(refined.samples)
        self.metrics.latency.observe(now - job.admitted)
        if job.ask.deadline is not None and now > job.ask.deadline:
            self.metrics.deadline_misses.inc()
        job.listener(Ended(job.predicted, refined, cut_short, job.started - job.admitted, now - job.admitted))

    def _fail(self, job: Job, error: Exception) -> None:
        with self._lock:
            if not self._close(job):
                return
        self.metrics.errors.labels(type(error).__name__).inc()
        if isinstance(error, DeadlineError):
            self.metrics.deadline_misses.inc()
        job.listener(Failed(error))
