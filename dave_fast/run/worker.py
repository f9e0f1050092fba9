"""A worker: one process with one device. Records come in, shards go to the disk.

    receiver   thread: messages of the parent; a record goes straight to the decoders
    decoders   threads (Pillow lets go of the interpreter while it decodes and resizes): records -> inputs, ahead of
               the device
    main       batches of inputs -> mapper -> rows
    committer  thread: rows -> row groups -> shards, while the device goes on

The parent never sends more than the window that the worker told it, so what waits here is bounded. When the parent is
gone the worker ends at once: what it had not committed is made again by the next run.
"""

from __future__ import annotations

import os
import queue
import signal
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dave_fast.errors import DaveFastError, ImageError, InputError, RunError
from dave_fast.run.lock import Lock
from dave_fast.run.mapper import Mapper, Setup
from dave_fast.run.records import Record
from dave_fast.run.shards import SHARD_BYTES, SHARD_ROWS, Row, ShardWriter, next_name, schema

if TYPE_CHECKING:
    from torch import Tensor

# Bytes of inputs that wait for the device.
WAITING_BYTES = 512 * 2**20
# So many failures one after another are no longer the images' fault.
FAILURES = 100
_TICK_S = 0.5


@dataclass(frozen=True)
class WorkerTask:
    """What one worker is to do. commit_s: seconds after which rows are committed, however few they are."""

    setup: Setup
    device: str | None
    threads: int
    decoders: int
    folder: Path
    name: str
    shard_rows: int = SHARD_ROWS
    commit_s: float = 300.0


@dataclass(frozen=True)
class Hello:
    """A worker that is ready: what its maps are made of, and how many records it may be sent ahead."""

    configuration: dict[str, Any]
    weights: str
    notes: list[str]
    device: str
    window: int


@dataclass(frozen=True)
class Go:
    """The identity of the run, once the parent has found it to be in order."""

    identity: dict[str, Any]


@dataclass(frozen=True)
class End:
    """No more records will come."""


@dataclass(frozen=True)
class Stop:
    """Commit what is done and end."""


@dataclass(frozen=True)
class Alive:
    """Samples of the batch at work: for the watchdog, and for progress within an image. share: in [0, 1] of images."""

    images: float


@dataclass(frozen=True)
class Mapped:
    """Rows that were made. busy_s: seconds that the device took. errors: (id, reason) of those without a map."""

    records: int
    busy_s: float
    errors: list[tuple[str, str]]


@dataclass(frozen=True)
class Committed:
    """A shard was committed."""

    rows: int
    bytes: int


@dataclass(frozen=True)
class Finished:
    """The worker's last word; error: why it stopped before the end."""

    error: DaveFastError | None = None


class _StoppedError(Exception):
    """Raised between two micro-batches, to leave the batch at work."""


def work(task: WorkerTask, lock: Lock, connection: Connection) -> None:
    """The worker's process, from start to end. `lock` is held for as long as it lives."""
    # The parent says when to stop; a terminal sends Ctrl-C to everyone.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    error: DaveFastError | None = None
    try:
        _Worker(task, connection).run()
    except DaveFastError as raised:
        error = raised
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(1)
    except BaseException as raised:
        traceback.print_exc()
        error = RunError(f"the worker on {task.device or 'the device'} failed: {type(raised).__name__}: {raised}")
    try:
        connection.send(Finished(error))
    except OSError:
        os._exit(1)
    # Threads of decoders may hang in a file system: they must not keep the process.
    os._exit(0)


