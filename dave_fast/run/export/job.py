"""What all forms of an export share: the job, writing whole, photographs that are read again, JSON line by line."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from dave_fast.errors import ImageError, InputError, needs, reason_of
from dave_fast.images.geometry import Geometry
from dave_fast.run.contents import read_picture
from dave_fast.run.limits import Limits, within
from dave_fast.run.reader import MapRecord, Maps
from dave_fast.run.records import Record, unprintable

Progress = Callable[[int], None]
_T = TypeVar("_T")


@dataclass(frozen=True)
class Job:
    """An export.

    Attributes:
        maps: the rows.
        target: path of the result, where nothing is yet.
        progress: called with the number of rows written so far.
        limits: of an image that is read again.
        share: of a map's sum that its evidence region holds, in (0, 1].
    """

    maps: Maps
    target: Path
    progress: Progress = lambda done: None
    limits: Limits = field(default_factory=Limits)
    share: float = 0.5

    @property
    def configuration(self) -> dict[str, Any]:
        """The settings of the run."""
        return self.maps.identity["configuration"]

    @property
    def geometry(self) -> Geometry:
        """How the model resizes and crops photographs."""
        return self.maps.geometry

    @property
    def raw(self) -> bool:
        """Whether the run kept the signed contributions."""
        return bool(self.configuration.get("raw"))

    def facts(self, row: MapRecord) -> dict[str, Any]:
        """Return the small columns of a row with a map, and the names of its classes, as plain values."""
        name = self.maps.labels.name
        assert row.target is not None and row.prediction is not None
        return {
            "id": row.id,
            "uri": row.uri,
            "target": row.target,
            "target_name": name(row.target),
            "prediction": row.prediction,
            "prediction_name": name(row.prediction),
            "probability": row.probability,
            "seed": row.seed,
            "n_samples": row.n_samples,
        }


class Photographs:
    """The photographs of a job's records, which are read again.

    Args:
        job: the job.

    Attributes:
        missing: number of photographs that could not be read.
    """

    def __init__(self, job: Job) -> None:
        self._job, self.missing, self._asked, self._first = job, 0, 0, ""

    def read(self, row: MapRecord) -> Image.Image | None:
        """Return the photograph, upright 8-bit RGB; None where it cannot be read."""
        return self._made(row, lambda photograph: photograph)

    def crop(self, row: MapRecord) -> np.ndarray | None:
        """Return what the model saw of the photograph, uint8 (H, W, 3); None where it cannot be read."""
        return self._made(row, lambda photograph: np.array(self._job.geometry.crop(photograph)))

    def _made(self, row: MapRecord, make: Callable[[Image.Image], _T]) -> _T | None:
        self._asked += 1
        try:
            record, limits = Record(row.id, unprintable(row.uri)), self._job.limits
            return make(within(limits.seconds, partial(read_picture, record, limits)))
        except ImageError as error:
            self.missing, self._first = self.missing + 1, self._first or str(error)
            return None

    def check(self) -> None:
        """Raise InputError if no photograph could be read."""
        if self.missing and self.missing == self._asked:
            raise InputError(f"no image could be read again, so there is nothing to lay the maps over: {self._first}")


def package(name: str, form: str) -> Any:
    """Return an imported package of the extra `export`.

    Raises:
        MissingPackageError: it is not installed.
    """
    with needs("export", f"--to {form}"):
        return __import__(name)


@contextmanager
def whole(target: Path, *, folder: bool) -> Iterator[Path]:
    """Yield a temporary path; rename it to `target` when the block ends without an error, else delete it."""
    # Of a name that none has used before: a killed export leaves its part behind, and process ids come again.
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        if folder:
            part.mkdir()
        yield part
        os.rename(part, target)
    except OSError as error:
        raise InputError(f"cannot write {target}: {reason_of(error)}.") from error
    finally:
        if folder:
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


@contextmanager
def json_list(
    path: Path, head: Mapping[str, Any], name: str, tail: Mapping[str, Any]
) -> Iterator[Callable[[Any], None]]:
    """Write a JSON object with a list that need not fit in memory; yield the function that adds an item to it.

    Args:
        path: of the file.
        head: members ahead of the list.
        name: the list's.
        tail: members behind the list, which are read when the block ends.
    """
    with open(path, "w", encoding="utf-8") as file:
        for key, value in head.items():
            file.write(f"{'{' if file.tell() == 0 else ','}\n{as_json(key)}: {as_json(value)}")
        file.write(f"{',' if head else '{'}\n{as_json(name)}: [")
        comma = "\n"

        def add(item: Any) -> None:
            nonlocal comma
            file.write(f"{comma}{as_json(item)}")
            comma = ",\n"

        yield add
        file.write("\n]" + "".join(f",\n{as_json(key)}: {as_json(value)}" for key, value in tail.items()) + "\n}\n")


def as_json(value: Any, indent: int | None = None) -> str:
    """Return plain values as JSON."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent)
