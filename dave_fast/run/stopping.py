"""Handle Ctrl-C and SIGTERM during a run."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from dave_fast.run.progress import Report


class Stoppable(Protocol):
    """A run that ends soon after `stopped_by`, the number of a signal, is set, and that has a report."""

    stopped_by: int | None
    report: Report


@contextmanager
def stop_in_order(run: Stoppable) -> Iterator[None]:
    """Set `run.stopped_by` at the first signal, raise KeyboardInterrupt at the second."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: object) -> None:
        if run.stopped_by is not None:
            raise KeyboardInterrupt
        run.stopped_by = number
        run.report.note("stopping: what is done is being committed (once more to stop at once).")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
