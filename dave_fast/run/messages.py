"""Messages between a run's parent process and its workers. A `Record` is a message to a worker too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dave_fast.errors import DaveFastError


@dataclass(frozen=True)
class Hello:
    """From a worker: it is ready.

    Attributes:
        configuration: `Mapper.configuration`.
        weights: hash of the model's weights.
        notes: remarks for the user.
        device: name of the device.
        window: most records that may be sent and not yet mapped.
        names: K class names; None where the classes have none.
    """

    configuration: dict[str, Any]
    weights: str
    notes: list[str]
    device: str
    window: int
    names: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Go:
    """To a worker: the run may begin; its identity has been checked."""

    identity: dict[str, Any]


@dataclass(frozen=True)
class End:
    """To a worker: no more records will come."""


@dataclass(frozen=True)
class Stop:
    """To a worker: commit what is done and end."""


@dataclass(frozen=True)
class Alive:
    """From a worker: it makes progress.

    Attributes:
        images: images of its current batch that are done, as a fraction; None for other progress, such as a commit.
    """

    images: float | None = None


@dataclass(frozen=True)
class Mapped:
    """From a worker: rows were made.

    Attributes:
        records: number of rows.
        busy_s: seconds that the device took.
        errors: (id, reason) of the rows without a map.
    """

    records: int
    busy_s: float
    errors: list[tuple[str, str]]


@dataclass(frozen=True)
class Finished:
    """From a worker: its last message, with the error that ended it early, if any."""

    error: DaveFastError | None = None
