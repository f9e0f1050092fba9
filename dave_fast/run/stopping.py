"""Handle Ctrl-C and SIGTERM during a run."""

from __future__ import annotations

from contextlib import AbstractContextManager

from dave_fast.run.progress import Report, Tally
from dave_fast.signals import at_signals


def stop_in_order(tally: Tally, report: Report) -> AbstractContextManager[None]:
    """Set `tally.stopped_by` at the first signal, which ends the run soon; raise KeyboardInterrupt at the second."""

    def handle(number: int) -> None:
        if tally.stopped_by is not None:
            raise KeyboardInterrupt
        tally.stopped_by = number
        report.note("stopping: what is done is being committed (once more to stop at once).")

    return at_signals(handle)
