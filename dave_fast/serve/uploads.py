"""What comes in: bodies taken apart, and images kept for later requests. Their limits are the middleware's."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from dave_fast.serve.limits import Limits
from dave_fast.serve.middleware import Held

# a body of one of these types is the image itself; the last is what curl says where it is told nothing
RAW = ("image/", "application/octet-stream", "application/x-www-form-urlencoded")
FORM = "multipart/form-data"
_FIELDS = 32


@dataclass
class Body:
    """An image file as it was sent, and the options that came beside it in a form."""

    content: bytes
    fields: dict[str, Any] = field(default_factory=dict)


async def read_body(request: Request) -> Body:
    """The body of a request. HTTPException: 415 no image, 400 a broken form, 422 a form with other things."""
    kind = request.headers.get("content-type", RAW[1]).split(";")[0].strip().lower()
    if kind == FORM:
        return await _form(request)
    if not kind.startswith(RAW):
        raise HTTPException(415, f"the body is {kind[:100]}; send the image file itself (image/*) or {FORM}.")
    return Body(await request.body())


async def _form(request: Request) -> Body:
    """The file `image` of a form, and its other fields."""
    content = await request.body()

    async def whole() -> AsyncIterator[bytes]:
        yield content

    parser = MultiPartParser(request.headers, whole(), max_files=1, max_fields=_FIELDS)  # type: ignore[arg-type]
    try:
        form = await parser.parse()
    # whatever the bytes provoke: a missing boundary, an unknown charset, a header that is none
    except (MultiPartException, KeyError, ValueError, LookupError) as error:
        reason = getattr(error, "message", "it is malformed").rstrip(".")
        raise HTTPException(400, f"the form cannot be read: {reason}.") from error
    try:
        return await _taken_apart(form)
    finally:
        await form.close()


async def _taken_apart(form: FormData) -> Body:
    body = Body(b"")
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            if name != "image":
                raise HTTPException(422, f"the form has a file {name[:100]!r}; the image is called 'image'.")
            body.content = await value.read()
        elif name == "target":
            body.fields.setdefault("target", []).append(value)
        elif name in body.fields:
            raise HTTPException(422, f"the form gives {name[:100]!r} twice.")
        else:
            body.fields[name] = value
    return body


class Store:
    """Images under ids that cannot be guessed; old ones are forgotten, and the oldest make room."""

    def __init__(self, limits: Limits, held: Held, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits, self.held, self._clock = limits, held, clock
        self._images: OrderedDict[str, tuple[float, bytes]] = OrderedDict()

    def put(self, content: bytes) -> str:
        """Keep an image; its id."""
        self._forget_old()
        while self._images and (
            len(self._images) >= self.limits.stored_images or self.held.now + len(content) > self.held.most
        ):
            self._forget()
        self.held.add(len(content))
        name = secrets.token_urlsafe(18)
        self._images[name] = (self._clock(), content)
        return name

    def get(self, name: str) -> bytes:
        """An image that was kept; HTTPException 404 where there is none of that id, or none any more."""
        self._forget_old()
        if name not in self._images:
            raise HTTPException(404, "there is no such image, or no more; send it to /v1/images again.")
        return self._images[name][1]

    def _forget_old(self) -> None:
        oldest = self._clock() - self.limits.stored_seconds
        while self._images and next(iter(self._images.values()))[0] < oldest:
            self._forget()

    def _forget(self) -> None:
        _, (_, content) = self._images.popitem(last=False)
        self.held.now -= len(content)
