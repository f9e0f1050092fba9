"""A client of `dave-fast serve`, blocking and asynchronous.

    with Client("http://127.0.0.1:8000") as client:
        explanation = client.explain("photo.jpg", target="tabby", tolerance=0.2, deadline_ms=500)
        for update in client.stream("photo.jpg"):
            print(update.samples, update.error_bound)

An explanation is a function of its request, so that asking again is always safe. A request is repeated where the
server is busy (429, 503), the connection cannot be made, or it breaks before there is an answer: after the time that
Retry-After names, or one that doubles, with jitter, and never beyond `timeout`.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import random
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import numpy as np
from PIL import Image

from dave_fast.errors import DaveFastError, InputError, reason_of

__all__ = ["AsyncClient", "Client", "Explained", "ServerError"]

Picture = bytes | str | os.PathLike[str] | Image.Image | np.ndarray
_AGAIN = (429, 502, 503)
# Seconds: the first wait without Retry-After, and the longest.
_FIRST_WAIT, _LONGEST_WAIT = 0.1, 10.0


class ServerError(DaveFastError, RuntimeError):
    """A request that the server refused or failed to answer.

    Attributes:
        status: of HTTP; None where there was no answer.
        detail: the server's message.
        retry_after: seconds after which to ask again, or None.
        lost: whether the answer is that of a proxy whose server died with the request.
    """

    def __init__(
        self, status: int | None, detail: str, retry_after: float | None = None, *, lost: bool = False
    ) -> None:
        super().__init__(f"{detail}" if status is None else f"{status}: {detail}")
        self.status, self.detail, self.retry_after, self.lost = status, detail, retry_after, lost


@dataclass(frozen=True)
class Explained:
    """Maps of one image and K classes, from all its samples or from those that have come so far.

    Attributes:
        maps: (K, H, W) float32 in [0, 1].
        targets: K class indices.
        class_names: K names.
        probabilities: K probabilities.
        errors: K estimates of the relative L2 distance of a map to its limit; infinity where unknown.
        error_bounds: K bounds, each of which holds with 90 % certainty; infinity where unknown.
        samples: perturbed samples that the maps are made of.
        n_samples: perturbed samples that were asked for.
        final: whether this is the answer, and not an update before it.
        cut_short: the reason for fewer samples, "tolerance", "deadline" or "shutdown"; None where all were made.
        model: the served name.
        seed: of the samples.
        queue_ms: milliseconds in the queue.
        total_ms: milliseconds in all.
        top: (class, name, probability) of the most probable classes, in an answer.
    """

    maps: np.ndarray
    targets: list[int]
    class_names: list[str]
    probabilities: list[float]
    errors: list[float]
    error_bounds: list[float]
    samples: int
    n_samples: int
    final: bool
    cut_short: str | None = None
    model: str | None = None
    seed: int | None = None
    queue_ms: float | None = None
    total_ms: float | None = None
    top: list[tuple[int, str, float]] = field(default_factory=list)

    @property
    def error_bound(self) -> float:
        """The largest of the bounds."""
        return max(self.error_bounds)


def picture_bytes(picture: Picture) -> bytes:
    """Return an image as the bytes of a file.

    Args:
        picture: a path, the bytes of a file, a PIL image, or pixels uint8 (H, W, 3) or (H, W).

    Raises:
        InputError: the file cannot be read, or the pixels are not of that form.
    """
    if isinstance(picture, bytes):
        return picture
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim not in (2, 3):
            raise InputError(f"pixels are {picture.dtype} {picture.shape}; expected uint8 (H, W, 3)")
        picture = Image.fromarray(picture)
    if isinstance(picture, Image.Image):
        file = io.BytesIO()
        picture.save(file, format="PNG")
        return file.getvalue()
    try:
        return Path(picture).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {os.fspath(picture)}: {reason_of(error)}.") from error


_MODELS = {"method": "GET", "url": "/v1/models"}


def _request(path: str, picture: Picture, target: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return an explanation's request as keywords of httpx, without options that are None."""
    several = isinstance(target, Sequence) and not isinstance(target, str)
    targets = [] if target is None else [str(one) for one in target] if several else [str(target)]
    given = {name: value for name, value in options.items() if value is not None}
    query = {**given, **({"target": targets} if targets else {})}
    return {"method": "POST", "url": path, "params": query, "content": picture_bytes(picture)}


def _explained(told: Mapping[str, Any], *, final: bool) -> Explained:
    """Return the answer or update that the server's JSON holds."""
    each = told["maps"]
    return Explained(
        maps=np.stack([_map(one["map"]) for one in each]),
        targets=[one["target"] for one in each],
        class_names=[one["class_name"] for one in each],
        probabilities=[one["probability"] for one in each],
        errors=[_error(one["error"]) for one in each],
        error_bounds=[_error(one["error_bound"]) for one in each],
        final=final,
        top=[(one["target"], one["class_name"], one["probability"]) for one in told.get("top", [])],
        samples=told["samples"],
        n_samples=told["n_samples"],
        **{name: told[name] for name in ("cut_short", "model", "seed", "queue_ms", "total_ms") if name in told},
    )


