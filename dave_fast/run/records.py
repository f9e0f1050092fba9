"""What a run works through: records, each an image with a name that never changes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from dave_fast.errors import InputError

_INT64 = 2**63


@dataclass(frozen=True, slots=True)
class Record:
    """An image to explain.

    id: unique in its source, and all that the image's draws depend on besides the seed. uri: a path or an fsspec URL.
    target: class index, None for what the run says. seed: None for the run's. content: the encoded image where the
    source had to read it anyway (tars, datasets), else None.
    """

    id: str
    uri: str
    target: int | None = None
    seed: int | None = None
    content: bytes | None = field(default=None, repr=False)


Skip = Callable[[str], bool]


def _none(record_id: str) -> bool:
    return False


@dataclass(frozen=True)
class RecordSource:
    """Records, in an order that is always the same.

    place: as the user named it. identity: what must be equal for a run to be resumed. count: None where nobody can
    know without reading everything. read(skip): the records whose id is not skipped. shards: where records carry their
    images, the parts that can be read apart from each other, by the name that ids of each begin with.
    """

    place: str
    identity: dict[str, Any]
    count: int | None
    read: Callable[[Skip], Iterator[Record]]
    shards: Mapping[str, Callable[[Skip], Iterator[Record]]] | None = None

    def records(self, skip: Skip = _none) -> Iterator[Record]:
        """The records, but for those whose id `skip` holds for."""
        return self.read(skip)


def image_key(record_id: str) -> int:
    """The image key of a record's draws: 64 bits of the BLAKE2b hash of its id."""
    return int.from_bytes(hashlib.blake2b(record_id.encode(), digest_size=8).digest(), "little")


def read_uri(uri: str) -> bytes:
    """Return the bytes behind a path or an fsspec URL."""
    if is_local(uri):
        with open(uri, "rb") as file:
            return file.read()
    import fsspec

    # fsspec tells compression by the name, and does not know this one.
    options = {"tar": {"compression": "gzip"}} if uri.startswith("tar://") and uri.endswith(".tgz") else {}
    with fsspec.open(uri, "rb", **options) as file:
        return file.read()


def printable(text: str) -> str:
    """A name as valid Unicode: bytes of a file's name that are none are written as \\xNN."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def is_local(uri: str) -> bool:
    """Whether a uri is a plain path."""
    return "://" not in uri and "::" not in uri


def located(uri: str, folder: str) -> str:
    """A uri as it stands in a list, relative to the folder or URL that the list lies in."""
    if not is_local(uri) or os.path.isabs(uri):
        return uri
    return f"{folder.rstrip('/')}/{uri}" if not is_local(folder) else os.path.join(folder, uri)


def as_int64(value: object, what: str) -> int | None:
    """An integer, or text that is one, as int; None for nothing and NaN. Raises InputError, beginning with `what`."""
    if value is None or value == "" or value != value:
        return None
    try:
        number = int(value) if isinstance(value, str | int) else int(float(value))  # type: ignore[arg-type]
        exact = isinstance(value, str | int) or number == value
    except (TypeError, ValueError, OverflowError):
        number, exact = 0, False
    if not exact or isinstance(value, bool) or not -_INT64 <= number < _INT64:
        raise InputError(f"{what} is {value!r}; expected an integer of 64 bits.")
    return number
