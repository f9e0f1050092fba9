"""A worker: one process with one device, which is sent records and writes shards.

    receiver   thread: reads the parent's messages and hands records to the decoders
    decoders   threads: records -> inputs, ahead of the device (Pillow releases the GIL while it decodes and resizes)
    main       batches of inputs -> mapper -> rows
    committer  thread: rows -> row groups -> shards, while the device computes

The parent sends no more records than the window that the worker announced, which bounds the queues here. If the parent
dies the worker ends at once: the rows that it had not committed are made again by the next run.
"""

from __future__ import annotations

import os
import queue
import signal
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dave_fast.errors import DaveFastError, RunError
from dave_fast.run.limits import within
from dave_fast.run.lock import Lock
from dave_fast.run.mapper import Mapper, MapSettings
from dave_fast.run.messages import Alive, End, Finished, Go, Hello
from dave_fast.run.records import Record
from dave_fast.run.shards import SHARD_BYTES, ShardRow, new_shard, next_name, schema

if TYPE_CHECKING:
    from torch import Tensor

# The most bytes of inputs that wait for the device.
WAITING_BYTES = 512 * 2**20
# Consecutive failures at which the run stops: images are then not the cause.
FAILURES = 100
_TICK_S = 0.5


@dataclass(frozen=True)
class WorkerTask:
    """The task of one worker, given to its process at the start.

    Attributes:
        settings: the settings of the maps.
        device: name of a torch device, None for the best there is.
        threads: torch's threads on a CPU.
        decoders: threads that decode images.
        folder: the run's folder.
        name: the worker's name, a part of its shards' names.
        shard_rows: rows at which a shard is committed.
        commit_s: seconds after which rows are committed, however few they are.
    """

    settings: MapSettings
    device: str | None
    threads: int
    decoders: int
    folder: Path
    name: str
    shard_rows: int
    commit_s: float


class _StoppedError(Exception):
    """Raised between two micro-batches, to abandon the current batch."""


def work(task: WorkerTask, lock: Lock, connection: Connection) -> None:
    """Run a worker: the main function of its process.

    Args:
        task: the worker's task.
        lock: the lock on the run's folder, which this process holds until it ends.
        connection: the worker's end of the pipe to its parent.
    """
    # A terminal sends Ctrl-C to the workers too; the parent tells them when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    error: DaveFastError | None = None
    try:
        _MapWorker(task, connection).run()
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
    # A decoder that hangs in a file system must not keep the process alive.
    os._exit(0)