def _error(value: float | None) -> float:
    return float("inf") if value is None else value


def _map(told: Mapping[str, Any]) -> np.ndarray:
    values = np.frombuffer(base64.b64decode(told["data"]), "<f4" if told["dtype"] == "float32" else np.uint8)
    values = values.reshape(told["shape"]).astype(np.float32)
    return values if told["dtype"] == "float32" else values / np.float32(255)


def _problem(response: httpx.Response) -> ServerError:
    """Return the error for a response with another status than 200."""
    lost = False
    try:
        detail = response.json()["detail"]
    except (ValueError, KeyError, TypeError):
        detail = response.text[:200] or response.reason_phrase
        # The server's own errors are JSON: this one is a proxy's.
        lost = response.status_code == 500
    try:
        wait = float(response.headers.get("retry-after", ""))
    except ValueError:
        wait = None
    return ServerError(response.status_code, str(detail), wait, lost=lost)


class _Retries:
    """The time and the tries that one call has left.

    Args:
        timeout: seconds for the call, all tries included.
        retries: tries after the first.
    """

    def __init__(self, timeout: float, retries: int) -> None:
        self._until = time.monotonic() + timeout
        self._left, self._wait = retries, _FIRST_WAIT

    @property
    def seconds(self) -> float:
        """Seconds that are left; raises ServerError where none are."""
        left = self._until - time.monotonic()
        if left <= 0:
            raise ServerError(None, "no answer within the time given; allow more (timeout=)")
        return left

    def after(self, error: Exception) -> float:
        """Return the seconds to wait before the next try.

        Raises:
            ServerError: the error is final, or neither a try nor the time for it is left.
        """
        told = error if isinstance(error, ServerError) else ServerError(None, f"{type(error).__name__}: {error}")
        final = told.status is not None and told.status not in _AGAIN and not told.lost
        if self._left <= 0 or final:
            raise told from error
        self._left -= 1
        wait = random.uniform(0, self._wait)
        if told.retry_after is not None:
            # Other clients were told the same time: spread them out after it.
            wait = told.retry_after * random.uniform(1.0, 1.5)
        self._wait = min(2 * self._wait, _LONGEST_WAIT)
        if time.monotonic() + wait > self._until:
            raise told from error
        return wait


class _Events:
    """A reader of server-sent events, line by line."""

    def __init__(self) -> None:
        self._name, self._data = "", ""
        self.ended = False

    def line(self, line: str) -> Iterator[Explained]:
        """Read a line and yield the update that it completes, if any.

        Raises:
            ServerError: the line completes an error.
        """
        if line.startswith("event:"):
            self._name = line[6:].strip()
        elif line.startswith("data:"):
            self._data += line[5:].strip()
        elif not line and self._name:
            name, data, self._name, self._data = self._name, self._data, "", ""
            told = json.loads(data)
            self.ended = name in ("done", "error")
            if name == "error":
                raise ServerError(told["status"], told["detail"])
            if name in ("maps", "done"):
                yield _explained(told, final=name == "done")


@contextmanager
def _events() -> Iterator[_Events]:
    """Read a stream in the block, and raise ServerError where it ends before the answer."""
    events = _Events()
    try:
        yield events
    except httpx.TransportError as error:
        raise ServerError(None, f"the stream broke off ({error}); ask again") from error
    if not events.ended:
        raise ServerError(None, "the stream broke off before the answer; ask again")


@dataclass(frozen=True)
class _Connection:
    """How a server is reached.

    Attributes:
        address: such as http://127.0.0.1:8000.
        api_key: sent with every request, or None.
        timeout: seconds a call, retries included.
        retries: tries after the first.
    """

    address: str
    api_key: str | None
    timeout: float
    retries: int

    @property
    def options(self) -> dict[str, Any]:
        """Keywords of httpx's clients."""
        headers = {} if self.api_key is None else {"authorization": f"Bearer {self.api_key}"}
        return {"base_url": self.address.rstrip("/"), "headers": headers}

    def call(self, timeout: float | None) -> _Retries:
        """Begin a call; a timeout of None is the connection's."""
        return _Retries(self.timeout if timeout is None else timeout, self.retries)


