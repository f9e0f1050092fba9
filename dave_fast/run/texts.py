"""What an id or a uri of a source may be."""

from __future__ import annotations

import reprlib

from dave_fast.errors import InputError
from dave_fast.run.records import printable


def checked_text(value: object, what: str) -> str:
    """Return the text of a cell of a table.

    Args:
        value: the cell.
        what: what it is, at the beginning of the error message.

    Raises:
        InputError: it is a list or an object, or no text that every export can hold: not Unicode, or with NUL in it.
    """
    # Unlike these, numbers are ids too.
    if isinstance(value, bytes | list | tuple | set | dict):
        raise InputError(f"{what} is {reprlib.repr(value)}; expected text.")
    text = str(value)
    try:
        printable(text)
    except UnicodeEncodeError as error:
        raise InputError(f"{what}: {reprlib.repr(text)} is no Unicode text; expected whole characters.") from error
    if "\0" in text:
        raise InputError(f"{what}: {reprlib.repr(text)} has a NUL character; expected text without.")
    return text
