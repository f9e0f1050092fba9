"""Requests, jobs and events: what a client wants, which of its samples are done, and what it is sent.

Samples arrive in any order; a job tells for which numbers of samples a map is due. With a tolerance every checkpoint
gets its map in turn, so that the sample at which a request stops depends on its samples alone, not on other requests.
Without one, checkpoints that have been passed meanwhile are skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from dave_fast.defaults import DEFAULT_SAMPLES
from dave_fast.engine.levels import Levels, Place, Pulled, levels_of
from dave_fast.errors import DaveFastError
from dave_fast.explain.convergence import FEWEST, Refined, checkpoints
from dave_fast.explain.depth import depth_of
from dave_fast.explain.depth_account import Depths
from dave_fast.sampling import Draws, draw
from dave_fast.serve.models import ServedModel
from dave_fast.serve.scheduler import Queued
from dave_fast.targets import Question
from dave_fast.targets.cotangents import Cotangent


class DeadlineError(DaveFastError, TimeoutError):
    """No sample was computed before the deadline."""


@dataclass(frozen=True)
class Ask:
    """A request for the maps of one image.

    Attributes:
        image: the model's input, (3, H, W) float32.
        targets: what to explain, classes and other questions; None for the `top_k` most probable classes.
        top_k: number of classes if `targets` is None.
        n_samples: the most samples.
        seed: seed of the draws.
        shrink: whether maps are shrunk, None for the explainers' setting.
        tolerance: the error bound at which the request ends, or None.
        deadline: by `time.monotonic`, in seconds, or None.
        refined: whether the listener is sent a map at every checkpoint.
        notes: what had to be assumed about the image file.
        places: the depths of the maps, blocks and pixels.
        signed: whether the answer has signed maps.
    """

    image: Tensor
    targets: tuple[int | Question, ...] | None = None
    top_k: int = 1
    n_samples: int = DEFAULT_SAMPLES
    seed: int = 0
    shrink: bool | None = None
    tolerance: float | None = None
    deadline: float | None = None
    refined: bool = False
    notes: tuple[str, ...] = ()
    places: tuple[Place, ...] = (None,)
    signed: bool = False

    @property
    def classes(self) -> int:
        """Number of classes and other questions that are explained."""
        return self.top_k if self.targets is None else len(self.targets)

    @property
    def of_classes(self) -> bool:
        """Whether classes alone are explained."""
        return all(isinstance(target, int) for target in self.targets or ())

    @property
    def levels(self) -> Levels:
        """The levels of the walks."""
        return levels_of(self.places)

    @property
    def depths(self) -> tuple[str | int, ...]:
        """The resolved depths of the maps, such as "pixels", 6 or "5-9"."""
        return tuple(map(depth_of, self.places))


@dataclass(frozen=True)
class Predicted:
    """An event: the unperturbed image has been predicted.

    Attributes:
        scores: the model's output, (K,); of a model without classes (0,), as probabilities.
        probabilities: of the K classes; NaN where the model has none.
        targets: what is explained, classes and other questions.
        accounts: what of the score of each of them every depth accounts for, (targets,) and (targets, blocks); None
            where only the pixels were asked for.
        cotangents: of the targets, where there are others than classes; otherwise empty.
    """

    scores: Tensor
    probabilities: Tensor
    targets: tuple[int | Question, ...]
    accounts: Depths | None = None
    cotangents: tuple[Cotangent, ...] = ()

    @property
    def indices(self) -> list[int]:
        """The classes that are explained, −1 for other questions."""
        return [target if isinstance(target, int) else -1 for target in self.targets]


@dataclass(frozen=True)
class Ended:
    """An event: the answer, after which no event comes.

    Attributes:
        predicted: the prediction.
        refined: the maps and their errors.
        cut_short: "tolerance", "deadline" or "shutdown"; None if all samples were used.
        queue_seconds: seconds in the queue.
        seconds: seconds in all.
    """

    predicted: Predicted
    refined: Refined
    cut_short: str | None
    queue_seconds: float
    seconds: float


@dataclass(frozen=True)
class Failed:
    """An event: the request failed, after which no event comes."""

    error: Exception


Event = Predicted | Refined | Ended | Failed
Listener = Callable[[Event], None]


@dataclass(eq=False)
class Making:
    """The maps of a job that are being made, or wait.

    Attributes:
        samples: how many of the job's samples are taken.
        why: what cut the job short, or None.
        due: when they were due, by the maker's clock.
        number: its own, by which the queue names it, so that what it holds can end before its turn.
        made: the maps of the classes that are done.
        seconds: what these took.
    """

    samples: int
    why: str | None
    due: float
    number: int
    made: list[Refined] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(eq=False)
class Job:
    """A request in the service. Its fields are written under the service's lock.

    Attributes:
        model: the served model.
        ask: the request.
        queued: the request as the scheduler sees it.
        listener: called with the request's events.
        admitted: when it was added to the queue, by `time.monotonic`.
        predicted: the prediction, once there is one.
        kept: contributions (K, S, C, H, W) and evidence (K, S, N) of blocks, once there are samples.
        started: when its first row was handed out.
        ready: number of samples that are done, without a gap from the first.
        over: whether it is answered, failed or cancelled.
        cutting: whether it is being cut short.
        making: its maps that are being made, and after them those that wait; the maker's.
    """

    model: ServedModel
    ask: Ask
    queued: Queued
    listener: Listener
    admitted: float
    predicted: Predicted | None = None
    kept: Pulled | None = None
    started: float | None = None
    ready: int = 0
    over: bool = False
    cutting: bool = False
    making: list[Making] = field(default_factory=list)
    # Ranges of samples that are done beyond a gap: start -> stop.
    _ranges: dict[int, int] = field(default_factory=dict)
    _due: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        samples, smallest = self.ask.n_samples, FEWEST
        every = checkpoints(samples) if self.ask.refined or self.ask.tolerance is not None else [samples]
        self._due = [c for c in every if self.ask.refined or c >= smallest or c == samples]

    @cached_property
    def draws(self) -> Draws:
        """The draws of all its samples."""
        height, width = self.model.prepare.size
        sampling = self.model.explainers[0].sampling
        return draw(self.ask.n_samples, height=height, width=width, seed=self.ask.seed, sampling=sampling)

    def arrived(self, start: int, stop: int) -> Sequence[int]:
        """Add samples start … stop − 1; return the numbers of samples for which a map is now due, in order."""
        self._ranges[start] = stop
        while self.ready in self._ranges:
            self.ready = self._ranges.pop(self.ready)
        passed = [c for c in self._due if c <= self.ready]
        self._due = self._due[len(passed) :]
        return passed if self.ask.tolerance is not None else passed[-1:]
