"""The end of a server's process: at a signal before it serves, at a second signal, and after it has served."""

from __future__ import annotations

import logging
import os
import signal
from typing import NoReturn

from dave_fast.serve import logs

log = logging.getLogger("dave_fast.serve")


def end_start(number: int) -> NoReturn:
    """End a process that serves nobody yet, with exit code 0."""
    log.info("ended while it started", extra={"signal": signal.Signals(number).name})
    leave(0)


def end_at_once(number: int) -> NoReturn:
    """End the process at a second signal, with exit code 128 + number, as shells have it: 143 or 130."""
    log.warning("ended at once, by a second signal", extra={"signal": signal.Signals(number).name})
    leave(128 + number)


def leave(code: int) -> NoReturn:
    """End the process after its last line of the log.

    The interpreter does not take itself apart: threads that compute in C++ then would abort it.
    """
    logs.flush()
    os._exit(code)
