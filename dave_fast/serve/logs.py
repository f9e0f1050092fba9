"""The log of a server: each line on stderr is a JSON object, whoever wrote it.

Nothing that writes to the log can fail or wait: a thread writes the lines, and where nobody reads stderr, or it is
closed, lines are lost and counted. A client that leaves is no error of the server, and told at the level DEBUG. The
modules of the standard library are enough for this one, so that it can be first.
"""

from __future__ import annotations

import asyncio
import faulthandler
import io
import json
import logging
import os
import queue
import select
import sys
import threading
import time
import warnings
from types import TracebackType
from typing import Any

# Lines that wait for stderr; further ones are lost.
_MOST_LINES = 10_000
# The longest line of another's text; what follows is a line of its own.
_LONGEST = 1 << 16
# Seconds that the end of the process waits for the lines before it.
_FLUSH = 1.0
# Exceptions of a connection that ended, or whose client does not read; the last ones are libraries' classes, by name.
_LEFT = (ConnectionError, TimeoutError, asyncio.CancelledError)
_LEFT_NAMES = {"ClientDisconnect", "BrokenResourceError", "ClosedResourceError"}

log = logging.getLogger("dave_fast.serve")
_stray = logging.getLogger("stderr")


class JsonLines(logging.Formatter):
    """A formatter of log records as JSON, one object a line; the fields in `extra` become its fields."""

    _OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}

    def format(self, record: logging.LogRecord) -> str:
        """Return a record as a line, whatever objects it holds."""
        fields: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": _text(record.levelname).lower(),
            "logger": record.name,
            "message": _message(record),
        }
        fields |= {name: value for name, value in vars(record).items() if name not in self._OWN}
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return "{" + ", ".join(f"{json.dumps(_text(name))}: {_json(value)}" for name, value in fields.items()) + "}"


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    # The arguments do not fit the text, or cannot be printed.
    except Exception:
        return f"{_text(record.msg)} {_text(record.args)}"


def _text(value: object) -> str:
    """Return an object as text, or its class where it cannot be printed."""
    try:
        return str(value)
    except Exception:
        return f"<{type(value).__name__}>"


def _json(value: object) -> str:
    """Return an object as JSON, or its text as JSON where that cannot be."""
    try:
        return json.dumps(value, default=_text, allow_nan=False)
    # NaN, circles, keys that are no text, too deep, or classes of their own
    except Exception:
        return json.dumps(_text(value))


