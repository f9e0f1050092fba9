"""What every HTTP exchange passes: limits of its body, a request id, a log line, a count.

Pure ASGI, so that bodies and disconnections go through it as they are. Routes may read bodies as they like: too large,
too slow and too many at once are refused here (413, 408, 503), and so is a client that does not read its answer.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from dataclasses import dataclass

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dave_fast.serve.limits import Limits
from dave_fast.serve.prometheus import Metrics

log = logging.getLogger("dave_fast.serve.access")

_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
# a connection whose body was not read to its end cannot be used again
_CLOSE = {"connection": "close"}


@dataclass
class UploadBudget:
    """Bytes of uploads in memory, over all clients."""

    most: int
    now: int = 0

    def add(self, more: int) -> None:
        """HTTPException 503 where it would be too many."""
        if self.now + more > self.most:
            raise HTTPException(503, "too many uploads at once; come again.", {"retry-after": "1", **_CLOSE})
        self.now += more


class LimitsMiddleware:
    """The middleware."""

    def __init__(self, app: ASGIApp, metrics: Metrics, limits: Limits, held: UploadBudget) -> None:
        self.app, self.metrics, self.limits, self.held = app, metrics, limits, held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.monotonic()
        exchange = _Exchange(scope, receive, send, self.limits, self.held)
        try:
            await self.app(scope, exchange.receive, exchange.send)
        finally:
            self.held.now -= exchange.read
            # the route's template, not the path: paths are the clients' to choose, labels must be few
            route = getattr(scope.get("route"), "path", "none")
            self.metrics.requests.labels(route, str(exchange.status)).inc()
            told = {"method": scope["method"], "route": route, "status": exchange.status}
            seconds = round(time.monotonic() - began, 4)
            log.info("request", extra={**told, "request": exchange.name.decode(), "seconds": seconds})


class _Exchange:
    """One request and its answer."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, limits: Limits, held: UploadBudget) -> None:
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        self.name: bytes = given if _ID.fullmatch(given) else secrets.token_hex(8).encode()
        # what the log says of a client that went away before there was an answer
        self.status = 499
        self.read = 0
        self._declared = headers.get(b"content-length", b"")
        self._receive, self._send, self._limits, self._held = receive, send, limits, held
        self._until = asyncio.get_running_loop().time() + limits.upload_seconds
        self._whole = False

    async def receive(self) -> Message:
        """The next piece of the body, within the limits; after it, the disconnection."""
        if self._whole:
            return await self._receive()
        if self._declared.isdigit() and int(self._declared) > self._limits.body_bytes:
            raise self._too_large()
        try:
            async with asyncio.timeout_at(self._until):
                message = await self._receive()
        except TimeoutError:
            seconds = self._limits.upload_seconds
            raise HTTPException(408, f"the upload took more than {seconds:g} s.", _CLOSE) from None
        if message["type"] == "http.request":
            more = len(message.get("body", b""))
            if self.read + more > self._limits.body_bytes:
                raise self._too_large()
            self._held.add(more)
            self.read += more
            self._whole = not message.get("more_body", False)
        return message

    def _too_large(self) -> HTTPException:
        megabytes = self._limits.body_bytes / 2**20
        return HTTPException(413, f"the body is too large; at most {megabytes:g} MiB are taken.", _CLOSE)

    async def send(self, message: Message) -> None:
        """The answer; TimeoutError where the client does not read it."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message = {**message, "headers": [*message["headers"], (b"x-request-id", self.name)]}
        async with asyncio.timeout(self._limits.upload_seconds):
            await self._send(message)
