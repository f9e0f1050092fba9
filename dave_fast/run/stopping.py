"""Handle Ctrl-C and SIGTERM during a run."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from dave_fast.run.progress import Report, Tally


@contextmanager
def stop_in_order(tally: Tally, report: Report) -> Iterator[None]:
    """Set `tally.stopped_by` at the first signal, which ends the run soon; raise KeyboardInterrupt at the second."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: object) -> None:
        if tally.stopped_by is not None:
            raise KeyboardInterrupt
        tally.stopped_by = number
        report.note("stopping: what is done is being committed (once more to stop at once).")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
