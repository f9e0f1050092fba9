"""The app under uvicorn: signals, draining and slow headers.

After SIGTERM or SIGINT new requests are refused (503, also at /readyz) and accepted ones are answered; at the end of
the drain deadline the rest is answered with the samples that are done. Then the process ends with exit code 0. A
second signal ends it at once, with exit code 143 (SIGTERM) or 130 (SIGINT).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
import time
from collections.abc import Iterator

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from dave_fast.serve.limits import SPARE_CONNECTIONS, Limits
from dave_fast.serve.logs import log_to_stderr as log_to_stderr
from dave_fast.serve.service import Service
from dave_fast.serve.signals import end_at_once, end_start
from dave_fast.signals import at_signals

log = logging.getLogger("dave_fast.serve")

# Seconds between two looks at the open requests of a server that drains.
_LOOK = 0.02
# Seconds between the last answer and the end, in which answers are sent.
_FLUSH = 0.2


def guarded(limits: Limits) -> type[H11Protocol]:
    """Return uvicorn's protocol with an end for every connection.

    A connection that has no request ends `header_seconds` after its first byte, or at once where another one needs its
    place. What was sent to a client and not read within `upload_seconds` is dropped with the connection, also where
    the server has closed it: a close waits for what is unsent.
    """

    class GuardedProtocol(H11Protocol):
        _watch: asyncio.TimerHandle | None = None
        _unread: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.began = self.rests_since = time.monotonic()
            # The middleware asks when a request began, and whether all connections are in use.
            self.app_state = {**self.app_state, "connection": self}
            # Any byte that the system does not take at once counts as unread.
            transport.set_write_buffer_limits(high=0)
            self._arm()
            if len(self.connections) > limits.connections:
                self._make_place()

        def crowded(self) -> bool:
            """Return whether there are more connections than are served."""
            return len(self.connections) > limits.connections

        def data_received(self, data: bytes) -> None:
            if self._between_requests():
                if self.conn.trailing_data[0] == b"":
                    self.began = time.monotonic()
                if self._watch is None:
                    self._arm()
            super().data_received(data)
            if not self._between_requests():
                self._disarm()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._unread = self.loop.call_later(limits.upload_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._unread is not None:
                self._unread.cancel()

        def send_400_response(self, msg: str) -> None:
            """Answer bytes that are no HTTP; end the connection where they come amid or behind another answer."""
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                super().send_400_response(msg)
                # A request before these bytes has this answer, and no other.
                if self.cycle is not None and not self.cycle.response_complete:
                    self.cycle.disconnected = True
                    self.cycle.message_event.set()
            elif self.conn.our_state is h11.SEND_BODY:
                self.transport.abort()
            else:
                # What is unsent of the answer is sent first.
                self.transport.close()

        def on_response_complete(self) -> None:
            self.rests_since = time.monotonic()
            super().on_response_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            self._disarm()
            if self._unread is not None:
                self._unread.cancel()
            super().connection_lost(exc)

        def _between_requests(self) -> bool:
            return self.cycle is None or self.cycle.response_complete

        def _make_place(self) -> None:
            """End the connection that has rested longest; where none rests and too many wait, this one."""
            others = [each for each in self.connections if isinstance(each, GuardedProtocol) and each is not self]
            resting = [each for each in others if each._between_requests()]
            if resting:
                min(resting, key=lambda each: each.rests_since).transport.abort()
            elif len(self.connections) > limits.connections + SPARE_CONNECTIONS:
                self.transport.abort()

        def _arm(self) -> None:
            self._watch = self.loop.call_later(limits.header_seconds, self._too_slow)

        def _disarm(self) -> None:
            if self._watch is not None:
                self._watch.cancel()
                self._watch = None

        def _too_slow(self) -> None:
            self._watch = None
            if self._between_requests() and not self.transport.is_closing():
                self.transport.write(b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
                self.transport.close()

    return GuardedProtocol


class Server(uvicorn.Server):
    """uvicorn's server, which drains the service before it ends.

    Args:
        config: uvicorn's configuration.
        service: the service of the app.
        drain_seconds: seconds to finish the accepted requests.
    """

    def __init__(self, config: uvicorn.Config, service: Service, drain_seconds: float) -> None:
        super().__init__(config)
        self.service, self.drain_seconds = service, drain_seconds
        self._draining: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        """The port that it listens at."""
        port: int = self.servers[0].sockets[0].getsockname()[1]
        return port

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the service, then listen."""
        await super().startup(sockets)
        if self.started:
            host = self.servers[0].sockets[0].getsockname()[0]
            log.info("listening", extra={"address": f"http://{host}:{self.port}", "models": list(self.service.models)})

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take the place of uvicorn's handlers, which raise a signal again at the end, and so set the exit code."""
        loop, signals = asyncio.get_running_loop(), 0

        def handle(number: int) -> None:
            nonlocal signals
            signals += 1
            if not self.started:
                end_start(number)
            elif signals > 1:
                end_at_once(number)
            loop.call_soon_threadsafe(self.end)

        with at_signals(handle):
            yield

    def end(self) -> None:
        """Drain, then stop; stop at once if called again. To be called on the event loop."""
        if self._draining is None:
            log.info("draining", extra={"open": len(self.service.jobs()), "seconds": self.drain_seconds})
            self.service.drain()
            self._draining = asyncio.get_running_loop().create_task(self._drain())
        else:
            self.force_exit = self.should_exit = True

    async def _drain(self) -> None:
        """Wait for the accepted requests; cut them short at the deadline, fail those that do not end; then stop."""
        deadline = time.monotonic() + self.drain_seconds
        while self.service.jobs() and time.monotonic() < deadline:
            await asyncio.sleep(_LOOK)
        left = self.service.jobs()
        deadline += 1 + min(self.drain_seconds, sum(self.service.maps.margin(job, job.ready) for job in left))
        for job in left:
            self.service.cut(job, "shutdown")
        while self.service.jobs() and time.monotonic() < deadline:
            await asyncio.sleep(_LOOK)
        self.service.fail_all()
        await asyncio.sleep(_FLUSH)
        self.should_exit = True


def make_server(app: FastAPI, limits: Limits, *, port: int = 0) -> Server:
    """Return a server for an app of `create_app`: `run(sockets)` it, or `await serve(sockets)`.

    Args:
        app: the app.
        limits: those of the app.
        port: of the loopback interface, where it is run without bound sockets; 0 takes a free one.
    """
    config = uvicorn.Config(
        app,
        port=port,
        http=guarded(limits),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=5,
        server_header=False,
    )
    return Server(config, app.state.service, limits.drain_seconds)


@contextlib.contextmanager
def running(app: FastAPI, limits: Limits) -> Iterator[str]:
    """Run a server in a thread of this process, for tests and load generators; yield its address."""
    server = make_server(app, limits)
    thread = threading.Thread(target=asyncio.run, args=(server.serve(),), daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    if not server.started:
        raise RuntimeError("the server did not start; its log says why")
    try:
        yield f"http://127.0.0.1:{server.port}"
    finally:
        server.servers[0].get_loop().call_soon_threadsafe(server.end)
        thread.join()
