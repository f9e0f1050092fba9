"""Uploads: parse bodies, and store images for later requests. The middleware has limited their size."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, Protocol

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import create_form_parser
from starlette.exceptions import HTTPException
from starlette.requests import Request

from dave_fast.serve.limits import Limits
from dave_fast.serve.middleware import UploadBudget

# A body of one of these types is the image itself; the last is curl's default.
RAW = ("image/", "application/octet-stream", "application/x-www-form-urlencoded")
FORM = "multipart/form-data"
_FIELDS = 32


@dataclass
class Body:
    """The body of a request.

    Attributes:
        content: the image file.
        fields: options, if the body is a form.
    """

    content: bytes
    fields: dict[str, Any] = field(default_factory=dict)


async def read_body(request: Request) -> Body:
    """Read the body of a request.

    Raises:
        HTTPException: 415, it is no image; 400, the form is malformed; 422, the form has other files, or repeats.
    """
    kind = request.headers.get("content-type", RAW[1]).split(";")[0].strip().lower()
    if kind == FORM:
        return _form(request.headers["content-type"], await request.body())
    if not kind.startswith(RAW):
        raise HTTPException(415, f"the body is {kind[:100]}; send the image file itself (image/*) or {FORM}.")
    return Body(await request.body())


def _form(content_type: str, content: bytes) -> Body:
    """Return the file `image` of a form, and its other fields."""
    body, files = Body(b""), []

    def on_field(field: Any) -> None:
        name, value = field.field_name.decode("utf-8", "replace"), (field.value or b"").decode("utf-8", "replace")
        if name in ("target", "depth"):
            body.fields.setdefault(name, []).append(value)
        elif name in body.fields or len(body.fields) >= _FIELDS:
            raise HTTPException(422, f"the form has {name[:100]!r} twice, or more than {_FIELDS} fields.")
        else:
            body.fields[name] = value

    def on_file(file: Any) -> None:
        files.append(file)
        name = (file.field_name or b"").decode("utf-8", "replace")
        if name != "image" or len(files) > 1:
            raise HTTPException(422, f"the form has a file {name[:100]!r}; expected one file, named 'image'.")
        file.file_object.seek(0)
        body.content = file.file_object.read()

    try:
        headers = {"Content-Type": content_type.encode("latin-1")}
        parser = create_form_parser(headers, on_field, on_file, config={"MAX_MEMORY_FILE_SIZE": 1 << 40})
        parser.write(content)
        parser.finalize()
    # Malformed bodies: without a boundary, with a malformed header, or with a part that has no name.
    except (FormParserError, ValueError, AttributeError) as error:
        raise HTTPException(400, "the form cannot be read; send multipart/form-data with a file 'image'.") from error
    finally:
        for file in files:
            file.close()
    return body


class ImageStore(Protocol):
    """A store of images for later requests: `MemoryImageStore`, or one that several servers share."""

    async def put(self, content: bytes) -> str:
        """Store an image file and return its id."""

    async def get(self, name: str) -> bytes:
        """Return a stored image file; HTTPException 404 if there is none of that id."""


class MemoryImageStore:
    """Images in memory under ids that cannot be guessed; old ones expire, and the oldest make room.

    Args:
        limits: number and age of the images.
        budget: bound on the bytes of all uploads.
    """

    def __init__(self, limits: Limits, budget: UploadBudget) -> None:
        self.limits, self.budget = limits, budget
        self._images: OrderedDict[str, tuple[float, bytes]] = OrderedDict()

    async def put(self, content: bytes) -> str:
        """Store an image file and return its id; HTTPException 503 if there is no room."""
        self._drop_expired()
        while self._images and (
            len(self._images) >= self.limits.stored_images or self.budget.now + len(content) > self.budget.most
        ):
            self._drop_oldest()
        self.budget.add(len(content))
        name = secrets.token_urlsafe(18)
        self._images[name] = (time.monotonic(), content)
        return name

    async def get(self, name: str) -> bytes:
        """Return a stored image file; HTTPException 404 if there is none of that id, or it has expired."""
        self._drop_expired()
        if name not in self._images:
            raise HTTPException(404, "there is no image of that id, or it has expired; send it to /v1/images again.")
        return self._images[name][1]

    def _drop_expired(self) -> None:
        oldest = time.monotonic() - self.limits.stored_seconds
        while self._images and next(iter(self._images.values()))[0] < oldest:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        _, (_, content) = self._images.popitem(last=False)
        self.budget.now -= len(content)