class Client:
    """A blocking client, which threads may share.

    Args:
        address: such as http://127.0.0.1:8000.
        api_key: where the server wants one.
        timeout: seconds a call, retries included.
        retries: tries after the first.
    """

    def __init__(self, address: str, *, api_key: str | None = None, timeout: float = 60.0, retries: int = 4) -> None:
        self._connection = _Connection(address, api_key, timeout, retries)
        self._http = httpx.Client(**self._connection.options)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def explain(
        self,
        picture: Picture,
        target: int | str | Sequence[int | str] | None = None,
        *,
        model: str | None = None,
        top_k: int | None = None,
        n_samples: int | None = None,
        seed: int | None = None,
        tolerance: float | None = None,
        deadline_ms: int | None = None,
        timeout: float | None = None,
    ) -> Explained:
        """Explain an image.

        Args:
            picture: a path, the bytes of a file, a PIL image, or pixels uint8 (H, W, 3).
            target: a class by index or name, or several; None is the most probable class.
            model: a served name; None is the server's first model.
            top_k: in place of target, the number of most probable classes.
            n_samples: perturbed samples at most.
            seed: equal seeds give equal maps.
            tolerance: stop when the relative error of the map is below this, nine times in ten.
            deadline_ms: answer within this time with the samples that there are.
            timeout: seconds for the call, retries included; None is the client's.

        Raises:
            InputError: the picture cannot be read.
            ServerError: the server refused, failed or cannot be reached.
        """
        options: dict[str, Any] = dict(model=model, top_k=top_k, n_samples=n_samples, seed=seed)
        options |= dict(tolerance=tolerance, deadline_ms=deadline_ms)
        response = self._send(_request("/v1/explain", picture, target, options), timeout)
        return _explained(response.json(), final=True)

    def stream(
        self, picture: Picture, target: Any = None, *, timeout: float | None = None, **options: Any
    ) -> Iterator[Explained]:
        """Explain an image and yield updates as samples come, the last of them final.

        Leaving the loop ends the request. Arguments and errors are those of `explain`.
        """
        response = self._send(_request("/v1/explain/stream", picture, target, options), timeout, stream=True)
        try:
            with _events() as events:
                for line in response.iter_lines():
                    yield from events.line(line)
        finally:
            response.close()

    def models(self) -> list[dict[str, Any]]:
        """Return what the server serves: name, size, classes, precision … of each model."""
        told: list[dict[str, Any]] = self._send(_MODELS).json()
        return told

    def ready(self) -> bool:
        """Return whether the server takes requests now; False also where there is no answer."""
        try:
            return self._http.get("/readyz", timeout=self._connection.timeout).status_code == 200
        except httpx.TransportError:
            return False

    def _send(self, wanted: Mapping[str, Any], timeout: float | None = None, *, stream: bool = False) -> httpx.Response:
        """Send a request until it is answered with 200; with `stream` the content of the answer is yet to be read."""
        call = self._connection.call(timeout)
        while True:
            try:
                request = self._http.build_request(**wanted, timeout=call.seconds)
                response = self._http.send(request, stream=stream)
                if response.status_code == 200:
                    return response
                response.read()
                raise _problem(response)
            except (httpx.TransportError, ServerError) as error:
                time.sleep(call.after(error))


class AsyncClient:
    """`Client` for asyncio; every method is awaited.

    Args:
        address: as for `Client`.
        api_key: as for `Client`.
        timeout: as for `Client`.
        retries: as for `Client`.
        connections: open at a time, at most.
    """

    def __init__(
        self,
        address: str,
        *,
        api_key: str | None = None,
        timeout: float = 60.0,
        retries: int = 4,
        connections: int = 100,
    ) -> None:
        self._connection = _Connection(address, api_key, timeout, retries)
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        self._http = httpx.AsyncClient(**self._connection.options, limits=limits)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def explain(
        self, picture: Picture, target: Any = None, *, timeout: float | None = None, **options: Any
    ) -> Explained:
        """Explain an image; see `Client.explain`."""
        response = await self._send(_request("/v1/explain", picture, target, options), timeout)
        return _explained(response.json(), final=True)

    async def stream(
        self, picture: Picture, target: Any = None, *, timeout: float | None = None, **options: Any
    ) -> AsyncIterator[Explained]:
        """Explain an image and yield updates; see `Client.stream`."""
        response = await self._send(_request("/v1/explain/stream", picture, target, options), timeout, stream=True)
        try:
            with _events() as events:
                async for line in response.aiter_lines():
                    for update in events.line(line):
                        yield update
        finally:
            await response.aclose()

    async def models(self) -> list[dict[str, Any]]:
        """Return what the server serves; see `Client.models`."""
        told: list[dict[str, Any]] = (await self._send(_MODELS)).json()
        return told

    async def ready(self) -> bool:
        """Return whether the server takes requests now; see `Client.ready`."""
        try:
            return (await self._http.get("/readyz", timeout=self._connection.timeout)).status_code == 200
        except httpx.TransportError:
            return False

    async def _send(
        self, wanted: Mapping[str, Any], timeout: float | None = None, *, stream: bool = False
    ) -> httpx.Response:
        """Send a request until it is answered with 200; see `Client._send`."""
        call = self._connection.call(timeout)
        while True:
            try:
                request = self._http.build_request(**wanted, timeout=call.seconds)
                response = await self._http.send(request, stream=stream)
                if response.status_code == 200:
                    return response
                await response.aread()
                raise _problem(response)
            except (httpx.TransportError, ServerError) as error:
                await asyncio.sleep(call.after(error))
