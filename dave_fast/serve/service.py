"""The service: workers compute micro-batches, and contributions become maps with error estimates.

A worker (`workers`) is a thread with one device that takes micro-batches from the scheduler; one more thread makes
maps (`maps`). They share one lock, which is never held while anything is computed. The listener of a request is called
from these threads.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Mapping
from dataclasses import replace

import torch

from dave_fast.engine.free_memory import SHARE, free_bytes
from dave_fast.errors import InputError
from dave_fast.explain.convergence import Refined
from dave_fast.serve.account import Account
from dave_fast.serve.jobs import Ask, DeadlineError, Ended, Job, Listener
from dave_fast.serve.limits import Limits
from dave_fast.serve.maps import MapMaker
from dave_fast.serve.models import ServedModel
from dave_fast.serve.scheduler import Queued, Scheduler
from dave_fast.serve.workers import BatchKey, SharedState, Worker

log = logging.getLogger("dave_fast.serve")


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
        maps: the maker of maps.
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
        self.maps = MapMaker(self._made, self.shared.fail)
        self._threads: list[threading.Thread] = []

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
            _ = model.blocks, model.questions
        on_cpu = sum(worker.device.type == "cpu" for worker in self.workers)
        runs = [threading.Thread(target=worker.run, args=(on_cpu,), daemon=True) for worker in self.workers]
        self._threads = [*runs, threading.Thread(target=self.maps.run, daemon=True)]
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
        asked = [target for target in ask.targets or () if isinstance(target, int)]
        most = ask.top_k if ask.targets is None else len(asked)
        if most > model.classes or any(not 0 <= target < model.classes for target in asked):
            classes = f"the classes {asked}" if asked else f"the {ask.top_k} most probable classes"
            raise InputError(f"{classes} are requested; {name!r} has the classes 0 to {model.classes - 1}.")
        now = time.monotonic()
        queued = Queued(
            bucket=BatchKey(name, ask.classes, ask.levels, ask.of_classes),
            samples=ask.n_samples,
            size=model.request_bytes(ask.classes, ask.n_samples, ask.places),
            deadline=math.inf if ask.deadline is None else ask.deadline,
            # Where depths are asked for, the prediction tells what each accounts for, which takes longer.
            first=BatchKey(name, None, ask.levels),
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
        """End a request early: answer with the samples that are done, or fail with DeadlineError if there are none.

        Where all are done, the maps of all are on their way already.
        """
        with self.shared.lock:
            if job.over or job.cutting or (job.ready == job.ask.n_samples and job.ask.tolerance is None):
                return
            job.cutting = True
            self.scheduler.end(job.queued)
            ready = job.ready
        if ready == 0:
            self.shared.fail(job, DeadlineError(f"no sample was done in time ({why}); allow more time, or try again."))
        else:
            self.maps.put(job, ready, why)

    def time_left(self, job: Job, deadline: float) -> float:
        """Return the seconds that are left before a job has to be cut for its maps to be made by a deadline.

        Args:
            job: the job.
            deadline: by `time.monotonic`.
        """
        return deadline - time.monotonic() - self.maps.margin(job, job.ready)

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

    def fail_all(self) -> None:
        """Fail the requests that are not answered."""
        for job in self.jobs():
            self.shared.fail(job, DeadlineError("the server was shut down."))

    def stop(self) -> None:
        """Fail the requests that are not answered, and end the threads."""
        self.drain()
        self.fail_all()
        with self.shared.lock:
            self.shared.stopping = True
            self.shared.lock.notify_all()
        self.maps.stop()
        for thread in self._threads:
            thread.join()
        self._threads = []

    # Maps.

    def _map_due(self, job: Job, samples: int) -> None:
        """Queue the maps of a job's first samples."""
        self.maps.put(job, samples, None)

    def _made(self, job: Job, made: Refined, why: str | None) -> None:
        """Answer a job with its maps, or report them; `why` is what cut the job short."""
        tolerance = job.ask.tolerance
        if why is not None:
            self._end(job, made, why)
        elif made.samples == job.ask.n_samples:
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
