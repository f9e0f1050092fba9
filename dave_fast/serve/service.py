"""The service: workers compute micro-batches, and contributions become maps with error estimates.

A worker (`workers`) is a thread with one device that takes micro-batches from the scheduler; one more thread makes
maps. They share one lock, which is never held while anything is computed. The listener of a request is called from
these threads.
"""

from __future__ import annotations

import itertools
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from dave_fast.engine.free_memory import SHARE, free_bytes
from dave_fast.engine.levels import Pulled
from dave_fast.errors import InputError, NonFiniteError
from dave_fast.explain.convergence import Refined, refined
from dave_fast.serve.account import Account
from dave_fast.serve.jobs import Ask, DeadlineError, Ended, Job, Listener
from dave_fast.serve.limits import Limits
from dave_fast.serve.models import ServedModel
from dave_fast.serve.scheduler import Queued, Scheduler
from dave_fast.serve.workers import BatchKey, SharedState, Worker

log = logging.getLogger("dave_fast.serve")

# Time reserved before a deadline to make a map: a multiple of what the latest map took, and seconds added to it.
MARGIN, LEAST_MARGIN = 1.5, 0.003


class Service:
    """Explanations for many callers at once. `start` comes before the first request, `stop` after the last.

    Args:
        models: the served models by name, with equally many explainers each.
        limits: the bounds of the queue; None: the defaults.

    Attributes:
        account: of the memory of this machine that requests take.
        metrics: where measurements go.
        workers: the workers, one for each explainer of a model.
        shared: the state shared with the workers.
        map_seconds: seconds that the latest map took.
    """

    def __init__(self, models: Mapping[str, ServedModel], limits: Limits | None = None) -> None:
        self.models = dict(models)
        explainers = next(iter(self.models.values())).explainers
        limits = limits or Limits()
        self.account = Account(limits.memory_bytes or int(SHARE * free_bytes(torch.device("cpu"))))
        devices = [explainer.device for explainer in explainers if explainer.device.type != "cpu"]
        fitting = min((int(SHARE * free_bytes(device)) for device in devices), default=self.account.most)
        limits = replace(limits, queue_bytes=limits.queue_bytes or fitting)
        # On a CPU the queue is in the same memory as all else.
        scheduler = Scheduler(limits, None if devices else self.account)
        self.shared = SharedState(self.models, scheduler)
        self.metrics = self.shared.metrics
        self.workers = [Worker(number, self.shared, self._map_due) for number in range(len(explainers))]
        self._maps: queue.PriorityQueue[tuple[int, int, Callable[[], None]]] = queue.PriorityQueue()
        self._numbers = itertools.count()
        self._threads: list[threading.Thread] = []
        self.map_seconds = 0.0

    @property
    def scheduler(self) -> Scheduler:
        """The queue."""
        return self.shared.scheduler

    def start(self) -> None:
        """Explain an example with every worker and check it, then start the threads.

        Raises:
            NonFiniteError: a map is not finite.
            Exception: any error of the explanation.
        """
        for worker in self.workers:
            worker.warm()
        for model in self.models.values():
            # Found now: the model may have to be run for it, and no request shall wait for that.
            _ = model.blocks
        on_cpu = sum(worker.device.type == "cpu" for worker in self.workers)
        runs = [threading.Thread(target=worker.run, args=(on_cpu,), daemon=True) for worker in self.workers]
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
        now = time.monotonic()
        queued = Queued(
            bucket=BatchKey(name, ask.classes, ask.levels),
            samples=ask.n_samples,
            size=model.request_bytes(ask.classes, ask.n_samples, ask.places),
            deadline=math.inf if ask.deadline is None else ask.deadline,
            first=BatchKey(name, None),
        )
        job = Job(model, ask, queued, listener, now)
        with self.shared.lock:
            self.scheduler.submit(queued, now)
            self.shared.jobs[queued] = job
            self.shared.lock.notify_all()
        return job

    def cancel(self, job: Job) -> None:
        """End a request without an answer: its client is gone."""
        with self.shared.lock:
            if not job.over:
                self.metrics.cancelled.inc()
                self.shared.close(job)

    def cut(self, job: Job, why: str) -> None:
        """End a request early: answer with the samples that are done, or fail with DeadlineError if there are none."""
        with self.shared.lock:
            if job.over or job.cutting:
                return
            job.cutting = True
            self.scheduler.end(job.queued)
            ready = job.ready
        if ready == 0:
            self.shared.fail(job, DeadlineError(f"no sample was done in time ({why}); allow more time, or try again."))
        else:
            self._queue_map(0, partial(self._refine, job, ready, why))

    def margin(self) -> float:
        """Return the seconds before a deadline at which a map must be started."""
        return LEAST_MARGIN + MARGIN * self.map_seconds

    def drain(self) -> None:
        """Refuse new requests."""
        with self.shared.lock:
            self.scheduler.drain()

    def jobs(self) -> list[Job]:
        """Return the requests that are not answered yet."""
        with self.shared.lock:
            return list(self.shared.jobs.values())

    def why_not_ready(self) -> str | None:
        """Return why the service cannot answer requests, or None if it can."""
        if self.scheduler.draining:
            return "shutting down"
        if not self._threads or not all(thread.is_alive() for thread in self._threads):
            return "the workers are not running"
        failing = [worker.name for worker in self.workers if not worker.ready]
        return f"worker {', '.join(failing)} keeps failing" if len(failing) == len(self.workers) else None

    def stop(self) -> None:
        """Fail the requests that are not answered, and end the threads."""
        self.drain()
        for job in self.jobs():
            self.shared.fail(job, DeadlineError("the server was shut down."))
        with self.shared.lock:
            self.shared.stopping = True
            self.shared.lock.notify_all()
        self._queue_map(2, lambda: None)
        for thread in self._threads:
            thread.join()
        self._threads = []

    # Maps.

    def _queue_map(self, priority: int, make: Callable[[], None]) -> None:
        """Queue a call for the maps' thread; priority 0 comes first, 2 last."""
        self._maps.put((priority, next(self._numbers), make))

    def _map_due(self, job: Job, samples: int) -> None:
        """Queue the map of a job's first samples."""
        self._queue_map(1, partial(self._refine, job, samples, None))

    def _make_maps(self) -> None:
        """Make maps until the service stops: the main function of the maps' thread."""
        while True:
            _, _, make = self._maps.get()
            make()
            if self.shared.stopping and self._maps.empty():
                return

    def _refine(self, job: Job, samples: int, why: str | None) -> None:
        """Make the map of a job's first samples, and answer with it or report it; `why` is what cut the job short."""
        with self.shared.lock:
            kept = job.kept
            if job.over or kept is None or (job.cutting and why is None):
                return
        began = time.monotonic()
        try:
            made = _refined(job, kept, samples)
            if not torch.isfinite(made.maps).all():
                raise NonFiniteError("NaN or infinity in the map of this image. Try another image.")
        except Exception as error:
            log.exception("a map could not be made")
            self.shared.fail(job, error)
            return
        self.map_seconds = time.monotonic() - began
        tolerance = job.ask.tolerance
        if why is not None:
            self._end(job, made, why)
        elif samples == job.ask.n_samples:
            self._end(job, made, None)
        elif tolerance is not None and made.bound <= tolerance:
            self._end(job, made, "tolerance")
        elif job.ask.refined:
            job.listener(made)

    def _end(self, job: Job, refined: Refined, cut_short: str | None) -> None:
        """Answer a job."""
        with self.shared.lock:
            if not self.shared.close(job):
                return
        now = time.monotonic()
        assert job.predicted is not None and job.started is not None
        self.metrics.answers.labels(job.model.name, cut_short or "samples").inc()
        self.metrics.samples.observe(refined.samples)
        self.metrics.latency.observe(now - job.admitted)
        if job.ask.deadline is not None and now > job.ask.deadline:
            self.metrics.deadline_misses.inc()
        job.listener(Ended(job.predicted, refined, cut_short, job.started - job.admitted, now - job.admitted))


def _refined(job: Job, kept: Pulled, samples: int) -> Refined:
    """Return the maps of a job's first samples, and their errors.

    Args:
        job: the request.
        kept: what its samples tell, (K, S, ...).
        samples: how many of them are taken.
    """
    ask, device = job.ask, kept.tensors()[0].device
    # The explainer of the device that holds the samples.
    explainer = next(each for each in job.model.explainers if each.device == device)
    shrink = explainer.shrink if ask.shrink is None else ask.shrink

    def aggregate(some: slice) -> tuple[Tensor, Tensor]:
        own, draws = kept.part(some), job.draws[some]
        raw, maps = explainer.aggregate_levels(ask.image[None], own, draws, ask.places, job.model.blocks, shrink=shrink)
        return (raw, maps) if len(ask.places) > 1 else (raw[:, 0], maps[:, 0])

    return refined(aggregate, samples, shrink=shrink, places=ask.places)
