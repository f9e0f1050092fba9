"""One request on its way: which of its samples are there, and when a map of them is due.

A job is told of samples as they come back, in any order, and says for which numbers of samples a map is to be made.
With a tolerance every checkpoint is looked at in turn, so that where a request stops depends on its samples alone and
never on what else the server does; without one, checkpoints that have been passed meanwhile are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from dave_fast.explain.convergence import FACTORS, Refined, checkpoints
from dave_fast.sampling import Draws, draw
from dave_fast.serve.scheduler import Queued
from dave_fast.serve.served import ServedModel


@dataclass(frozen=True)
class Ask:
    """What a client wants of one image.

    image: (3, H, W), as the model wants it. targets: classes, or None for the top_k most probable. tolerance: the
    error bound at which it is good enough, or None. deadline: on the service's clock, or None. refined: whether it
    wants to hear of every checkpoint.
    """

    image: Tensor
    targets: tuple[int, ...] | None = None
    top_k: int = 1
    n_samples: int = 50
    seed: int = 0
    tolerance: float | None = None
    deadline: float | None = None
    refined: bool = False

    @property
    def classes(self) -> int:
        """How many classes are explained."""
        return self.top_k if self.targets is None else len(self.targets)


@dataclass(frozen=True)
class Predicted:
    """The model's output for the unperturbed image: probabilities (K,), and the classes that are explained."""

    probabilities: Tensor
    targets: tuple[int, ...]


@dataclass(frozen=True)
class Ended:
    """The answer. cut_short: None, "tolerance", "deadline" or "shutdown"; seconds in the queue, and in all."""

    predicted: Predicted
    refined: Refined
    cut_short: str | None
    queue_seconds: float
    seconds: float


@dataclass(frozen=True)
class Failed:
    """There is no answer, and why."""

    error: Exception


Event = Predicted | Refined | Ended | Failed
Listener = Callable[[Event], None]


@dataclass(eq=False)
class Job:
    """A request that was taken. Its fields are written under the service's lock."""

    model: ServedModel
    ask: Ask
    queued: Queued
    listener: Listener
    admitted: float
    predicted: Predicted | None = None
    contributions: Tensor | None = None
    started: float | None = None
    ready: int = 0
    over: bool = False
    cutting: bool = False
    _islands: dict[int, int] = field(default_factory=dict)
    _due: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        samples, smallest = self.ask.n_samples, min(FACTORS)
        every = checkpoints(samples) if self.ask.refined or self.ask.tolerance is not None else [samples]
        self._due = [c for c in every if self.ask.refined or c >= smallest or c == samples]

    @cached_property
    def draws(self) -> Draws:
        """The perturbations of all its samples."""
        height, width = self.model.prepare.size
        sampling = self.model.explainers[0].sampling
        return draw(self.ask.n_samples, height=height, width=width, seed=self.ask.seed, sampling=sampling)

    def buffer(self, like: Tensor) -> Tensor:
        """Where contributions are gathered: (K, S, C, H, W) on the device that had its first samples."""
        if self.contributions is None:
            shape = (self.ask.classes, self.ask.n_samples, *like.shape[2:])
            self.contributions = torch.empty(shape, dtype=like.dtype, device=like.device)
        return self.contributions

    def arrived(self, start: int, stop: int) -> Sequence[int]:
        """Samples start … stop − 1 are there: the numbers of samples of which a map is now due, in order."""
        self._islands[start] = stop
        while self.ready in self._islands:
            self.ready = self._islands.pop(self.ready)
        passed = [c for c in self._due if c <= self.ready]
        self._due = self._due[len(passed) :]
        return passed if self.ask.tolerance is not None else passed[-1:]
