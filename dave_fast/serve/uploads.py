"""What comes in: bodies taken apart, and images kept for later requests. Their limits are the middleware's."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import create_form_parser
from starlette.exceptions import HTTPException
from starlette.requests import Request

from dave_fast.serve.limits import Limits
from dave_fast.serve.middleware import UploadBudget

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
        return _form(request.headers["content-type"], await request.body())
    if not kind.startswith(RAW):
        raise HTTPException(415, f"the body is {kind[:100]}; send the image file itself (image/*) or {FORM}.")
    return Body(await request.body())


def _form(content_type: str, content: bytes) -> Body:
    """The file `image` of a form, and its other fields."""
    body, files = Body(b""), []
    wrong: list[str] = []

    def on_field(field: Any) -> None:
        name, value = field.field_name.decode("utf-8", "replace"), (field.value or b"").decode("utf-8", "replace")
        if name == "target":
            body.fields.setdefault("target", []).append(value)
        elif name in body.fields or len(body.fields) >= _FIELDS:
            wrong.append(f"the form gives {name[:100]!r} twice, or too many fields.")
        else:
            body.fields[name] = value

    def on_file(file: Any) -> None:
        files.append(file)
        name = (file.field_name or b"").decode("utf-8", "replace")
        if name != "image" or len(files) > 1:
            wrong.append(f"the form has a file {name[:100]!r}; there is one, and it is called 'image'.")
        file.file_object.seek(0)
        body.content = file.file_object.read()

    try:
        parser = create_form_parser(
            {"Content-Type": content_type.encode("latin-1")},
            on_field,
            on_file,
            config={"MAX_MEMORY_FILE_SIZE": 1 << 40},
        )
        parser.write(content)
        parser.finalize()
    # whatever the bytes provoke: no boundary, a header that is none, a part without a name
    except (FormParserError, ValueError, AttributeError) as error:
        raise HTTPException(400, "the form cannot be read; send multipart/form-data with a file 'image'.") from error
    finally:
        for file in files:
            file.close()
    if wrong:
        raise HTTPException(422, wrong[0])
    return body


class ImageStore(Protocol):
    """What keeps images for later requests: `MemoryStore`, or what stands for one that several servers share."""

    async def put(self, content: bytes) -> str:
        """Keep an image; its id."""

    async def get(self, name: str) -> bytes:
        """An image that was kept."""


class MemoryStore:
    """Images under ids that cannot be guessed; old ones are forgotten, and the oldest make room."""

    def __init__(self, limits: Limits, held: UploadBudget, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits, self.held, self._clock = limits, held, clock
        self._images: OrderedDict[str, tuple[float, bytes]] = OrderedDict()

    async def put(self, content: bytes) -> str:
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

    async def get(self, name: str) -> bytes:
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