class _Worker:
    def __init__(self, task: WorkerTask, connection: Connection) -> None:
        self.task = task
        self.connection = connection
        self.stopping = threading.Event()
        self._sending = threading.Lock()
        self._waiting: queue.Queue[tuple[Record, Future[Tensor]] | None] = queue.Queue()
        self._last_alive = 0.0
        self._failures = 0

    def send(self, message: object) -> None:
        with self._sending:
            self.connection.send(message)

    def run(self) -> None:
        task = self.task
        mapper = task.setup.mapper(task.device, task.threads)
        mapper.warm_up()
        window = 3 * mapper.batch_size + 2 * task.decoders
        window = max(mapper.batch_size, min(window, WAITING_BYTES // mapper.input_bytes))
        self.send(Hello(mapper.configuration, mapper.weights, mapper.notes, mapper.device, window))
        go = self.connection.recv()
        if not isinstance(go, Go):
            return
        with ThreadPoolExecutor(task.decoders, thread_name_prefix="decoder") as decoders:
            threading.Thread(target=self._receive, args=(mapper, decoders), daemon=True).start()
            committer = Committer(task, go.identity, lambda rows, size: self.send(Committed(rows, size)))
            try:
                self._map(mapper, committer)
            finally:
                decoders.shutdown(wait=False, cancel_futures=True)
                # Also after an error: what is done is kept.
                committer.close()

    def _receive(self, mapper: Mapper, decoders: ThreadPoolExecutor) -> None:
        try:
            while not self.stopping.is_set():
                message = self.connection.recv()
                if isinstance(message, list):
                    for record in message:
                        self._waiting.put((record, decoders.submit(mapper.decode, record)))
                elif isinstance(message, End):
                    self._waiting.put(None)
                    # Only Stop can follow; without a parent there is no reason to go on.
                else:
                    self.stopping.set()
        except (EOFError, OSError):
            os._exit(1)

    def _map(self, mapper: Mapper, committer: Committer) -> None:
        while batch := self._batch(mapper.batch_size):
            rows, busy_s = self._rows(mapper, batch)
            if self.stopping.is_set() and not rows:
                return
            committer.put(rows)
            errors = [(row["id"], row["error"]) for row in rows if row["status"] == "error"]
            self.send(Mapped(len(rows), busy_s, errors))
            self._refuse_failing(rows)

    def _batch(self, size: int) -> list[tuple[Record, Future[Tensor]]]:
        """The next records, fewer at the end; none when there are no more, or the run is to stop."""
        batch: list[tuple[Record, Future[Tensor]]] = []
        while len(batch) < size and not self.stopping.is_set():
            try:
                item = self._waiting.get(timeout=_TICK_S)
            except queue.Empty:
                continue
            if item is None:
                # For the call after this one.
                self._waiting.put(None)
                break
            batch.append(item)
        return [] if self.stopping.is_set() else batch

    def _rows(self, mapper: Mapper, batch: Sequence[tuple[Record, Future[Tensor]]]) -> tuple[list[Row], float]:
        """The rows of a batch and the seconds that the device took; no rows when the run is to stop."""
        failed: dict[str, Row] = {}
        records, inputs = [], []
        for record, future in batch:
            try:
                mapper.refuse_target(record)
                inputs.append(self._decoded(future))
                records.append(record)
            except InputError as error:
                failed[record.id] = mapper.error_row(record, error)
            except _StoppedError:
                return [], 0.0
        start = time.perf_counter()
        try:
            rows = mapper.explain(records, inputs, self._progress(len(records))) if records else []
        except _StoppedError:
            return [], 0.0
        except MemoryError as error:
            raise RunError(f"{str(error).rstrip('.')}. What is committed is kept: resume the run.") from error
        busy_s = time.perf_counter() - start if records else 0.0
        made = {row["id"]: row for row in rows} | failed
        return [made[record.id] for record, _ in batch], busy_s

    def _decoded(self, future: Future[Tensor]) -> Tensor:
        while not self.stopping.is_set():
            try:
                return future.result(timeout=_TICK_S)
            except TimeoutError:
                # Raised by a decoder, it is an error of the image.
                if future.done():
                    raise ImageError("reading the image took too long.") from None
        raise _StoppedError

    def _progress(self, images: int) -> Callable[[int, int], None]:
        def progress(done: int, rows: int) -> None:
            if self.stopping.is_set():
                raise _StoppedError
            now = time.monotonic()
            if now - self._last_alive > _TICK_S:
                self._last_alive = now
                self.send(Alive(images * done / rows))

        return progress

    def _refuse_failing(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._failures = self._failures + 1 if row["status"] == "error" else 0
            if self._failures == FAILURES:
                raise RunError(
                    f"{FAILURES} records failed one after another, the last with: {row['error']} Mend that, and resume "
                    "with --retry-errors."
                )


class Committer:
    """Rows to shards on a thread of its own. An error there is raised by the next call of `put`, or by `close`."""

    def __init__(self, task: WorkerTask, identity: dict[str, Any], committed: Callable[[int, int], None]) -> None:
        self._task = task
        self._schema = schema(identity)
        self._committed = committed
        self._names = next_name(task.folder, task.name)
        self._rows: queue.Queue[list[Row] | None] = queue.Queue(maxsize=8)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="committer", daemon=True)
        self._thread.start()

    def put(self, rows: list[Row]) -> None:
        """Hand rows over; waits while the disk is behind."""
        while self._error is None:
            try:
                return self._rows.put(rows, timeout=_TICK_S)
            except queue.Full:
                continue
        raise self._error

    def close(self) -> None:
        """Commit what there is."""
        while self._thread.is_alive():
            try:
                self._rows.put(None, timeout=_TICK_S)
                break
            except queue.Full:
                continue
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        writer: ShardWriter | None = None
        try:
            due, more = 0.0, True
            while more:
                try:
                    rows = self._rows.get(timeout=None if writer is None else max(0.0, due - time.monotonic()))
                except queue.Empty:
                    rows = []
                more = rows is not None
                if rows:
                    if writer is None:
                        writer = ShardWriter(next(self._names), self._schema)
                        due = time.monotonic() + self._task.commit_s
                    writer.add(rows)
                if writer is not None and (not more or self._full(writer) or time.monotonic() >= due):
                    self._commit(writer)
                    writer = None
        except BaseException as error:
            if writer is not None:
                writer.abandon()
            self._error = error

    def _commit(self, writer: ShardWriter) -> None:
        path = writer.commit()
        self._committed(writer.rows, path.stat().st_size)

    def _full(self, writer: ShardWriter) -> bool:
        return writer.rows >= self._task.shard_rows or writer.bytes >= SHARD_BYTES
