"""The processes in which bytes of clients are parsed and decoded (`untrusted`), in two lanes.

    quick   what needs little memory, for a quarter of a second; small bodies go first
    slow    what turned out to need more of either, for `Limits.decode_seconds`; what needs less memory goes first

Nobody knows in advance what a picture costs: a header may ask for much at once, a small one may take long. Every task
starts in the quick lane, where its header is read; there it ends, or is ended and starts again in the slow lane, so
that many expensive pictures hold up each other and nobody else. Both orders are times of arrival plus a little for
the size, so that nothing waits for ever. Where too many wait, the last in this order is refused.

A process that is too slow is killed; the next one is a fork of a process that has loaded all it needs, a matter of
milliseconds. This process of origin is started once for each process that serves, and ends with it.
"""

from __future__ import annotations

import asyncio
import atexit
import heapq
import itertools
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

from dave_fast.errors import ImageError, InputError, RefusedError, TooLargeError
from dave_fast.serve.account import RETRY_AFTER, Share
from dave_fast.serve.jobs import DeadlineError
from dave_fast.serve.limits import Limits
from dave_fast.serve.untrusted import HEAD, Message, lengths, packed

# What ends in the quick lane: seconds of work, bytes of memory.
QUICK_SECONDS, QUICK_BYTES = 0.25, 192 << 20
# Tasks that may wait in a lane.
WAITING = 64
# Seconds of arrival that a byte of a body, or of memory in the slow lane, is worth.
QUICK_ORDER, SLOW_ORDER = 1e-6, 1e-8
# An answer has at most this many times the bytes of its content, and these beside it: crops, numbers written in two
# characters that become four bytes.
_ANSWER = (4, 64 << 20)
# What Python needs to start and to find its packages.
_ENVIRONMENT = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "TMPDIR", "LANG", "LC_ALL")
_ERRORS = {"ImageError": ImageError, "TooLargeError": TooLargeError, "InputError": InputError}


