"""Uploads: read bodies, and store images for later requests. The middleware has limited their size."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, Protocol

from starlette.exceptions import HTTPException
from starlette.requests import Request

from dave_fast.serve.account import Account
from dave_fast.serve.jobs import DeadlineError
from dave_fast.serve.limits import Limits
from dave_fast.serve.workshop import Workshop

# A body of one of these types is the image itself; the last is curl's default.
RAW = ("image/", "application/octet-stream", "application/x-www-form-urlencoded")
FORM = "multipart/form-data"
# Bytes of a store in a process of its own.
OWN_BYTES = 1 << 30


@dataclass
class Body:
    """The body of a request.

    Attributes:
        content: the image file.
        fields: options, if the body is a form.
    """

    content: bytes
    fields: dict[str, Any] = field(default_factory=dict)


async def read_body(request: Request, workshop: Workshop, deadline: float | None = None) -> Body:
    """Read the body of a request.

    Args:
        request: the HTTP request.
        workshop: where a form is parsed.
        deadline: by `time.monotonic`, or None.

    Raises:
        HTTPException: 415, it is no image.
        InputError: the form is malformed, has other files, or repeats.
        DeadlineError: the body was not there by the deadline.
    """
    kind = request.headers.get("content-type", RAW[1]).split(";")[0].strip().lower()
    if kind != FORM and not kind.startswith(RAW):
        raise HTTPException(415, f"the body is {kind[:100]}; send the image file itself (image/*) or {FORM}.")
    try:
        async with asyncio.timeout_at(deadline):
            content = await request.body()
    except TimeoutError:
        raise DeadlineError("the image had not arrived by the deadline; allow more time.") from None
    if kind != FORM:
        return Body(content)
    form = request.headers["content-type"]
    told, image = await workshop.run("form", content, request.state.share, deadline=deadline, content_type=form)
    return Body(image, told["fields"])


class ImageStore(Protocol):
    """A store of images for later requests: `MemoryImageStore`, or one that several servers share."""

    async def put(self, content: bytes) -> str:
        """Store an image file and return its id."""

    async def get(self, name: str) -> bytes:
        """Return a stored image file; HTTPException 404 if there is none of that id."""


class MemoryImageStore:
    """Images in memory under ids that cannot be guessed.

    They expire, and the oldest are dropped when there are too many, or when any request needs the memory.

    Args:
        limits: number and age of the images.
        account: of memory; None: one of its own.
    """

    def __init__(self, limits: Limits, account: Account | None = None) -> None:
        self.limits, self.account = limits, account or Account(limits.memory_bytes or OWN_BYTES)
        self.account.make_room = self._drop_oldest
        self._images: OrderedDict[str, tuple[float, bytes]] = OrderedDict()

    async def put(self, content: bytes) -> str:
        """Store an image file and return its id; RefusedError if there is no room."""
        self._drop_expired()
        with self.account.lock:
            if len(self._images) >= self.limits.stored_images:
                self._drop_oldest()
            self.account.hold(len(content))
            name = secrets.token_urlsafe(18)
            self._images[name] = (time.monotonic(), content)
        # Dropped by the clock, also where nobody asks any more.
        asyncio.get_running_loop().call_later(self.limits.stored_seconds, self._drop_expired)
        return name

    async def get(self, name: str) -> bytes:
        """Return a stored image file; HTTPException 404 if there is none of that id, or it has expired."""
        self._drop_expired()
        found = self._images.get(name)
        if found is None:
            raise HTTPException(404, "there is no image of that id, or it has expired; send it to /v1/images again.")
        return found[1]

    def _drop_expired(self) -> None:
        oldest = time.monotonic() - self.limits.stored_seconds
        with self.account.lock:
            while self._images and next(iter(self._images.values()))[0] <= oldest:
                self._drop_oldest()

    def _drop_oldest(self) -> bool:
        if not self._images:
            return False
        _, (_, content) = self._images.popitem(last=False)
        self.account.release(len(content))
        return True