class _Lines(logging.Handler):
    """A handler that hands lines to a thread, which writes them.

    Args:
        file: a file descriptor.
    """

    def __init__(self, file: int) -> None:
        super().__init__()
        self._file = file
        # Unlike a Queue, this one may be used by a signal handler while the same thread is in it.
        self._waiting: queue.SimpleQueue[str | threading.Event] = queue.SimpleQueue()
        self._lost = 0
        threading.Thread(target=self._write_all, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Hand on a record."""
        if self._waiting.qsize() < _MOST_LINES:
            self._waiting.put(self.format(record))
        else:
            self._lost += 1

    def flush(self) -> None:
        """Wait for the lines so far, for `_FLUSH` seconds at most."""
        written = threading.Event()
        self._waiting.put(written)
        written.wait(_FLUSH)

    def _write_all(self) -> None:
        while True:
            item = self._waiting.get()
            if isinstance(item, threading.Event):
                item.set()
                continue
            if self._lost:
                lost, self._lost = self._lost, 0
                log.warning("lines of this log were lost: nobody read them", extra={"lost": lost})
            try:
                self._write(item.encode() + b"\n")
            # Stderr is closed, full, or its reader is gone: the server goes on without a log.
            except OSError:
                self._lost += 1

    def _write(self, line: bytes) -> None:
        while line:
            try:
                line = line[os.write(self._file, line) :]
            except BlockingIOError:
                select.select([], [self._file], [])


class _Stray(io.RawIOBase):
    """What takes the place of stderr: its lines become records of the logger "stderr"."""

    def __init__(self) -> None:
        super().__init__()
        self._own = threading.local()

    def writable(self) -> bool:
        """Return True."""
        return True

    def fileno(self) -> int:
        """Return the file descriptor of stderr, for those who write to that."""
        return 2

    def write(self, data: Any) -> int:
        """Take bytes; the rest behind the last end of a line waits for its end, or for the next one too long."""
        rest: bytes = getattr(self._own, "rest", b"") + bytes(data).replace(b"\r", b"\n")
        *lines, rest = rest.split(b"\n")
        if len(rest) >= _LONGEST:
            lines, rest = [*lines, rest], b""
        self._own.rest = rest
        for line in lines:
            if line.strip():
                _stray.warning("%s", line.decode(errors="backslashreplace"))
        return len(data)


def _is_wanted(record: logging.LogRecord) -> bool:
    """Return whether a record belongs into the log; make that of a client that left one of the level DEBUG."""
    if record.name in ("uvicorn.error", "asyncio"):
        error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
        if _left(error) or "socket.send() raised exception" in _text(record.msg):
            record.levelno, record.levelname, record.exc_info = logging.DEBUG, "DEBUG", None
            record.msg, record.args = "a client left: %s", (_text(error or record.msg) or type(error).__name__,)
            return log.isEnabledFor(logging.DEBUG)
    return True


def _left(error: BaseException | None) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return all(map(_left, error.exceptions))
    return isinstance(error, _LEFT) or type(error).__name__ in _LEFT_NAMES


def log_to_stderr() -> None:
    """Take stderr for the log: from here on each of its lines is JSON; a second call changes nothing.

    Records of dave-fast and uvicorn are taken from the level INFO on, those of other loggers from WARNING on. Warnings,
    uncaught exceptions and what anybody writes to stderr become records too, also what C++ and child processes
    write. Only the words of a process that crashes are plain: they are the last.
    """
    root = logging.getLogger()
    if any(isinstance(handler, _Lines) for handler in root.handlers):
        return
    _open_standard_files()
    stderr = os.dup(2)
    handler = _Lines(stderr)
    handler.setFormatter(JsonLines())
    handler.addFilter(_is_wanted)
    # Handlers of libraries that were made before would write plain lines to what was stderr.
    for logger in [root, *logging.root.manager.loggerDict.values()]:
        if isinstance(logger, logging.Logger):
            kept = [each for each in logger.handlers if type(each) is not logging.StreamHandler]
            logger.propagate = logger.propagate or len(kept) < len(logger.handlers)
            logger.handlers = kept
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    for name in ("dave_fast", "uvicorn"):
        logging.getLogger(name).setLevel(logging.INFO)
    logging.raiseExceptions = False
    warnings.simplefilter("default", append=True)
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught
    threading.excepthook = _log_uncaught_in_thread
    sys.unraisablehook = _log_unraisable
    faulthandler.enable(stderr)
    sys.stderr = io.TextIOWrapper(_Stray(), "utf-8", "backslashreplace", write_through=True)
    _take_file_of_stderr()


def flush() -> None:
    """Wait a moment for the lines of the log so far."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, _Lines):
            handler.flush()


def _open_standard_files() -> None:
    """Open what is closed of stdin, stdout and stderr, before a socket takes its number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number is taken.
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115


def _take_file_of_stderr() -> None:
    """Make records of what is written to the file of stderr without Python."""
    read, write = os.pipe()
    os.dup2(write, 2)
    os.close(write)
    # One who holds Python's lock and waited here would wait for a thread that needs this lock.
    os.set_blocking(2, False)

    def take() -> None:
        stray = _Stray()
        while piece := os.read(read, 1 << 16):
            stray.write(piece)

    threading.Thread(target=take, name="stderr", daemon=True).start()


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    log.critical("an exception ended the server", exc_info=(kind, error, trace))


def _log_uncaught_in_thread(given: threading.ExceptHookArgs) -> None:
    if given.exc_type is not SystemExit and given.exc_value is not None:
        name = given.thread.name if given.thread else "?"
        trace = (given.exc_type, given.exc_value, given.exc_traceback)
        log.error("an exception ended a thread", extra={"of_thread": name}, exc_info=trace)


def _log_unraisable(given: Any) -> None:
    told = given.err_msg or "an exception was ignored"
    trace = (given.exc_type, given.exc_value, given.exc_traceback)
    log.error("%s", told, extra={"object": _text(given.object)}, exc_info=trace if given.exc_value else None)
