"""Messages between a run's parent process and its workers. A `Record` is a message to a worker too."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dave_fast.errors import DaveFastError

if TYPE_CHECKING:
    from dave_fast.run.mapper import MapSettings


@dataclass(frozen=True)
class WorkerTask:
    """The task of one worker, given to its process at the start.

    Attributes:
        settings: the settings of the maps.
        device: name of a torch device, None for the best there is.
        threads: torch's threads on a CPU.
        decoders: threads that decode images.
        folder: the run's folder.
        name: the worker's name, a part of its shards' names.
        shard_rows: rows at which a shard is committed.
        commit_s: seconds after which rows are committed, however few they are.
    """

    settings: MapSettings
    device: str | None
    threads: int
    decoders: int
    folder: Path
    name: str
    shard_rows: int
    commit_s: float


@dataclass(frozen=True)
class Hello:
    """From a worker: it is ready.

    Attributes:
        configuration: `Mapper.configuration`.
        weights: hash of the model's weights.
        notes: remarks for the user.
        device: name of the device.
        window: most records that may be sent and not yet mapped.
    """

    configuration: dict[str, Any]
    weights: str
    notes: list[str]
    device: str
    window: int


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
