"""The maps of a service: a thread that makes them from the samples that are done.

The maps of one request may take seconds (ten classes at ten depths), those of another milliseconds. They are made class
by class. The request with the fewest classes done comes next, so that nobody waits for more than the classes that have
begun; among equals those whose time is up come first.
"""

from __future__ import annotations

import itertools
import logging
import math
import queue
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import itemgetter

import torch
from torch import Tensor

from dave_fast.engine.levels import Pulled
from dave_fast.errors import NonFiniteError
from dave_fast.explain.convergence import Refined, joined, refined
from dave_fast.serve.jobs import Job

log = logging.getLogger("dave_fast.serve")

# What a map costs whatever its samples, as a number of samples (demo model, CPU: 4 ms for 16, 9 for 64, 38 for 256).
FIXED_SAMPLES = 16
# Weight of the latest map in the estimate of what a sample takes.
NEWEST = 0.25
# Time reserved before a deadline to make maps: a multiple of the estimate, and seconds added to it.
MARGIN, LEAST_MARGIN = 1.5, 0.003


@dataclass
class Making:
    """The maps of a job that are being made.

    Attributes:
        job: the job.
        samples: how many of them are taken.
        why: what cut the job short, or None.
        made: the maps of the classes that are done.
    """

    job: Job
    samples: int
    why: str | None
    made: list[Refined] = field(default_factory=list)

    def step(self, of_all: Pulled) -> None:
        """Make the maps of the next class.

        Args:
            of_all: what the samples of the job tell, (K, S, ...).

        Raises:
            NonFiniteError: a map is not finite.
        """
        ask, job = self.job.ask, self.job
        number = len(self.made)
        kept = of_all.map(itemgetter(slice(number, number + 1)))
        # The explainer of the device that holds the samples.
        explainer = next(each for each in job.model.explainers if each.device == kept.tensors()[0].device)
        shrink = explainer.shrink if ask.shrink is None else ask.shrink

        def aggregate(some: slice) -> tuple[Tensor, Tensor]:
            own, draws, blocks = kept.part(some), job.draws[some], job.model.blocks
            raw, maps = explainer.aggregate_levels(ask.image[None], own, draws, ask.places, blocks, shrink=shrink)
            return (raw, maps) if len(ask.places) > 1 else (raw[:, 0], maps[:, 0])

        made = refined(aggregate, self.samples, shrink=shrink, places=ask.places)
        if not torch.isfinite(made.maps).all():
            raise NonFiniteError("NaN or infinity in the map of this image. Try another image.")
        self.made.append(made)

    @property
    def is_done(self) -> bool:
        """Whether the maps of all classes are made."""
        return len(self.made) == self.job.ask.classes


class MapMaker:
    """The thread of the maps; `run` is its main function.

    Args:
        report: is called with a job, its maps, and what cut it short or None.
        fail: is called with a job and the error for which there is no map.

    Attributes:
        sample_seconds: what a sample of one class and depth took lately; see `FIXED_SAMPLES`.
    """

    def __init__(
        self, report: Callable[[Job, Refined, str | None], None], fail: Callable[[Job, Exception], None]
    ) -> None:
        self._report, self._fail = report, fail
        self._queue: queue.PriorityQueue[tuple[float, int, int, Making | None]] = queue.PriorityQueue()
        self._numbers = itertools.count()
        self.sample_seconds = 0.0

    def put(self, making: Making) -> None:
        """Queue maps to be made."""
        self._put(len(making.made), making)

    def stop(self) -> None:
        """Let `run` return once all that is queued is made."""
        self._put(math.inf, None)

    def _put(self, done: float, making: Making | None) -> None:
        cut = making is not None and making.why is not None
        self._queue.put((done, 0 if cut else 1, next(self._numbers), making))

    def seconds(self, job: Job, samples: int) -> float:
        """Return an estimate of what the maps of a job take."""
        ask = job.ask
        return self.sample_seconds * ask.classes * len(ask.places) * (samples + FIXED_SAMPLES)

    def margin(self, job: Job, samples: int) -> float:
        """Return the seconds before a deadline at which the maps of a job must be started."""
        return LEAST_MARGIN + MARGIN * self.seconds(job, samples)

    def run(self) -> None:
        """Make maps until `stop`."""
        while True:
            *_, making = self._queue.get()
            if making is None:
                return
            self._make(making)

    def _make(self, making: Making) -> None:
        """Make the maps of one class, and report those of all when there are all."""
        job = making.job
        # Without the lock: a job that is closed meanwhile is dropped at its next class, or by `report`.
        kept = job.kept
        if kept is None or (job.cutting and making.why is None):
            return
        began = time.monotonic()
        try:
            making.step(kept)
        except Exception as error:
            log.exception("a map could not be made")
            self._fail(job, error)
            return
        took = (time.monotonic() - began) / (len(job.ask.places) * (making.samples + FIXED_SAMPLES))
        self.sample_seconds += (NEWEST if self.sample_seconds else 1.0) * (took - self.sample_seconds)
        if making.is_done:
            self._report(job, joined(making.made), making.why)
        else:
            self.put(making)
