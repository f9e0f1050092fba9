"""Middleware of every HTTP exchange: limits of the body, a request id, a log line, a count.

It is pure ASGI, so that bodies and disconnections pass unchanged. Routes need no limits of their own: bodies that are
too large, too slow or too many at once are refused here (413, 408, 503). A route finds in `request.state` the `share`
of the account of memory that ends with the exchange, and when it `began`.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dave_fast.errors import RefusedError
from dave_fast.serve.account import RETRY_AFTER, Account, Share
from dave_fast.serve.limits import Limits
from dave_fast.serve.prometheus import Metrics

log = logging.getLogger("dave_fast.serve.access")

_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
# A connection whose body was not read to its end cannot be used again.
_CLOSE = {"connection": "close"}
# What is answered also where all connections are in use.
PROBES = ("/healthz", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready")


class LimitsMiddleware:
    """The middleware.

    Args:
        app: the ASGI app behind it.
        metrics: counts requests.
        limits: limits of bodies.
        account: of the memory that requests take.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, limits: Limits, account: Account) -> None:
        self.app, self.metrics, self.limits, self.account = app, metrics, limits, account

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle an exchange; the arguments are those of ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # The server knows when the first byte came, and whether all connections are in use.
        connection = scope.setdefault("state", {}).get("connection")
        began = connection.began if connection else time.monotonic()
        share = Share(self.account)
        scope["state"] |= {"began": began, "share": share}
        exchange = _Exchange(scope, receive, send, self.limits, share, connection)
        try:
            if connection and connection.crowded() and scope["path"] not in PROBES:
                await _crowded(scope, exchange.receive, exchange.send)
            else:
                await self.app(scope, exchange.receive, exchange.send)
        except Exception:
            # It is answered outside of this middleware.
            exchange.status = 500
            raise
        finally:
            share.close()
            # The route's template and not the path: clients choose paths, and a metric must have few labels.
            route = getattr(scope.get("route"), "path", "none")
            self.metrics.requests.labels(route, str(exchange.status)).inc()
            fields = {"method": scope["method"], "route": route, "status": exchange.status}
            seconds = round(time.monotonic() - began, 4)
            log.info("request", extra=fields | {"request": exchange.name.decode(), "seconds": seconds})


_crowded = JSONResponse(
    {"detail": "all connections are in use; try again later."}, 503, {"retry-after": str(RETRY_AFTER), **_CLOSE}
)


class _Exchange:
    """One request and its answer; `connection` is the server's, None where it has none that we know."""

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, limits: Limits, share: Share, connection: Any
    ) -> None:
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        self.name: bytes = given if _ID.fullmatch(given) else secrets.token_hex(8).encode()
        # The status in the log if the client goes away before there is an answer.
        self.status = 499
        self.read = 0
        self._declared = headers.get(b"content-length", b"")
        self._receive, self._send, self._limits, self._share = receive, send, limits, share
        self._connection, self._started = connection, False
        self._until = asyncio.get_running_loop().time() + limits.upload_seconds
        self._whole = False

    async def receive(self) -> Message:
        """Return the next piece of the body, within the limits, and after the body the disconnection."""
        if self._whole:
            return await self._receive()
        try:
            return await self._piece()
        except HTTPException:
            if not self._started or self._connection is None:
                raise
            # It cannot be told any more: the answer has begun.
            self._connection.transport.abort()
            return await self._receive()

    async def _piece(self) -> Message:
        # A length of very many digits is larger than any limit, and more than `int` takes.
        if self._declared.isdigit() and (len(self._declared) > 18 or int(self._declared) > self._limits.body_bytes):
            raise self._too_large()
        try:
            async with asyncio.timeout_at(self._until):
                message = await self._receive()
        except TimeoutError:
            seconds = self._limits.upload_seconds
            text = f"the upload took more than {seconds:g} s; send a smaller image."
            raise HTTPException(408, text, _CLOSE) from None
        if message["type"] == "http.request":
            more = len(message.get("body", b""))
            if self.read + more > self._limits.body_bytes:
                raise self._too_large()
            try:
                # Once in pieces, and once whole.
                self._share.hold(2 * more)
            except RefusedError as error:
                raise HTTPException(503, f"{error}.", {"retry-after": str(RETRY_AFTER), **_CLOSE}) from error
            self.read += more
            self._whole = not message.get("more_body", False)
        return message

    def _too_large(self) -> HTTPException:
        megabytes = self._limits.body_bytes / 2**20
        return HTTPException(413, f"the body is too large; at most {megabytes:g} MiB are taken.", _CLOSE)

    async def send(self, message: Message) -> None:
        """Send a piece of the answer."""
        if message["type"] == "http.response.start":
            self.status, self._started = message["status"], True
            message = {**message, "headers": [*message["headers"], (b"x-request-id", self.name)]}
        await self._send(message)
        if message["type"] == "http.response.body" and not message.get("more_body") and self._connection is not None:
            # What the system has not taken yet is memory, which the share holds until the exchange ends.
            await self._connection.flow.drain()
