"""One row a measurement or verdict: a JSON line, on disk as soon as it is known, so that whatever is stopped keeps it.

Every row says stage, device, commit, name and state: "passed", "failed", "measured", "not measured", "needs a GPU", or
what became of a stage ("out of time"). value and unit: the number to read first; note: the rest of it in words. Other
keys are the stage's own. This module needs the standard library alone: it also runs before anything is installed.
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
# where rows go, and what every row of this process says
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
    """Append a row to the file of $DAVE_FAST_ROWS, whole or not at all, whoever else writes there; then print it."""
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
    """Return the value as strict JSON has it: NaN and infinities as words, keys and unknown objects as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def read(path: Path) -> list[Row]:
    """Return the rows of a file, none where there is no file."""
    return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []


def line(made: Row) -> str:
    """Return a row as one line of the table."""
    value = "" if made["value"] is None else f"{float(made['value']):.4g} {made['unit']}"
    return f"  {made['name'][:64]:64} {made['state']:12} {value:>14}  {made['note'][:120]}".rstrip()


def table(rows: list[Row]) -> str:
    """Return what was measured, stage by stage; of the tests their numbers, and those that failed."""
    parts: list[str] = []
    for stage, of_stage in groupby(rows, key=lambda made: made["stage"]):
        every = list(of_stage)
        states = Counter(made["state"] for made in every if made.get("test"))
        lines = [line(made) for made in every if not made.get("test") or made["state"] in BAD]
        if states:
            lines.append("  tests: " + ", ".join(f"{number} {state}" for state, number in states.items()))
        parts.append("\n".join([stage, *lines]))
    return "\n\n".join(parts) + "\n"
