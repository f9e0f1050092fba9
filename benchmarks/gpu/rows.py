"""A row for each measurement or verdict: a JSON line, written at once, so that an interrupted run has its rows.

Every row has stage, device, commit, name and state: "passed", "failed", "measured", "not measured", "needs a GPU", or
the end of a stage ("out of time"). `value` and `unit` are the main number, `note` the rest in words. Other keys depend
on the stage. This module needs only the standard library, because it runs before anything is installed.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Any

Row = dict[str, Any]
# environment variables: the file of rows, and the entries of every row of this process
FILE, STAGE, DEVICE, COMMIT = (f"DAVE_FAST_{name}" for name in ("ROWS", "STAGE", "DEVICE", "COMMIT"))
BAD = ("failed", "out of time", "interrupted")
NOTE = 300


def row(name: str, state: str, value: float | None = None, unit: str = "", note: str = "", **more: Any) -> Row:
    """Return a row of this stage."""
    return {"name": name, "state": state, "value": value, "unit": unit, "note": note, **more}


def failed(name: str, error: BaseException) -> Row:
    """Return the row of something that raised."""
    return row(name, "failed", note=f"{type(error).__name__}: {' '.join(str(error).split())}"[:NOTE])


def write(made: Row, *, show: bool = True) -> None:
    """Append a row to the file of $DAVE_FAST_ROWS atomically, also among other processes' rows; then print it."""
    said = {key.removeprefix("DAVE_FAST_").lower(): os.environ.get(key, "unknown") for key in (STAGE, DEVICE, COMMIT)}
    path = os.environ.get(FILE)
    if path is not None:
        data = json.dumps(_plain(said | made), ensure_ascii=False, allow_nan=False) + "\n"
        # one write to the end of the file: lines of several processes do not mix
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, data.encode())
            os.fsync(file)
        finally:
            os.close(file)
    if show:
        print(line(made), flush=True)


def _plain(value: Any) -> Any:
    """Return the value for strict JSON: NaN and infinities, keys and unknown objects as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def read(path: Path) -> list[Row]:
    """Return the rows of a file, an empty list without a file."""
    return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []


def line(made: Row) -> str:
    """Return a row as one line of the table."""
    value = "" if made["value"] is None else f"{float(made['value']):.4g} {made['unit']}"
    return f"  {made['name'][:64]:64} {made['state']:12} {value:>14}  {made['note'][:120]}".rstrip()


def table(rows: list[Row]) -> str:
    """Return the rows as text, stage by stage; tests as their numbers, and those that failed."""
    parts: list[str] = []
    for stage, of_stage in groupby(rows, key=lambda made: made["stage"]):
        every = list(of_stage)
        states = Counter(made["state"] for made in every if made.get("test"))
        lines = [line(made) for made in every if not made.get("test") or made["state"] in BAD]
        if states:
            lines.append("  tests: " + ", ".join(f"{number} {state}" for state, number in states.items()))
        parts.append("\n".join([stage, *lines]))
    return "\n\n".join(parts) + "\n"
