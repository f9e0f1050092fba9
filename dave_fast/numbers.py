"""Numbers that callers, command lines, requests and files give: what a number is, and what is said of other values.

A whole number is ASCII digits with at most one sign before them, at most `LONGEST` of them without leading zeros; a
number may have a point and an exponent, too, and is finite. Python's own `int` and `float` also take underscores, other
scripts' digits and "nan", and raise errors of their own for long ones.
"""

from __future__ import annotations

import math
import operator
import re
from numbers import Real
from typing import Any

from dave_fast.errors import InputError

# digits, more than those of 128 bits: seeds and keys are taken modulo 2⁶⁴
LONGEST = 40
# letters of a value in a message
_SHOWN = 100
_WHOLE = re.compile(r"([+-]?)0*([0-9]*)")
_NUMBER = re.compile(r"[+-]?(?:[0-9]{1,400}(?:\.[0-9]{0,400})?|\.[0-9]{1,400})(?:[eE][+-]?[0-9]{1,9})?")


def shown(value: object) -> str:
    """Return a value as it stands in a message: on one line, valid Unicode, at most about a hundred letters."""
    if isinstance(value, str):
        text = ascii(value[:_SHOWN]) if not value.isprintable() else repr(value[:_SHOWN])
        return text if len(value) <= _SHOWN else f"{text}… of {len(value)} letters"
    try:
        text = repr(value)
    # Python refuses to write integers of more than 4,300 digits, and lists in lists without end
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} of too many digits or levels"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def whole_in(text: str) -> int | None:
    """Return the whole number that a text is; None where it is none.

    Raises:
        InputError: it has more than `LONGEST` digits.
    """
    found = _WHOLE.fullmatch(text)
    if found is None or not text[-1:].isdigit():
        return None
    if len(found[2]) > LONGEST:
        raise InputError(f"the number {shown(text)} is too long; expected at most {LONGEST} digits")
    return int(f"{found[1]}{found[2] or 0}")


def number_in(text: str) -> float | None:
    """Return the number that a text is; None where it is none, or beyond the range of float64."""
    value = float(text) if _NUMBER.fullmatch(text) else math.inf
    return value if math.isfinite(value) else None


def parse_whole(value: object, name: str, at_least: int | None = None, at_most: int | None = None) -> int:
    """Return a whole number, or the text of one, as an int; see `check_integer`."""
    found = whole_in(value.strip()) if isinstance(value, str) else value
    return check_integer(value if found is None else found, name, at_least, at_most)


def is_integer(value: Any) -> bool:
    """Return whether a value is an integer of any type (also NumPy's, or a tensor of one), and not a bool."""
    try:
        operator.index(value)
    except TypeError:
        return False
    return not isinstance(value, bool) and "bool" not in str(getattr(value, "dtype", ""))


def check_integer(value: Any, name: str, at_least: int | None = None, at_most: int | None = None) -> int:
    """Return an integer of any type (also NumPy's) as an int.

    Args:
        value: the integer.
        name: of the setting, for the message.
        at_least: smallest value allowed.
        at_most: largest value allowed.

    Raises:
        InputError: `value` is no integer, a bool, or out of range.
    """
    integer = operator.index(value) if is_integer(value) else None
    if integer is None or (at_least is not None and integer < at_least):
        raise InputError(f"{name} is {shown(value)}; expected an integer{'' if at_least is None else f' ≥ {at_least}'}")
    if at_most is not None and integer > at_most:
        raise InputError(f"{name} is {shown(value)}; expected an integer ≤ {at_most}")
    if abs(integer) >= 10**LONGEST:
        raise InputError(f"{name} is {shown(value)}; expected an integer of at most {LONGEST} digits")
    return integer


def parse_number(value: object, name: str, at_least: float = -math.inf, at_most: float = math.inf) -> float:
    """Return a finite number, or the text of one, as a float.

    Args:
        value: the number.
        name: of the setting, for the message.
        at_least: smallest value allowed.
        at_most: largest value allowed.

    Raises:
        InputError: `value` is no finite number, a bool, or out of range.
    """
    found = number_in(value.strip()) if isinstance(value, str) else None if isinstance(value, bool) else value
    try:
        number = float(found) if isinstance(found, Real) else math.nan
    # an integer may be larger than any float
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or not at_least <= number <= at_most:
        bounds = [f"≥ {at_least:g}"] * (at_least > -math.inf) + [f"≤ {at_most:g}"] * (at_most < math.inf)
        raise InputError(f"{name} is {shown(value)}; expected {' '.join(['a number', ' and '.join(bounds)]).strip()}")
    return number
