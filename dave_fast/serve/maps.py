"""The maps of a service: a thread that makes them from the samples that are done.

The maps of one request may take seconds (ten classes at ten depths), those of another milliseconds. They are made class
by class. A request stands in the queue at the time when its maps were due, plus `PATIENCE` times what its classes have
taken so far; one whose time is up stands `HEAD_START` seconds before. So small maps wait for one class of large ones,
and large ones, however many small ones come, for `PATIENCE` times their own time and what was due before.

A request has one set of maps at a time in the making, so that what it holds is bounded. With a tolerance those of its
next checkpoint follow, otherwise the newest, since newer maps take the place of those that wait.
"""

from __future__ import annotations

import itertools
import logging
import math
import queue
import threading
import time
from collections.abc import Callable
from operator import itemgetter

import torch
from torch import Tensor

from dave_fast.engine.levels import Pulled
from dave_fast.errors import NonFiniteError
from dave_fast.explain.convergence import Refined, joined, refined
from dave_fast.serve.jobs import Job, Making

log = logging.getLogger("dave_fast.serve")

# What a map costs whatever its samples, as a number of samples (demo model, CPU: 4 ms for 16, 9 for 64, 38 for 256).
FIXED_SAMPLES = 16
# Weight of the latest map in the estimate of what a sample takes.
NEWEST = 0.25
# See above.
PATIENCE, HEAD_START = 4.0, 1.0
# Time reserved before a deadline to make maps: a multiple of the estimate, and seconds added to it.
MARGIN, LEAST_MARGIN = 1.5, 0.003


class MapMaker:
    """The thread of the maps; `run` is its main function.

    Args:
        report: is called with a job, its maps, and what cut it short or None.
        fail: is called with a job and the error for which there is no map.
        clock: tells the time in seconds.

    Attributes:
        sample_seconds: what a sample of one class and depth took lately; see `FIXED_SAMPLES`.
    """

    def __init__(
        self,
        report: Callable[[Job, Refined, str | None], None],
        fail: Callable[[Job, Exception], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._report, self._fail, self._clock = report, fail, clock
        # Places of the first makings of jobs, by their numbers.
        self._queue: queue.PriorityQueue[tuple[float, int, Job | None]] = queue.PriorityQueue()
        self._numbers = itertools.count()
        # Guards the lists of makings; a job that is closed gets another list, which is empty.
        self._lock = threading.Lock()
        self.sample_seconds = 0.0

    def put(self, job: Job, samples: int, why: str | None) -> None:
        """Let the maps of a job's first samples be made; `why` is what cuts it short, after which nothing else is."""
        making = Making(samples, why, self._clock(), next(self._numbers))
        with self._lock:
            if why is not None:
                job.making = [making]
            elif job.ask.tolerance is None:
                # The first may be at work.
                job.making[1:] = [making]
            else:
                job.making.append(making)
            self._enqueue(job, making)

    def _enqueue(self, job: Job, making: Making) -> None:
        """Put a making into the queue if it is the first of its job."""
        if making in job.making[:1]:
            self._queue.put((_place(making), making.number, job))

    def stop(self) -> None:
        """Let `run` return once all that is queued is made."""
        self._queue.put((math.inf, next(self._numbers), None))

    def seconds(self, job: Job, samples: int) -> float:
        """Return an estimate of what the maps of a job take."""
        return self.sample_seconds * job.ask.classes * _parts(job, samples)

    def margin(self, job: Job, samples: int) -> float:
        """Return the seconds before a deadline at which the maps of a job must be started."""
        return LEAST_MARGIN + MARGIN * self.seconds(job, samples)

    def run(self) -> None:
        """Make maps until `stop`."""
        while True:
            _, number, job = self._queue.get()
            if job is None:
                return
            try:
                self._make(job, number)
            except Exception as error:
                if not isinstance(error, NonFiniteError):
                    log.exception("a map could not be made")
                self._fail(job, error)

    def _make(self, job: Job, number: int) -> None:
        """Make the maps of one class, and report those of all when there are all."""
        with self._lock:
            making, kept = next(iter(job.making), None), job.kept
        # Closed or cut meanwhile: others took its place.
        if making is None or making.number != number or kept is None:
            return
        began = self._clock()
        making.made.append(make_class(job, kept, making.samples, len(making.made)))
        took = self._clock() - began
        making.seconds += took
        took /= _parts(job, making.samples)
        self.sample_seconds += (NEWEST if self.sample_seconds else 1.0) * (took - self.sample_seconds)
        done = len(making.made) == job.ask.classes
        with self._lock:
            waiting = job.making
            if making not in waiting[:1]:
                return
            if done:
                del waiting[0]
            for following in waiting[:1]:
                self._enqueue(job, following)
        if done:
            self._report(job, joined(making.made), making.why)


def _place(making: Making) -> float:
    """Return where a making stands in the queue; the smallest comes first."""
    return making.due + PATIENCE * making.seconds - (HEAD_START if making.why is not None else 0.0)


def make_class(job: Job, kept: Pulled, samples: int, number: int) -> Refined:
    """Return the maps of one class of a job, and their errors.

    Args:
        job: the job.
        kept: what its samples tell, (K, S, ...).
        samples: how many of them are taken.
        number: of the class among those of the job.

    Raises:
        NonFiniteError: a map is not finite.
    """
    ask, of_class = job.ask, kept.map(itemgetter(slice(number, number + 1)))
    # The explainer of the device that holds the samples.
    explainer = next(each for each in job.model.explainers if each.device == of_class.tensors()[0].device)
    shrink = explainer.shrink if ask.shrink is None else ask.shrink

    def aggregate(some: slice) -> tuple[Tensor, ...]:
        own, draws, blocks = of_class.part(some), job.draws[some], job.model.blocks
        made = explainer.aggregate_levels(ask.image[None], own, draws, ask.places, blocks, shrink=shrink)
        return made if len(ask.places) > 1 else tuple(each[:, 0] for each in made)

    made = refined(aggregate, samples, shrink=shrink, places=ask.places)
    if not torch.isfinite(made.maps).all():
        raise NonFiniteError("NaN or infinity in the map of this image. Try another image.")
    return made


def _parts(job: Job, samples: int) -> int:
    """Return what the maps of a class cost, as a number of samples at one depth; equal depths are made once."""
    return len(set(job.ask.places)) * (samples + FIXED_SAMPLES)
