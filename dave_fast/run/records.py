"""Records: the images of a run, each with an id that never changes, and the sources that they come from."""

from __future__ import annotations

import hashlib
import os
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from dave_fast.errors import InputError
from dave_fast.files import open_file
from dave_fast.numbers import whole_in

_INT64 = 2**63
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)(://.*)?", re.DOTALL)
# What a name's bytes are written as where they are no UTF-8, and the text that would be read as such.
_ESCAPED = re.compile(r"\\x(5c|[89a-f][0-9a-f])")


@dataclass(frozen=True, slots=True)
class Record:
    """An image to explain.

    Attributes:
        id: unique in its source; the image's draws depend on it and the seed alone.
        uri: a path or an fsspec URL.
        target: class index, None for the run's default.
        seed: None for the run's seed.
        content: the encoded image if the source had to read it anyway (tars), else None.
        error: why the source could not give the image, or None.
    """

    id: str
    uri: str
    target: int | None = None
    seed: int | None = None
    content: bytes | None = field(default=None, repr=False)
    error: str | None = None


Skip = Callable[[str], bool]


@dataclass(frozen=True)
class RecordSource:
    """Records in an order that is always the same.

    Attributes:
        place: the source as the user named it.
        identity: what must be equal for a run to be resumed.
        count: number of records, None if it is unknown without reading all of them.
        read: function that takes `skip` and yields the records for whose id it does not hold.
        shards: for records that carry their images, such a function for each part that can be read by itself, by the
            prefix of its ids.
    """

    place: str
    identity: dict[str, Any]
    count: int | None
    read: Callable[[Skip], Iterator[Record]]
    shards: Mapping[str, Callable[[Skip], Iterator[Record]]] | None = None

    def records(self, skip: Skip = lambda record_id: False) -> Iterator[Record]:
        """Return the records for whose id `skip` does not hold."""
        return self.read(skip)


def image_key(record_id: str) -> int:
    """Return the image key of a record's draws: 64 bits of the BLAKE2b hash of its id."""
    return int.from_bytes(hashlib.blake2b(record_id.encode(), digest_size=8).digest(), "little")


def opened(uri: str) -> Any:
    """Return the file behind a path or an fsspec URL, to be used in a `with` statement.

    Raises:
        OSError: there is no such file, or it is a named pipe, a socket or a device.
    """
    if is_local(uri):
        return open_file(uri)
    import fsspec

    # What lies at the end of a chain on this machine would be opened whatever it is.
    last = path_of(uri.rsplit("::", 1)[-1])
    if is_local(last):
        open_file(last).close()
    return fsspec.open(uri, "rb")


def count_unique(ids: Iterable[str], place: str) -> int:
    """Return the number of ids in the source `place`; raise InputError if one occurs twice."""
    seen: set[str] = set()
    for record_id in ids:
        if record_id in seen:
            raise InputError(f"{place}: the id {record_id!r} occurs twice; every record needs an id of its own.")
        seen.add(record_id)
    return len(seen)


def printable(text: str) -> str:
    r"""Return a file name as valid Unicode, a different one for each name.

    Bytes that are not UTF-8 become \xNN. The backslash of a name that has such text itself becomes \x5c.

    Raises:
        UnicodeEncodeError: the text has surrogates that stand for no byte.
    """
    escaped = _ESCAPED.sub(r"\\x5cx\1", text)
    return escaped.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def unprintable(text: str) -> str:
    """Return the name of which `printable` made a text."""
    content = _ESCAPED.sub(lambda found: chr(0xDC00 + int(found[1], 16)) if found[1] != "5c" else "\\", text)
    return content.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")


def is_local(uri: str) -> bool:
    """Return whether a uri is a path: neither PROTOCOL://... nor a chain of known protocols (simplecache::...)."""
    if ("://" not in uri and "::" not in uri) or os.path.isabs(uri):
        return True
    first, _, rest = uri.partition("::")
    found = _SCHEME.fullmatch(first)
    if found is None or found[2] is not None:
        return found is None
    from fsspec import available_protocols

    return found[1] not in available_protocols() or not ("://" in rest or os.path.isabs(rest))


def path_of(uri: str) -> str:
    """Return a uri without the protocol of local files."""
    return re.sub("^(file|local)://", "", uri)


def located(uri: str, folder: str) -> str:
    """Return a uri of a list as a path or URL; relative ones start at the list's folder or URL."""
    if not is_local(uri) or os.path.isabs(uri):
        return uri
    return f"{folder.rstrip('/')}/{uri}" if not is_local(folder) else os.path.join(folder, uri)


def as_int64(value: object, what: str) -> int | None:
    """Return an integer, or the text of one, as int; None for None, "" and NaN.

    Args:
        value: the cell of a table.
        what: what it is, at the beginning of the error message.

    Raises:
        InputError: the value is no integer of 64 bits.
    """
    if value is None or value == "" or value != value:
        return None
    try:
        number = whole_in(value.strip()) if isinstance(value, str) else int(value)  # type: ignore[call-overload]
        exact = isinstance(value, str | int) or number == value
    except (TypeError, ValueError, OverflowError):
        number, exact = 0, False
    if number is None or not exact or isinstance(value, bool) or not -_INT64 <= number < _INT64:
        raise InputError(f"{what} is {reprlib.repr(value)}; expected an integer of 64 bits.")
    return number
