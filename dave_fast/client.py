"""A client of `dave-fast serve`, blocking and asynchronous: retries, deadlines, streams.

    with Client("http://127.0.0.1:8000") as client:
        explanation = client.explain("photo.jpg", target="tabby", tolerance=0.2, deadline_ms=500)
        for update in client.stream("photo.jpg"):
            print(update.samples, update.error_bound)

An explanation is a function of its request, so asking again is always safe: a busy server (429, 503), a connection that
cannot be made or breaks before there is an answer are tried again, after what Retry-After says or a time that doubles,
with jitter, and never beyond `timeout`.
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
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import httpx
import numpy as np
from PIL import Image

from dave_fast.errors import DaveFastError, InputError, reason_of

__all__ = ["AsyncClient", "Client", "Explained", "ServerError"]

Picture = bytes | str | os.PathLike[str] | Image.Image | np.ndarray
_AGAIN = (429, 502, 503)
# seconds: the first wait without Retry-After, and the longest
_FIRST_WAIT, _LONGEST_WAIT = 0.1, 10.0


class ServerError(DaveFastError, RuntimeError):
    """The server refused or failed. status: of HTTP, None where there was no answer; detail: its words.

    lost: the answer is that of a proxy whose server died with the request.
    """

    def __init__(
        self, status: int | None, detail: str, retry_after: float | None = None, *, lost: bool = False
    ) -> None:
        super().__init__(f"{detail}" if status is None else f"{status}: {detail}")
        self.status, self.detail, self.retry_after, self.lost = status, detail, retry_after, lost


@dataclass(frozen=True)
class Explained:
    """Maps of one image, K classes; of all its samples, or of those that have come so far.

    maps: (K, H, W) float32 in [0, 1] · targets, class_names, probabilities: K each · errors, error_bounds: K each,
    relative L2 distance to the limit, estimated and with 90 % certainty; infinity where unknown · final: whether this
    is the answer · cut_short: None, "tolerance", "deadline" or "shutdown" · top: (class, name, probability) of the most
    probable classes, for the answer.
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


# ---- what both clients share ----


def picture_bytes(picture: Picture) -> bytes:
    """An image file's bytes: of a path, bytes, a PIL image, or pixels uint8 (H, W, 3)."""
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


