"""What a run works through: records, each an image with a name that never changes."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field

from dave_fast.errors import ImageError, InputError

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


def image_key(record_id: str) -> int:
    """The image key of a record's draws: 64 bits of the BLAKE2b hash of its id."""
    return int.from_bytes(hashlib.blake2b(record_id.encode(), digest_size=8).digest(), "little")


def read_content(record: Record) -> bytes:
    """The encoded image of a record. Raises ImageError, with the uri and the reason, where it cannot be read."""
    if record.content is not None:
        return record.content
    try:
        return read_uri(record.uri)
    # Each file system of fsspec raises errors of its own.
    except Exception as error:
        if isinstance(error, OSError) and error.strerror:
            reason = error.strerror.lower()
        else:
            reason = str(error).rstrip(".") or type(error).__name__
        raise ImageError(f"cannot read {record.uri}: {reason}.") from error


def read_uri(uri: str) -> bytes:
    """The bytes behind a path, an fsspec URL, or a row `hf://NAME:SPLIT#ROW` of a dataset."""
    if is_local(uri):
        with open(uri, "rb") as file:
            return file.read()
    if uri.startswith("hf://") and "#" in uri:
        from dave_fast.run.huggingface import row_content

        return row_content(uri)
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
