"""The local runner: one worker a device on this machine, and a parent that reads the source and counts what is done.

The parent holds the folder's lock, compares identities, sends records to each worker ahead of time, shows progress and
stops the run if there is none. It imports no torch and makes no maps.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

from dave_fast.errors import InputError, RunError
from dave_fast.run.feed import CONTENT_BYTES, Feed
from dave_fast.run.folder import RunFolder
from dave_fast.run.identity import differences
from dave_fast.run.mapper import MapSettings
from dave_fast.run.messages import Alive, End, Finished, Go, Hello, Mapped, Stop
from dave_fast.run.progress import Report, Tally
from dave_fast.run.shards import SHARD_ROWS
from dave_fast.run.stopping import stop_in_order
from dave_fast.run.worker import WorkerTask, work

# Seconds that a worker may take to commit and end when it is told to.
_PATIENCE_S = 120.0
_TICK_S = 0.25
_DECODERS = 16


@dataclass(frozen=True)
class Machine:
    """How a run uses the machine.

    Attributes:
        devices: names of torch devices, one worker each; None chooses as `DAVE` does.
        workers: decoding threads of each worker, None for a share of the cores.
        shard_rows: rows of a shard, None for the runner's default.
        commit_s: seconds after which rows are committed, however few they are.
        watchdog_s: seconds without any progress after which the run stops.
    """

    devices: Sequence[str | None] = (None,)
    workers: int | None = None
    shard_rows: int | None = None
    commit_s: float = 300.0
    watchdog_s: float = 900.0


def run_local(run_folder: RunFolder, settings: MapSettings, machine: Machine, report: Report) -> Tally:
    """Explain the records that have no row yet.

    Args:
        run_folder: the run's folder and source.
        settings: the settings of the maps.
        machine: devices, threads and shard size.
        report: shows progress.

    Returns:
        The counts of the run.

    Raises:
        InputError: the source or a setting is wrong, or the folder holds another run.
        RunError: the run stopped early. What was committed stays; rows that a worker had not committed when it died,
            or when nothing had moved for `watchdog_s`, are made again by the next run.
    """
    parent = _Parent(run_folder, settings, machine, report)
    try:
        return parent.run()
    finally:
        parent.end()


@dataclass
class _WorkerHandle:
    """A worker as its parent sees it."""

    process: SpawnProcess
    connection: Connection
    hello: Hello | None = None
    # Bytes of each record that was sent and has no row yet.
    sent: deque[int] = field(default_factory=deque)
    last: Finished | None = None

    @property
    def name(self) -> str:
        return self.process.name

    def room(self) -> int:
        """Return how many records may be sent to it now."""
        if self.hello is None or self.last is not None or sum(self.sent) > CONTENT_BYTES:
            return 0
        return self.hello.window - len(self.sent)


class _Parent:
    """The parent process of a run and its workers, which are started by the constructor."""

    def __init__(self, run_folder: RunFolder, settings: MapSettings, machine: Machine, report: Report) -> None:
        self.run_folder, self.report, self.machine = run_folder, report, machine
        self.tally = Tally(workers=len(machine.devices))
        self._told_to_stop = False
        # A forked process cannot use the GPU of its parent, nor its threads.
        context = multiprocessing.get_context("spawn")
        self.workers: list[_WorkerHandle] = []
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        share = max(1, cores // len(machine.devices))
        decoders = machine.workers or min(_DECODERS, share)
        rows = machine.shard_rows or SHARD_ROWS
        try:
            for number, device in enumerate(machine.devices):
                ours, theirs = context.Pipe()
                task = WorkerTask(
                    settings, device, share, decoders, run_folder.folder, f"{number:03d}", rows, machine.commit_s
                )
                process = context.Process(
                    target=work, args=(task, run_folder.lock, theirs), name=f"{number} ({device or 'auto'})"
                )
                process.start()
                theirs.close()
                self.workers.append(_WorkerHandle(process, ours))
        except BaseException:
            self.end()
            raise

    def run(self) -> Tally:
        error: BaseException | None = None
        with stop_in_order(self.tally, self.report):
            self._hear_until(lambda: all(w.hello for w in self.workers) or self._over())
            if not self._over():
                self._begin()
                error = self._feed()
            self._stop()
            self._hear_until(lambda: all(w.last for w in self.workers), patience_s=_PATIENCE_S)
        if error := error or self._failure():
            raise error
        return self.tally

    def _begin(self) -> None:
        """Compare the workers' configurations with each other and with the folder, then let the workers begin."""
        hellos = [w.hello for w in self.workers if w.hello is not None]
        first = hellos[0]
        for other in hellos[1:]:
            one, two = ({**hello.configuration, "weights": hello.weights} for hello in (first, other))
            if found := differences(one, two):
                words = ", ".join(f"{name} {ours} and {theirs}" for name, ours, theirs in found)
                raise InputError(
                    f"{first.device} and {other.device} would make different maps ({words}): give options that are the "
                    "same on both, such as --precision, or one of the devices."
                )
        for note in dict.fromkeys(note for hello in hellos for note in hello.notes):
            self.report.note(note)
        identity = self.run_folder.check(first.configuration, first.weights, first.names)
        for worker in self.workers:
            worker.connection.send(Go(identity))
        self.tally.begin()

    def _feed(self) -> BaseException | None:
        """Send records to workers that have room until there are none left or the run has to end.

        Returns:
            The error that ended the reading of the source, or None.
        """
        feed = Feed(self.run_folder.source, self.run_folder.done.__contains__, self.run_folder.left())
        finished = False
        while not self._over() and not (finished and all(w.last for w in self.workers)):
            while (room := [w for w in self.workers if w.room() > 0]) and (record := feed.take()):
                # The worker with the fewest waiting records comes first.
                worker = min(room, key=lambda w: len(w.sent))
                worker.sent.append(len(record.content or b""))
                self._send(worker, record)
            if feed.ended and not finished:
                finished = True
                for worker in self.workers:
                    self._send(worker, End())
            self._hear(_TICK_S if feed or finished else 0.02)
        feed.stop()
        self.tally.doubles = feed.doubles
        return feed.error

    def _failure(self) -> BaseException | None:
        """Return the error that ended a worker, if any."""
        return next((w.last.error for w in self.workers if w.last and w.last.error), None)

    def _over(self) -> bool:
        """Return whether the run has to end early: a signal came, or a worker failed."""
        return self.tally.stopped_by is not None or self._failure() is not None

    def _stop(self) -> None:
        self._told_to_stop = True
        for worker in self.workers:
            if worker.last is None:
                self._send(worker, Stop())

    def end(self) -> None:
        """Close the connections and end the processes, by force after a second."""
        for worker in self.workers:
            worker.connection.close()
        for worker in self.workers:
            worker.process.join(1.0)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()

    def _send(self, worker: _WorkerHandle, message: object) -> None:
        # `_hear` reads a closed pipe and reports the worker's end.
        with suppress(BrokenPipeError, ConnectionResetError):
            worker.connection.send(message)

    def _hear_until(self, reached: Callable[[], bool], patience_s: float | None = None) -> None:
        until = None if patience_s is None else time.monotonic() + patience_s
        while not reached():
            self._hear(_TICK_S)
            if until is not None and time.monotonic() > until:
                late = ", ".join(w.name for w in self.workers if w.last is None)
                raise RunError(f"workers did not end in {patience_s:.0f} s and were killed: {late}. Resume the run.")

    def _hear(self, timeout: float) -> None:
        """Handle the messages that come within `timeout` seconds; raise RunError if nothing has come for too long."""
        live = {w.connection: w for w in self.workers if w.last is None}
        for connection in wait(list(live), timeout):
            worker = live[connection]  # type: ignore[index]
            try:
                while worker.last is None and worker.connection.poll():
                    self._heard(worker, worker.connection.recv())
            except (EOFError, ConnectionResetError):
                self._died(worker)
        self.report.update(self.tally)
        silent_s = time.monotonic() - self.tally.last_progress
        if live and silent_s > self.machine.watchdog_s and not self._told_to_stop:
            raise RunError(
                f"no progress for {silent_s:.0f} s; waiting for {self._waiting_for()}. What is committed is kept: look "
                "for a hanging disk, network or device, and resume. Give --watchdog if this is no fault."
            )

    def _heard(self, worker: _WorkerHandle, message: object) -> None:
        if isinstance(message, Hello):
            worker.hello = message
            self.tally.alive(worker.name)
        elif isinstance(message, Alive):
            self.tally.alive(worker.name, message.images)
        elif isinstance(message, Mapped):
            for _ in range(message.records):
                worker.sent.popleft()
            self.tally.mapped(worker.name, message)
        elif isinstance(message, Finished):
            worker.last = message

    def _died(self, worker: _WorkerHandle) -> None:
        """Note that a worker's process ended without its last message."""
        worker.process.join(5.0)
        code = worker.process.exitcode
        how = f"was killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"ended with {code}"
        hint = " (the system does that when memory runs out)" if code == -signal.SIGKILL else ""
        worker.last = Finished(
            RunError(f"worker {worker.name} {how}{hint}; what is committed is kept: resume the run.")
        )

    def _waiting_for(self) -> str:
        if any(w.hello is None for w in self.workers):
            return "a worker to load the model"
        busy = [w.name for w in self.workers if w.sent]
        return f"worker {', '.join(busy)}" if busy else f"the source {self.run_folder.source.place}"