def _query(target: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as they go into the address."""
    several = isinstance(target, Sequence) and not isinstance(target, str)
    targets = [] if target is None else [str(one) for one in target] if several else [str(target)]
    given = {name: value for name, value in options.items() if value is not None}
    return {**given, **({"target": targets} if targets else {})}


def _explained(told: Mapping[str, Any], *, final: bool) -> Explained:
    """From JSON."""
    each = told["maps"]
    return Explained(
        maps=np.stack([_map(one["map"]) for one in each]),
        targets=[one["target"] for one in each],
        class_names=[one["class_name"] for one in each],
        probabilities=[one["probability"] for one in each],
        errors=[_bound(one["error"]) for one in each],
        error_bounds=[_bound(one["error_bound"]) for one in each],
        final=final,
        top=[(one["target"], one["class_name"], one["probability"]) for one in told.get("top", [])],
        samples=told["samples"],
        n_samples=told["n_samples"],
        **{name: told[name] for name in ("cut_short", "model", "seed", "queue_ms", "total_ms") if name in told},
    )


def _bound(value: float | None) -> float:
    return float("inf") if value is None else value


def _map(told: Mapping[str, Any]) -> np.ndarray:
    values = np.frombuffer(base64.b64decode(told["data"]), "<f4" if told["dtype"] == "float32" else np.uint8)
    values = values.reshape(told["shape"]).astype(np.float32)
    return values if told["dtype"] == "float32" else values / np.float32(255)


def _problem(response: httpx.Response) -> ServerError:
    """What a status other than 200 says."""
    lost = False
    try:
        detail = response.json()["detail"]
    except (ValueError, KeyError, TypeError):
        detail = response.text[:200] or response.reason_phrase
        # a server's own errors are JSON
        lost = response.status_code == 500
    try:
        wait = float(response.headers.get("retry-after", ""))
    except ValueError:
        wait = None
    return ServerError(response.status_code, str(detail), wait, lost=lost)


class _Patience:
    """How long one call may take, and how long to wait before it is tried again."""

    def __init__(self, timeout: float, retries: int) -> None:
        self.until = time.monotonic() + timeout
        self.left, self._wait = retries, _FIRST_WAIT

    @property
    def seconds(self) -> float:
        """What is left; ServerError where nothing is."""
        left = self.until - time.monotonic()
        if left <= 0:
            raise ServerError(None, "no answer within the time given; allow more (timeout=)")
        return left

    def after(self, error: Exception) -> float:
        """Seconds to wait before the next try; raises what is final."""
        told = error if isinstance(error, ServerError) else ServerError(None, f"{type(error).__name__}: {error}")
        final = told.status is not None and told.status not in _AGAIN and not told.lost
        if self.left <= 0 or final:
            raise told from error
        self.left -= 1
        wait = random.uniform(0, self._wait)
        if told.retry_after is not None:
            # all were told the same time: spread them out behind it
            wait = told.retry_after * random.uniform(1.0, 1.5)
        self._wait = min(2 * self._wait, _LONGEST_WAIT)
        if time.monotonic() + wait > self.until:
            raise told from error
        return wait


class _Events:
    """Lines of server-sent events, to updates."""

    def __init__(self) -> None:
        self._name, self._data = "", ""
        self.ended = False

    def line(self, line: str) -> Explained | None:
        """An update where this line completes one; ServerError for an error event."""
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
                return _explained(told, final=name == "done")
        return None

    def check(self) -> None:
        """At the end of the stream: ServerError unless there was an answer."""
        if not self.ended:
            raise ServerError(None, "the stream broke off before the answer; ask again")


@dataclass
class _Settings:
    """address: such as http://127.0.0.1:8000. timeout: seconds a call, retries included."""

    address: str
    api_key: str | None = None
    timeout: float = 60.0
    retries: int = 4

    def __post_init__(self) -> None:
        self.address = self.address.rstrip("/")

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.api_key is None else {"authorization": f"Bearer {self.api_key}"}


# ---- blocking ----


class Client:
    """The blocking client; threads may share it."""

    def __init__(self, address: str, *, api_key: str | None = None, timeout: float = 60.0, retries: int = 4) -> None:
        self._settings = _Settings(address, api_key, timeout, retries)
        self._http = httpx.Client(base_url=self._settings.address, headers=self._settings.headers)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the connections back."""
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
        """Explain an image: a path, the bytes of a file, a PIL image, or pixels uint8 (H, W, 3).

        target: a class by index or name, or several. The rest is as the server documents it.
        Raises InputError for a picture that cannot be read, ServerError for everything else.
        """
        options: dict[str, Any] = dict(model=model, top_k=top_k, n_samples=n_samples, seed=seed)
        options |= dict(tolerance=tolerance, deadline_ms=deadline_ms)
        told = self._call("POST", "/v1/explain", _query(target, options), picture_bytes(picture), timeout)
        return _explained(told, final=True)

    def stream(
        self, picture: Picture, target: Any = None, *, timeout: float | None = None, **options: Any
    ) -> Iterator[Explained]:
        """As `explain`: updates as samples come, the last of them final. Leaving the loop ends the request."""
        content, query = picture_bytes(picture), _query(target, options)
        patience = _Patience(self._settings.timeout if timeout is None else timeout, self._settings.retries)
        while True:
            try:
                response = self._opened("/v1/explain/stream", query, content, patience)
                break
            except (httpx.TransportError, ServerError) as error:
                time.sleep(patience.after(error))
        try:
            events = _Events()
            for line in response.iter_lines():
                update = events.line(line)
                if update is not None:
                    yield update
            events.check()
        except httpx.TransportError as error:
            raise ServerError(None, f"the stream broke off ({error}); ask again") from error
        finally:
            response.close()

    def models(self) -> list[dict[str, Any]]:
        """What the server serves: name, size, classes, precision."""
        told: list[dict[str, Any]] = self._call("GET", "/v1/models", {}, None, None)
        return told

    def ready(self) -> bool:
        """Whether the server takes requests now; False also where none answers."""
        try:
            return self._http.get("/readyz", timeout=self._settings.timeout).status_code == 200
        except httpx.TransportError:
            return False

    def _opened(self, path: str, query: dict[str, Any], content: bytes, patience: _Patience) -> httpx.Response:
        request = self._http.build_request("POST", path, params=query, content=content, timeout=patience.seconds)
        response = self._http.send(request, stream=True)
        if response.status_code != 200:
            response.read()
            raise _problem(response)
        return response

    def _call(self, method: str, path: str, query: dict[str, Any], content: bytes | None, timeout: float | None) -> Any:
        patience = _Patience(self._settings.timeout if timeout is None else timeout, self._settings.retries)
        while True:
            try:
                answer = self._http.request(method, path, params=query, content=content, timeout=patience.seconds)
                if answer.status_code == 200:
                    return answer.json()
                raise _problem(answer)
            except (httpx.TransportError, ServerError) as error:
                time.sleep(patience.after(error))


# ---- asynchronous ----


class AsyncClient:
    """The same for asyncio; every method is awaited."""

    def __init__(
        self,
        address: str,
        *,
        api_key: str | None = None,
        timeout: float = 60.0,
        retries: int = 4,
        connections: int = 100,
    ) -> None:
        self._settings = _Settings(address, api_key, timeout, retries)
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        self._http = httpx.AsyncClient(base_url=self._settings.address, headers=self._settings.headers, limits=limits)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Give the connections back."""
        await self._http.aclose()

    async def explain(
        self, picture: Picture, target: Any = None, *, timeout: float | None = None, **options: Any
    ) -> Explained:
        """As `Client.explain`."""
        told = await self._call("POST", "/v1/explain", _query(target, options), picture_bytes(picture), timeout)
        return _explained(told, final=True)

    async def stream(
        self, picture: Picture, target: Any = None, *, timeout: float | None = None, **options: Any
    ) -> AsyncIterator[Explained]:
        """As `Client.stream`."""
        content, query = picture_bytes(picture), _query(target, options)
        patience = _Patience(self._settings.timeout if timeout is None else timeout, self._settings.retries)
        while True:
            try:
                response = await self._opened("/v1/explain/stream", query, content, patience)
                break
            except (httpx.TransportError, ServerError) as error:
                await asyncio.sleep(patience.after(error))
        try:
            events = _Events()
            async for line in response.aiter_lines():
                update = events.line(line)
                if update is not None:
                    yield update
            events.check()
        except httpx.TransportError as error:
            raise ServerError(None, f"the stream broke off ({error}); ask again") from error
        finally:
            await response.aclose()

    async def models(self) -> list[dict[str, Any]]:
        """As `Client.models`."""
        told: list[dict[str, Any]] = await self._call("GET", "/v1/models", {}, None, None)
        return told

    async def ready(self) -> bool:
        """As `Client.ready`."""
        try:
            return (await self._http.get("/readyz", timeout=self._settings.timeout)).status_code == 200
        except httpx.TransportError:
            return False

    async def _opened(self, path: str, query: dict[str, Any], content: bytes, patience: _Patience) -> httpx.Response:
        request = self._http.build_request("POST", path, params=query, content=content, timeout=patience.seconds)
        response = await self._http.send(request, stream=True)
        if response.status_code != 200:
            await response.aread()
            raise _problem(response)
        return response

    async def _call(
        self,
        method: Literal["GET", "POST"],
        path: str,
        query: dict[str, Any],
        content: bytes | None,
        timeout: float | None,
    ) -> Any:
        patience = _Patience(self._settings.timeout if timeout is None else timeout, self._settings.retries)
        while True:
            try:
                answer = await self._http.request(method, path, params=query, content=content, timeout=patience.seconds)
                if answer.status_code == 200:
                    return answer.json()
                raise _problem(answer)
            except (httpx.TransportError, ServerError) as error:
                await asyncio.sleep(patience.after(error))