class _MapWorker:
    """The state of a worker's process."""

    def __init__(self, task: WorkerTask, connection: Connection) -> None:
        self.task = task
        self.connection = connection
        self.stopping = threading.Event()
        self._sending = threading.Lock()
        self._waiting: queue.Queue[tuple[Record, Callable[[], Tensor]] | None] = queue.Queue()
        self._last_alive = 0.0
        self._failures = 0

    def send(self, message: object) -> None:
        with self._sending:
            self.connection.send(message)

    def run(self) -> None:
        task = self.task
        mapper = task.settings.mapper(task.device, task.threads)
        window = 3 * mapper.batch_size + 2 * task.decoders
        window = max(mapper.batch_size, min(window, WAITING_BYTES // mapper.input_bytes))
        names = mapper.labels.names
        self.send(Hello(mapper.configuration, mapper.weights, mapper.notes, mapper.device, window, names))
        go = self.connection.recv()
        if not isinstance(go, Go):
            return
        with ThreadPoolExecutor(task.decoders, thread_name_prefix="decoder") as decoders:
            threading.Thread(target=self._receive, args=(mapper, decoders), daemon=True).start()
            committer = Committer(task, go.identity, lambda: self.send(Alive()))
            try:
                self._map(mapper, committer)
            finally:
                decoders.shutdown(wait=False, cancel_futures=True)
                # After an error too, so that finished rows are kept.
                committer.close()

    def _receive(self, mapper: Mapper, decoders: ThreadPoolExecutor) -> None:
        try:
            while not self.stopping.is_set():
                message = self.connection.recv()
                if isinstance(message, Record):
                    limit_s = self.task.settings.limits.seconds
                    future = decoders.submit(within, limit_s, partial(mapper.decode, message))
                    self._waiting.put((message, partial(self._decoded, future)))
                elif isinstance(message, End):
                    self._waiting.put(None)
                else:
                    self.stopping.set()
        except (EOFError, OSError):
            os._exit(1)

    def _map(self, mapper: Mapper, committer: Committer) -> None:
        while batch := self._batch(mapper.batch_size):
            try:
                rows, message = mapper.rows(batch, partial(self._progress, len(batch)))
            except _StoppedError:
                return
            except MemoryError as error:
                raise RunError(f"{str(error).rstrip('.')}. What is committed is kept: resume the run.") from error
            committer.put(rows)
            self.send(message)
            self._refuse_failing(rows)

    def _batch(self, size: int) -> list[tuple[Record, Callable[[], Tensor]]]:
        """Return the next records, fewer at the end; none if there are no more or the run is to stop."""
        batch: list[tuple[Record, Callable[[], Tensor]]] = []
        while len(batch) < size and not self.stopping.is_set():
            try:
                item = self._waiting.get(timeout=_TICK_S)
            except queue.Empty:
                continue
            if item is None:
                # The next call has to find the end too.
                self._waiting.put(None)
                break
            batch.append(item)
        return [] if self.stopping.is_set() else batch

    def _decoded(self, future: Future[Tensor]) -> Tensor:
        """Wait for a model input; raise _StoppedError if the run is to stop."""
        while not self.stopping.is_set():
            wait([future], timeout=_TICK_S)
            if future.done():
                # Images that each take up to their limit of time are progress too.
                self._progress(0, 1, 1)
                return future.result()
        raise _StoppedError

    def _progress(self, images: int, done: int, rows: int) -> None:
        """Report progress within a batch of so many images, at most every half second, or raise _StoppedError."""
        if self.stopping.is_set():
            raise _StoppedError
        now = time.monotonic()
        if now - self._last_alive > _TICK_S:
            self._last_alive = now
            self.send(Alive(images * done / rows))

    def _refuse_failing(self, rows: Sequence[ShardRow]) -> None:
        """Raise RunError once too many records have failed one after another."""
        for row in rows:
            self._failures = self._failures + 1 if row["status"] == "error" else 0
            if self._failures == FAILURES:
                raise RunError(
                    f"{FAILURES} records failed one after another, the last with: {row['error']} Mend that, and resume "
                    "with --retry-errors."
                )


class Committer:
    """A thread that writes rows to shards. Its error is raised by the next call of `put`, or by `close`.

    Args:
        task: the worker's task.
        identity: the run's identity.
        committed: called after each shard.
    """

    def __init__(self, task: WorkerTask, identity: dict[str, Any], committed: Callable[[], None]) -> None:
        self._task = task
        self._schema = schema(identity)
        self._committed = committed
        self._names = next_name(task.folder, task.name)
        self._rows: queue.Queue[list[ShardRow] | None] = queue.Queue(maxsize=8)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="committer", daemon=True)
        self._thread.start()

    def put(self, rows: list[ShardRow] | None) -> None:
        """Queue rows, None to end the thread; wait while the queue is full."""
        while self._thread.is_alive():
            with suppress(queue.Full):
                self._rows.put(rows, timeout=_TICK_S)
                return
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Commit the remaining rows and end the thread."""
        self.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            more = True
            while more:
                rows = self._rows.get()
                more = rows is not None and self._write_shard(rows)
        except BaseException as error:
            self._error = error

    def _write_shard(self, rows: list[ShardRow] | None) -> bool:
        """Write a shard that begins with these rows; return whether more rows may come."""
        due = time.monotonic() + self._task.commit_s
        with new_shard(next(self._names), self._schema) as writer:
            while rows is not None:
                writer.add(rows)
                left = due - time.monotonic()
                if left <= 0 or writer.rows >= self._task.shard_rows or writer.bytes >= SHARD_BYTES:
                    break
                try:
                    rows = self._rows.get(timeout=left)
                except queue.Empty:
                    break
        self._committed()
        return rows is not None
