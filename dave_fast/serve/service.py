"""The service: workers compute micro-batches, and contributions become maps with error estimates.

A worker is a thread with one device that takes micro-batches from the scheduler; one more thread makes maps. They
share one lock, which is never held while anything is computed. The listener of a request is called from these threads.

After an error in a micro-batch its requests are tried again in two halves, and so on, until the request at fault is
alone. NaN among a request's contributions fails that request only.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

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

# Failed micro-batches in a row after which a worker is no longer ready.
FAILURES = 5
# Seconds after which a worker that is not ready is tried again if there are no requests.
PROBE_SECONDS = 2.0
# Time reserved before a deadline to make a map: a multiple of what the latest map took, and seconds added to it.
MARGIN, LEAST_MARGIN = 1.5, 0.003


class DeadlineError(DaveFastError, TimeoutError):
    """No sample was computed before the deadline."""


@dataclass(frozen=True)
class BatchKey:
    """The scheduler's bucket of a row: rows with equal keys may share a micro-batch.

    Attributes:
        model: name of the served model.
        size: (H, W) of the model's input.
        classes: number of classes that are explained; None for the unperturbed image, whose classes are predicted.
    """

    model: str
    size: tuple[int, int]
    classes: int | None


class Service:
    """Explanations for many callers at once. `start` comes before the first request, `stop` after the last.

    Args:
        models: the served models by name, with equally many explainers each.
        limits: the bounds of the queue; None: the defaults.
        metrics: where measurements go; None: new ones.
        clock: seconds, for deadlines and measurements.

    Attributes:
        workers: names of the workers, as in the metrics' label `engine`.
        map_seconds: seconds that the latest map took.
    """

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
        self.workers = [f"{number}:{explainer.device}" for number, explainer in enumerate(explainers)]
        limits = limits or Limits()
        fitting = min(int(SHARE * free_bytes(explainer.device)) for explainer in explainers)
        self.scheduler = Scheduler(QueueLimits(limits.requests, limits.rows, limits.queue_bytes or fitting))
        self._jobs: dict[Queued, Job] = {}
        self._lock = threading.Condition()
        self._stopping = False
        self._failures = dict.fromkeys(self.workers, 0)
        self._rows: dict[tuple[int, str], int] = {}
        self._maps: queue.PriorityQueue[tuple[int, int, Callable[[], None]]] = queue.PriorityQueue()
        self._numbers = itertools.count()
        self._threads: list[threading.Thread] = []
        self.map_seconds = 0.0

    def start(self) -> None:
        """Explain an example with every worker and check it, then start the threads.

        Raises:
            NonFiniteError: a map is not finite.
            Exception: any error of the explanation.
        """
        for number in range(len(self.workers)):
            self._check(number)
            for model in self.models.values():
                self._rows[number, model.name] = model.explainers[number].fitting_rows(model.example())
        runs = [threading.Thread(target=self._run, args=(number,), daemon=True) for number in range(len(self.workers))]
        self._threads = [*runs, threading.Thread(target=self._make_maps, daemon=True)]
        for thread in self._threads:
            thread.start()

    def submit(self, name: str, ask: Ask, listener: Listener) -> Job:
        """Add a request to the queue.

        Args:
            name: the served model.
            ask: the request.
            listener: called with the request's events.

        Raises:
            RefusedError: the queue is full, or the service is shutting down.
            InputError: the model has no such class.
        """
        model = self.models[name]
        if ask.classes > model.classes or any(not 0 <= target < model.classes for target in ask.targets or ()):
            classes = f"the classes {list(ask.targets)}" if ask.targets else f"the {ask.top_k} most probable classes"
            raise InputError(f"{classes} are requested; {name!r} has the classes 0 to {model.classes - 1}.")
        now = self.clock()
        queued = Queued(
            bucket=BatchKey(name, model.prepare.size, ask.classes),
            samples=ask.n_samples,
            size=model.request_bytes(ask.classes, ask.n_samples),
            deadline=math.inf if ask.deadline is None else ask.deadline,
            first=BatchKey(name, model.prepare.size, None),
        )
        job = Job(model, ask, queued, listener, now)
        with self._lock:
            self.scheduler.submit(queued, now)
            self._jobs[queued] = job
            self._lock.notify_all()
        return job

    def cancel(self, job: Job) -> None:
        """End a request without an answer: its client is gone."""
        with self._lock:
            if not job.over:
                self.metrics.cancelled.inc()
                self._close(job)

    def cut(self, job: Job, why: str) -> None:
        """End a request early: answer with the samples that are done, or fail with DeadlineError if there are none."""
        with self._lock:
            if job.over or job.cutting:
                return
            job.cutting = True
            self.scheduler.end(job.queued)
            ready = job.ready
        if ready == 0:
            self._fail(job, DeadlineError(f"no sample was done in time ({why}); allow more time, or try again."))
        else:
            self._due(0, partial(self._refine, job, ready, why))

    def margin(self) -> float:
        """Return the seconds before a deadline at which a map must be started."""
        return LEAST_MARGIN + MARGIN * self.map_seconds

    def drain(self) -> None:
        """Refuse new requests."""
        with self._lock:
            self.scheduler.drain()

    def jobs(self) -> list[Job]:
        """Return the requests that are not answered yet."""
        with self._lock:
            return list(self._jobs.values())

    def why_not_ready(self) -> str | None:
        """Return why the service cannot answer requests, or None if it can."""
        if self.scheduler.draining:
            return "shutting down"
        if not self._threads or not all(thread.is_alive() for thread in self._threads):
            return "the workers are not running"
        failing = [worker for worker, count in self._failures.items() if count >= FAILURES]
        return f"worker {', '.join(failing)} keeps failing" if len(failing) == len(self.workers) else None

    def stop(self) -> None:
        """Fail the requests that are not answered, and end the threads."""
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

    # Workers, each known by its number.

    def _run(self, number: int) -> None:
        """Compute micro-batches until the service stops: the main function of a worker."""
        on_cpu = sum(worker.endswith("cpu") for worker in self.workers)
        if self.workers[number].endswith("cpu") and on_cpu > 1:
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
        """Wait for a micro-batch; return None at the end, and after PROBE_SECONDS if the worker is not ready."""
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
                failing = self._failures[self.workers[number]] >= FAILURES
                if self._stopping or (not self._lock.wait(PROBE_SECONDS if failing else None) and failing):
                    return None

    def _check(self, number: int) -> None:
        """Explain an example with every model; raise NonFiniteError for a map that is not finite."""
        for model in self.models.values():
            made = model.explainers[number].explain(model.example(), n_samples=8)
            if not torch.isfinite(made.maps).all():
                raise NonFiniteError(f"worker {self.workers[number]}: a map of {model.name!r} is not finite.")

    def _probe(self, number: int) -> None:
        """Try an example with a worker that is not ready; if it succeeds the worker is ready again."""
        if self._failures[self.workers[number]] < FAILURES or self._stopping:
            return
        try:
            self._check(number)
            self._failures[self.workers[number]] = 0
        except Exception:
            log.exception("a worker still fails", extra={"engine": self.workers[number]})

    def _capacity(self, number: int, key: Hashable) -> int:
        assert isinstance(key, BatchKey)
        return self._rows[number, key.model]

    def _account(self, number: int, batch: MicroBatch, seconds: float) -> None:
        with self._lock:
            self.scheduler.done(batch, seconds)
        self.metrics.batch_fill.observe(len(batch) / batch.capacity)
        self.metrics.device_time.labels(self.workers[number]).observe(seconds)
        self.metrics.rows.labels(self.workers[number]).inc(len(batch))

    def _compute(self, number: int, key: Hashable, parts: Sequence[Part]) -> None:
        """Compute the parts whose request is still open; after an error, each half of them again."""
        with self._lock:
            wanted = [(part, job) for part in parts if (job := self._jobs.get(part.request)) is not None]
        if not wanted:
            return
        assert isinstance(key, BatchKey)
        compute = self._predict if key.classes is None else self._contribute
        try:
            compute(number, wanted)
        except Exception as error:
            if len(wanted) > 1:
                middle = len(wanted) // 2
                for some in (wanted[:middle], wanted[middle:]):
                    self._compute(number, key, [part for part, _ in some])
                return
            if not isinstance(error, NonFiniteError | InputError):
                self._failures[self.workers[number]] += 1
                log.exception("a worker failed", extra={"engine": self.workers[number]})
            self._fail(wanted[0][1], error)

    def _predict(self, number: int, wanted: Sequence[tuple[Part, Job]]) -> None:
        """Predict unperturbed images: choose the classes to explain."""
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
        """Compute the contributions of perturbed rows and store them with their jobs."""
        explainer = wanted[0][1].model.explainers[number]
        made = explainer.contributions(
            torch.stack([job.ask.image for _, job in wanted]),
            join([job.draws[part.start : part.stop] for part, job in wanted]),
            torch.tensor([job.predicted.targets for _, job in wanted if job.predicted is not None]),
        )
        self._failures[self.workers[number]] = 0
        row = 0
        for part, job in wanted:
            own = made[:, row : row + part.stop - part.start]
            row += part.stop - part.start
            if torch.isfinite(own).all():
                self._gather(job, part, own)
            else:
                self._fail(job, NonFiniteError("NaN or infinity in the attribution of this image. Try another image."))

    def _gather(self, job: Job, part: Part, own: Tensor) -> None:
        """Store contributions (K, rows, C, H, W) with their job, and queue the maps that are now due."""
        with self._lock:
            if job.over:
                return
            buffer = job.buffer(own)
        buffer[:, part.start : part.stop] = own
        with self._lock:
            due = job.arrived(part.start, part.stop)
        for samples in due:
            self._due(1, partial(self._refine, job, samples, None))

    # Maps.

    def _due(self, priority: int, make: Callable[[], None]) -> None:
        """Queue a call for the maps' thread; priority 0 comes first, 2 last."""
        self._maps.put((priority, next(self._numbers), make))

    def _make_maps(self) -> None:
        """Make maps until the service stops: the main function of the maps' thread."""
        while True:
            _, _, make = self._maps.get()
            make()
            if self._stopping and self._maps.empty():
                return

    def _refine(self, job: Job, samples: int, why: str | None) -> None:
        """Make the map of a job's first samples, and answer with it or report it.

        Args:
            job: the job.
            samples: how many samples, from the first.
            why: what cut the job short, or None.
        """
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
        """Return the explainer of the device that holds the contributions."""
        assert job.contributions is not None
        device = job.contributions.device
        return next(explainer for explainer in job.model.explainers if explainer.device == device)

    # Ends.

    def _close(self, job: Job) -> bool:
        """Close a job and free its rows and memory; return False if it was closed. To be called under the lock."""
        if job.over:
            return False
        job.over = True
        job.contributions = None
        self._jobs.pop(job.queued, None)
        self.scheduler.end(job.queued)
        return True

    def _end(self, job: Job, refined: Refined, cut_short: str | None) -> None:
        """Answer a job."""
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
        """Fail a job."""
        with self._lock:
            if not self._close(job):
                return
        self.metrics.errors.labels(type(error).__name__).inc()
        if isinstance(error, DeadlineError):
            self.metrics.deadline_misses.inc()
        job.listener(Failed(error))