class Workshop:
    """Both lanes of one server. Everything but the constructor is called on one event loop.

    Args:
        limits: of which `decode_seconds` counts here.
    """

    def __init__(self, limits: Limits) -> None:
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.limits = limits
        self._quick = _Lane(min(8, max(2, cpus // 2)))
        self._slow = _Lane(min(4, max(1, cpus // 4)))

    async def start(self) -> None:
        """Start a process, so that the first request does not wait for it."""
        async with self._quick.worker(0.0, None):
            pass

    def stop(self) -> None:
        """End all processes."""
        for lane in (self._quick, self._slow):
            lane.stop()

    async def run(
        self, task: str, content: bytes, share: Share, *, deadline: float | None = None, **options: Any
    ) -> Message:
        """Return the answer of a task of `untrusted`.

        Args:
            task: its name in `untrusted.TASKS`.
            content: the client's bytes.
            share: of the account of memory, which holds what the task needs meanwhile.
            deadline: by `time.monotonic`, or None.
            options: of the task.

        Raises:
            InputError: the content is refused; ImageError and TooLargeError are of this class.
            RuntimeError: the task has a fault of its own.
            RefusedError: too many tasks wait, or memory is taken.
            DeadlineError: the deadline passed.
        """
        options = {"task": task, **options}
        now = asyncio.get_running_loop().time
        began, held = now(), 0
        try:
            async with self._quick.worker(began + QUICK_ORDER * len(content), deadline) as worker:
                until = _first(now() + QUICK_SECONDS, deadline)
                try:
                    need = _checked(await worker.begin(options, content, until))["need"]
                    share.hold(need + 2 * len(content))
                    held = need + 2 * len(content)
                    if need <= QUICK_BYTES:
                        return _result(await worker.finish(until))
                    await worker.decline()
                except TimeoutError:
                    worker.kill()
            seconds = self.limits.decode_seconds
            async with self._slow.worker(began + SLOW_ORDER * held, deadline) as worker:
                until = _first(now() + seconds, deadline)
                try:
                    need = _checked(await worker.begin(options, content, until))["need"]
                    more = need + 2 * len(content) - held
                    share.hold(more)
                    held += more
                    return _result(await worker.finish(until))
                except TimeoutError:
                    worker.kill()
                    if until != deadline:
                        text = f"reading it takes more than {seconds:g} s; send a smaller file, or another format."
                        raise TooLargeError(text) from None
            raise DeadlineError("the request was not read by its deadline; allow more time, or send a smaller image.")
        finally:
            share.release(held)


def _first(until: float, deadline: float | None) -> float:
    return until if deadline is None else min(until, deadline)


def _checked(told: Message) -> dict[str, Any]:
    return _result(told)[0]


def _result(told: Message) -> Message:
    """Return an answer, or raise the error that it tells."""
    if "error" in told[0]:
        kind, detail = told[0]["error"], told[0]["detail"]
        raise _ERRORS.get(kind, ImageError)(detail) if kind else RuntimeError(f"a task failed: {detail}")
    return told


class _Lane:
    """Some processes, and those that wait for one, by order."""

    def __init__(self, processes: int) -> None:
        self._free = processes
        self._idle: list[_Worker] = []
        self._waiting: list[tuple[float, int, asyncio.Future[None]]] = []
        self._numbers = itertools.count()

    def stop(self) -> None:
        """End the processes that are idle; others end with their task."""
        while self._idle:
            self._idle.pop().kill()

    @asynccontextmanager
    async def worker(self, order: float, deadline: float | None) -> AsyncIterator[_Worker]:
        """Wait for a process; afterwards it is idle again, or killed after an error.

        Raises:
            RefusedError: too many wait.
            DeadlineError: the deadline passed.
        """
        await self._turn(order, deadline)
        worker: _Worker | None = None
        try:
            worker = self._idle.pop() if self._idle else await _Worker.start()
            yield worker
        except BaseException as error:
            # after an answer the process is at the beginning again
            if worker is not None and not (isinstance(error, InputError) and worker.rests):
                worker.kill()
            raise
        finally:
            if worker is not None and not worker.dead:
                self._idle.append(worker)
            self._pass_on()

    async def _turn(self, order: float, deadline: float | None) -> None:
        if self._free > 0:
            self._free -= 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (order, next(self._numbers), turn)
        heapq.heappush(self._waiting, entry)
        if len(self._waiting) > WAITING:
            last = max(self._waiting)
            self._drop(last)
            if not last[2].done():
                refused = RefusedError("full", "too many images wait to be read; try again later", RETRY_AFTER)
                last[2].set_exception(refused)
        try:
            async with asyncio.timeout_at(deadline):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                # the turn came, and nobody is there any more
                self._pass_on()
            elif entry in self._waiting:
                self._drop(entry)
            if isinstance(error, TimeoutError):
                raise DeadlineError("the request was not read by its deadline; allow more time.") from None
            raise

    def _drop(self, entry: tuple[float, int, asyncio.Future[None]]) -> None:
        self._waiting.remove(entry)
        heapq.heapify(self._waiting)

    def _pass_on(self) -> None:
        while self._waiting:
            turn = heapq.heappop(self._waiting)[2]
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1


class _Worker:
    """A process of `untrusted.serve_tasks`."""

    def __init__(self, pid: int, connection: socket.socket) -> None:
        self.pid, self.dead, self.rests = pid, False, True
        self._connection, self._most = connection, 0

    @classmethod
    async def start(cls) -> _Worker:
        """Fork a process."""
        pid, connection = await asyncio.get_running_loop().run_in_executor(None, _origin.fork)
        connection.setblocking(False)
        return cls(pid, connection)

    async def begin(self, options: Mapping[str, Any], content: bytes, until: float) -> Message:
        """Send a task; return what it says that it needs. TimeoutError where it has not at `until`."""
        self.rests, self._most = False, _ANSWER[0] * len(content) + _ANSWER[1]
        async with asyncio.timeout_at(until):
            told = await self._exchange(options, content)
        self.rests = "error" in told[0]
        return told

    async def finish(self, until: float) -> Message:
        """Let the task go on; return its answer. TimeoutError where there is none at `until`."""
        async with asyncio.timeout_at(until):
            told = await self._exchange({"go": True}, b"")
        self.rests = True
        return told

    async def decline(self) -> None:
        """Let the task not go on."""
        await asyncio.get_running_loop().sock_sendall(self._connection, packed({"go": False}, b""))
        self.rests = True

    def kill(self) -> None:
        """End the process; idempotent."""
        if not self.dead:
            self.dead = True
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self._connection.close()

    async def _exchange(self, told: Mapping[str, Any], payload: bytes) -> Message:
        loop = asyncio.get_running_loop()
        try:
            await loop.sock_sendall(self._connection, packed(told, payload))
            if payload:
                await loop.sock_sendall(self._connection, payload)
            sizes = lengths(await self._read(HEAD))
            if sum(sizes) > self._most:
                raise EOFError
            text, content = await self._read(sizes[0]), await self._read(sizes[1])
            return json.loads(text), content
        except (OSError, EOFError, ValueError) as error:
            if isinstance(error, TimeoutError):
                raise
            self.kill()
            raise ImageError("reading it made the reader crash; the file is damaged.") from error

    async def _read(self, size: int) -> bytes:
        loop, content, done = asyncio.get_running_loop(), bytearray(size), 0
        while done < size:
            more = await loop.sock_recv_into(self._connection, memoryview(content)[done:])
            if more == 0:
                raise EOFError
            done += more
        return bytes(content)


class _Origin:
    """The process whose forks do the work; started at the first need, and again where it was ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def fork(self) -> tuple[int, socket.socket]:
        """Return the id of a new process, and a connection to it."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            assert self._socket is not None
            ours, theirs = socket.socketpair()
            try:
                with theirs:
                    socket.send_fds(self._socket, [b"f"], [theirs.fileno()])
                return self._told(), ours
            except OSError:
                ours.close()
                raise

    def end(self) -> None:
        """End the process; a new one is started where it is needed again."""
        if self._process is not None and self._socket is not None:
            self._socket.close()
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> None:
        if self._socket is not None:
            self._socket.close()
        self._socket, theirs = socket.socketpair()
        # No keys or tokens of the server's environment; one thread, since the work of a process is one picture.
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "dave_fast.serve.untrusted"]
        with theirs:
            self._process = subprocess.Popen(
                command, stdin=theirs.fileno(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment
            )
        try:
            self._told()
        except OSError as error:
            _, told = self._process.communicate()
            raise RuntimeError(f"the process that reads images did not start: {told.decode()[-2000:]}") from error

    def _told(self) -> int:
        assert self._socket is not None
        number: int = struct.unpack(">q", _exactly(self._socket, 8))[0]
        return number


def _exactly(connection: socket.socket, size: int) -> bytes:
    content = connection.recv(size, socket.MSG_WAITALL)
    if len(content) < size:
        raise ConnectionResetError("the process that reads images has ended")
    return content


_origin = _Origin()
atexit.register(_origin.end)
