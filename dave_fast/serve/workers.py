"""The workers of a service: threads with one device each, which compute micro-batches.

After an error in a micro-batch its requests are tried again in two halves, and so on, until the request at fault is
alone. NaN among a request's contributions fails that request only.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dave_fast.engine.levels import PIXELS, Levels, Pulled
from dave_fast.errors import InputError, NonFiniteError
from dave_fast.explain.explainer import DAVE
from dave_fast.models.meaning import probabilities
from dave_fast.sampling import join
from dave_fast.serve.jobs import DeadlineError, Failed, Job, Predicted
from dave_fast.serve.models import ServedModel
from dave_fast.serve.prometheus import Metrics
from dave_fast.serve.scheduler import MicroBatch, Part, Queued, Scheduler
from dave_fast.targets import Question, Target
from dave_fast.targets.cotangents import Cotangent

log = logging.getLogger("dave_fast.serve")

# Failed micro-batches in a row after which a worker is no longer ready.
FAILURES = 5
# Seconds after which a worker that is not ready is tried again if there are no requests.
PROBE_SECONDS = 2.0


@dataclass(frozen=True)
class BatchKey:
    """The scheduler's bucket of a row: rows with equal keys may share a micro-batch.

    Attributes:
        model: name of the served model.
        classes: number of classes or other questions; None for the unperturbed image, whose classes are predicted.
        levels: of the walks. Rows of other levels are not walked with these: they would be walked further than asked.
        of_classes: whether classes alone are explained, whose cotangents are one for all images.
    """

    model: str
    classes: int | None
    levels: Levels = PIXELS
    of_classes: bool = True


@dataclass
class SharedState:
    """The state that the threads of a service share. All but `models` and `metrics` is used under `lock`.

    Attributes:
        models: the served models by name.
        scheduler: the queue.
        metrics: where measurements go.
        jobs: the open jobs.
        lock: notified when rows may have become available, and at the end.
        stopping: whether the threads are to end.
    """

    models: Mapping[str, ServedModel]
    scheduler: Scheduler
    metrics: Metrics = field(default_factory=Metrics)
    jobs: dict[Queued, Job] = field(default_factory=dict)
    lock: threading.Condition = field(default_factory=threading.Condition)
    stopping: bool = False

    def close(self, job: Job) -> bool:
        """Close a job and free its rows and memory; return False if it was closed. To be called under the lock."""
        if job.over:
            return False
        job.over = True
        job.kept, job.making = None, []
        self.jobs.pop(job.queued, None)
        self.scheduler.end(job.queued)
        return True

    def fail(self, job: Job, error: Exception) -> None:
        """Fail a job."""
        with self.lock:
            if not self.close(job):
                return
        self.metrics.errors.labels(type(error).__name__).inc()
        if isinstance(error, DeadlineError):
            self.metrics.deadline_misses.inc()
        job.listener(Failed(error))


class Worker:
    """A worker; `run` is the main function of its thread.

    Args:
        number: its number, by which it takes an explainer of each model.
        shared: the state shared with the service.
        due: called with a job and a number of samples of which a map is due.

    Attributes:
        name: NUMBER:DEVICE, the value of the metrics' label `engine`.
        failures: failed micro-batches in a row.
    """

    def __init__(self, number: int, shared: SharedState, due: Callable[[Job, int], None]) -> None:
        self.shared, self._due = shared, due
        self.explainers = {name: model.explainers[number] for name, model in shared.models.items()}
        self.device = next(iter(self.explainers.values())).device
        self.name = f"{number}:{self.device}"
        self.failures = 0
        # Rows of a micro-batch, by model.
        self._rows: dict[str, int] = {}

    @property
    def ready(self) -> bool:
        """Whether it has not failed too often in a row."""
        return self.failures < FAILURES

    def warm(self) -> None:
        """Explain an example with every model and measure how many rows fit a micro-batch.

        Raises:
            NonFiniteError: a map is not finite.
            Exception: any error of the explanation.
        """
        self._check()
        for name, model in self.shared.models.items():
            self._rows[name] = self.explainers[name].fitting_rows(model.example())

    def run(self, on_cpu: int) -> None:
        """Compute micro-batches until the service stops; `on_cpu` workers share the processor."""
        if self.device.type == "cpu" and on_cpu > 1:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // on_cpu))
        while not self.shared.stopping:
            batch = self._next()
            if batch is None:
                self._probe()
                continue
            began = time.monotonic()
            try:
                self._compute(batch.bucket, batch.parts)
            finally:
                self._account(batch, time.monotonic() - began)

    def _next(self) -> MicroBatch | None:
        """Wait for a micro-batch; return None at the end, and after PROBE_SECONDS if the worker is not ready."""
        shared = self.shared
        with shared.lock:
            while True:
                now = time.monotonic()
                batch = shared.scheduler.take(lambda key: self._rows[key.model], now)
                if batch is not None:
                    for part in batch.parts:
                        job = shared.jobs.get(part.request)
                        if job is not None and job.started is None:
                            job.started = now
                            shared.metrics.queue_wait.observe(now - job.admitted)
                    return batch
                ready = self.ready
                if shared.stopping or (not shared.lock.wait(None if ready else PROBE_SECONDS) and not ready):
                    return None

    def _check(self) -> None:
        """Explain an example with every model; raise NonFiniteError for a map that is not finite."""
        for name, model in self.shared.models.items():
            made = self.explainers[name].explain(model.example(), None if model.classes else _any_score, n_samples=8)
            if not torch.isfinite(made.maps).all():
                raise NonFiniteError(f"worker {self.name}: a map of {name!r} is not finite.")

    def _probe(self) -> None:
        """Try an example if the worker is not ready; if it succeeds the worker is ready again."""
        if self.ready or self.shared.stopping:
            return
        try:
            self._check()
            self.failures = 0
        except Exception:
            log.exception("a worker still fails", extra={"engine": self.name})

    def _account(self, batch: MicroBatch, seconds: float) -> None:
        metrics = self.shared.metrics
        with self.shared.lock:
            self.shared.scheduler.done(batch, seconds)
        metrics.batch_fill.observe(len(batch) / batch.capacity)
        metrics.device_time.labels(self.name).observe(seconds)
        metrics.rows.labels(self.name).inc(len(batch))

    def _compute(self, key: BatchKey, parts: Sequence[Part]) -> None:
        """Compute the parts whose request is still open; after an error, each half of them again."""
        with self.shared.lock:
            wanted = [(part, job) for part in parts if (job := self.shared.jobs.get(part.request)) is not None]
        if not wanted:
            return
        compute = self._predict if key.classes is None else self._contribute
        try:
            compute(key, wanted)
        except Exception as error:
            if len(wanted) > 1:
                middle = len(wanted) // 2
                for some in (wanted[:middle], wanted[middle:]):
                    self._compute(key, [part for part, _ in some])
                return
            if not isinstance(error, NonFiniteError | InputError):
                self.failures += 1
                log.exception("a worker failed", extra={"engine": self.name})
            self.shared.fail(wanted[0][1], error)

    def _predict(self, key: BatchKey, wanted: Sequence[tuple[Part, Job]]) -> None:
        """Predict unperturbed images and choose the classes to explain."""
        explainer = self.explainers[key.model]
        output = explainer.predict(torch.stack([job.ask.image for _, job in wanted]))
        # All of them before the first is told: after an error they are computed again.
        predicted = [_predicted(explainer, job, each) for (_, job), each in zip(wanted, output.split(1), strict=True)]
        for (_, job), one in zip(wanted, predicted, strict=True):
            job.predicted = one
            job.listener(one)
            with self.shared.lock:
                self.shared.scheduler.proceed(job.queued)
                self.shared.lock.notify_all()

    def _contribute(self, key: BatchKey, wanted: Sequence[tuple[Part, Job]]) -> None:
        """Compute the contributions and evidence of perturbed rows and store them with their jobs."""
        predicted = [job.predicted for _, job in wanted if job.predicted is not None]
        made = self.explainers[key.model].samples(
            torch.stack([job.ask.image for _, job in wanted]),
            join([job.draws[part.start : part.stop] for part, job in wanted]),
            torch.tensor([each.targets for each in predicted])
            if key.of_classes
            else [each.cotangents for each in predicted],
            key.levels,
        )
        self.failures = 0
        stop = 0
        for part, job in wanted:
            start, stop = stop, stop + len(part)
            own = made.part(slice(start, stop))
            if all(torch.isfinite(tensor).all() for tensor in own.tensors()):
                self._gather(job, part, own)
            else:
                error = NonFiniteError("NaN or infinity in the attribution of this image. Try another image.")
                self.shared.fail(job, error)

    def _gather(self, job: Job, part: Part, own: Pulled) -> None:
        """Store what some rows told, (K, rows, ...), with their job, and report the maps that are now due."""
        with self.shared.lock:
            if job.over:
                return
            if job.kept is None:
                job.kept = own.map(lambda t: t.new_empty((len(t), job.ask.n_samples, *t.shape[2:])))
            memory = job.kept
        for buffer, values in zip(memory.tensors(), own.tensors(), strict=True):
            buffer[:, part.start : part.stop] = values
        with self.shared.lock:
            due = job.arrived(part.start, part.stop)
        for samples in due:
            self._due(job, samples)


def _predicted(explainer: DAVE, job: Job, output: Tensor) -> Predicted:
    """Return what is explained, and what of the scores each depth accounts for where more than pixels is asked.

    Args:
        explainer: of the model.
        job: the request.
        output: of the model for its image, (1, ...), on the explainer's device.
    """
    ask, scores = job.ask, output.cpu()
    probability = probabilities(explainer.model, scores)[0] if job.model.classes else torch.empty(0)
    scores = scores[0] if job.model.classes else torch.empty(0)
    targets = ask.targets or tuple(scores.topk(ask.top_k).indices.tolist())
    asked: Sequence[Target] = targets
    cotangents: list[Cotangent] = []
    if not ask.of_classes:
        # A tokenizer cannot be used by two threads.
        with job.model.binding:
            asked = [explainer.bind(each) if isinstance(each, Question) else each for each in targets]
        image = ask.image[None].to(output.device)
        cotangents = [explainer.resolve(each, output, image) for each in asked]
    told = None if ask.levels == PIXELS else explainer.depths(ask.image, targets=asked).map(lambda t: t[0].cpu())
    return Predicted(scores, probability, targets, told, tuple(cotangents))


def _any_score(output: Tensor) -> Tensor:
    """Return a score (R,) of any output (R, ...), to test a model without classes."""
    return output.flatten(1).sum(1)
