"""Read the encoded image of a record: from a path, an fsspec URL or a row of a dataset."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from typing import TypeVar

from PIL import Image

from dave_fast.errors import ImageError, reason_of
from dave_fast.images import decode_image
from dave_fast.run.huggingface import row_content
from dave_fast.run.limits import Limits, check_bytes
from dave_fast.run.members import read_uri
from dave_fast.run.records import Record

_T = TypeVar("_T")
logger = logging.getLogger("dave_fast.run")


class Notes:
    """Log notes on images: the first as warnings, the others, which nobody would read, as information.

    Args:
        loud: number of warnings.
    """

    def __init__(self, loud: int = 20) -> None:
        self._loud, self._numbers = loud, itertools.count()

    def __call__(self, text: str) -> None:
        """Log a note."""
        number = next(self._numbers)
        logger.log(logging.WARNING if number < self._loud else logging.INFO, text)
        if number == self._loud:
            logger.warning("more images have such notes, which are logged as information.")


_notes = Notes()
_LIMITS = Limits()


def read_picture(record: Record, limits: Limits = _LIMITS) -> Image.Image:
    """Return the image of a record as 8-bit RGB; what had to be assumed about it is logged.

    Args:
        record: the record.
        limits: the most bytes and pixels. The time is for the caller to limit, by `within`.

    Raises:
        ImageError: the image cannot be read; the message has the uri and the reason.
    """
    return decode_image(read_content(record, limits), record.uri, max_pixels=limits.pixels, note=_notes)


def prepared(record: Record, prepare: Callable[[Image.Image], _T], limits: Limits = _LIMITS) -> _T:
    """Return what `prepare` makes of the image of a record.

    Raises:
        ImageError: the image cannot be read or prepared.
    """
    image = read_picture(record, limits)
    try:
        return prepare(image)
    except (ValueError, OSError, MemoryError) as error:
        raise ImageError(f"cannot prepare {record.uri}: {reason_of(error)}.") from error


def read_content(record: Record, limits: Limits = _LIMITS) -> bytes:
    """Return the encoded image of a record.

    Args:
        record: the record.
        limits: the most bytes.

    Raises:
        ImageError: the image cannot be read; the message has the uri and the reason.
    """
    if record.error is not None:
        raise ImageError(record.error)
    try:
        if record.content is not None:
            check_bytes(len(record.content), limits.bytes)
            return record.content
        of_dataset = record.uri.startswith("hf://") and "#" in record.uri
        return row_content(record.uri, limits.bytes) if of_dataset else read_uri(record.uri, limits.bytes)
    # Each file system of fsspec raises errors of its own.
    except Exception as error:
        raise ImageError(f"cannot read {record.uri}: {reason_of(error)}.") from error
