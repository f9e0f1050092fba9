"""A cache on disk of measured choices between kernels: one file for each GPU and its versions of PyTorch and Triton.

A choice is made by timing the candidates of a problem once (DAVE_FAST_AUTOTUNE=1, see `kernels/_launch.py`). It is
stored under the problem's name and number of rows, and every later process uses it, with or without that variable. A
number of rows that was not timed uses the choice of the nearest one, up to a ratio of NEAR.

The folder is $DAVE_FAST_CACHE_DIR, else $XDG_CACHE_HOME/dave-fast, else ~/.cache/dave-fast. Delete a file to discard
its choices. `dave-fast info` lists them.
"""

from __future__ import annotations

import json
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

from dave_fast.errors import InputError
from dave_fast.files import atomically

logger = logging.getLogger("dave_fast")

# The ratio of two numbers of rows up to which the choice of one is used for the other.
NEAR = 1.5


@dataclass(frozen=True)
class Choice:
    """The fastest candidate of a problem.

    Attributes:
        name: of the candidate.
        milliseconds: candidate -> median time of a launch; None for a candidate that could not run.
    """

    name: str
    milliseconds: dict[str, float | None]


def folder() -> Path:
    """Return the folder of the cache."""
    given = os.environ.get("DAVE_FAST_CACHE_DIR")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "dave-fast"


class Choices:
    """The choices of one file.

    Where the file cannot be read or written, a warning is logged and choices live in memory alone.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known = self._read()

    @staticmethod
    def of(gpu: str) -> Choices:
        """Return the choices of a GPU by its name, for the versions of PyTorch and Triton that are imported here."""
        import torch
        import triton

        name = re.sub(r"[^A-Za-z0-9.+]+", "-", f"{gpu} torch {torch.__version__} triton {triton.__version__}")
        return Choices(folder() / f"choices-{name}.json")

    def all(self) -> dict[str, dict[int, Choice]]:
        """Return every choice: problem -> rows -> choice."""
        return self._known

    def find(self, problem: str, rows: int) -> str | None:
        """Return the candidate for a problem, measured with the nearest number of rows; None where none is near."""
        measured = self._known.get(problem)
        if not measured:
            return None
        nearest = min(measured, key=lambda known: max(known / rows, rows / known))
        return measured[nearest].name if max(nearest / rows, rows / nearest) <= NEAR else None

    def keep(self, problem: str, rows: int, choice: Choice) -> None:
        """Add a choice, in memory and to the file, without losing what other processes have written to it."""
        merged = self._read()
        for known, by_rows in self._known.items():
            merged.setdefault(known, {}).update(by_rows)
        merged.setdefault(problem, {})[rows] = choice
        self._known = merged
        try:
            with atomically(self.path) as file:
                file.write(json.dumps(merged, indent=1, default=vars).encode())
        except InputError as error:
            logger.warning("the choice of a kernel is kept for this process alone: %s", error)

    def _read(self) -> dict[str, dict[int, Choice]]:
        try:
            found = json.loads(self.path.read_text())
            return {
                problem: {int(rows): Choice(**kept) for rows, kept in by_rows.items()}
                for problem, by_rows in found.items()
            }
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            logger.warning("the choices of kernels in %s cannot be read, and are measured anew: %s", self.path, error)
            return {}
