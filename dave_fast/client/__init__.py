"""A client of `dave-fast serve`, blocking and asynchronous; `protocol` has requests and answers.

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
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any, Self

from dave_fast.client.protocol import (
    Events,
    Explained,
    Picture,
    ServerError,
    Tries,
    explain_request,
    explained,
    picture_bytes,
    problem,
)
from dave_fast.errors import needs

with needs("serve", "dave_fast.client"):
    import httpx

__all__ = ["AsyncClient", "Client", "Explained", "ServerError", "picture_bytes"]

_MODELS = {"method": "GET", "url": "/v1/models"}


def _http_options(address: str, api_key: str | None) -> dict[str, Any]:
    headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
    return {"base_url": address.rstrip("/"), "headers": headers}


class Client:
    """A blocking client, which threads may share.

    Args:
        address: such as http://127.0.0.1:8000.
        api_key: where the server wants one.
        timeout: seconds a call, retries included.
        retries: tries after the first.
    """

    def __init__(self, address: str, *, api_key: str | None = None, timeout: float = 60.0, retries: int = 4) -> None:
        self._timeout, self._retries = timeout, retries
        self._http = httpx.Client(**_http_options(address, api_key))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
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
        shrink: bool | None = None,
        depth: str | int | float | Sequence[str | int | float] | None = None,
        tolerance: float | None = None,
        deadline_ms: int | None = None,
        signed: bool | None = None,
        timeout: float | None = None,
    ) -> Explained:
        """Explain an image.

        Args:
            picture: a path, the bytes of a file, a PIL image, or pixels uint8 (H, W, 3).
            target: a class by index or name, or another question that the model can answer ("tiger-lion",
                "text:a cat", "patch:3,5"), or several; None is the most probable class.
            model: a served name; None is the server's first model.
            top_k: in place of target, the number of most probable classes.
            n_samples: perturbed samples at most.
            seed: equal seeds give equal maps.
            shrink: whether maps are shrunk by the noise left in them; None is the server's setting.
            depth: where evidence is told: "pixels" (None), a block such as 6, a range "5-9", a share 0.5, "auto", or
                several of them, which share their walks.
            tolerance: stop when the relative error of the map is below this, nine times in ten.
            deadline_ms: answer within this time with the samples that there are.
            signed: whether the answer has signed maps, too.
            timeout: seconds for the call, retries included; None is the client's.

        Raises:
            InputError: the picture cannot be read.
            ServerError: the server refused, failed or cannot be reached.
        """
        options: dict[str, Any] = dict(model=model, top_k=top_k, n_samples=n_samples, seed=seed)
        options |= dict(shrink=shrink, depth=depth, tolerance=tolerance, deadline_ms=deadline_ms, signed=signed)
        response = self._send(explain_request("/v1/explain", picture, target, options), timeout)
        return explained(response.json())

    def stream(
        self, picture: Picture, target: Any = None, *, timeout: float | None = None, **options: Any
    ) -> Iterator[Explained]:
        """Explain an image and yield updates as samples come, the last of them final.

        Leaving the loop ends the request. Arguments and errors are those of `explain`.
        """
        response = self._send(explain_request("/v1/explain/stream", picture, target, options), timeout, stream=True)
        try:
            with Events() as events:
                for line in response.iter_lines():
                    yield from events.updates(line)
        finally:
            response.close()

    def models(self) -> list[dict[str, Any]]:
        """Return what the server serves: name, size, classes, precision … of each model."""
        return self._send(_MODELS).json()

    def ready(self) -> bool:
        """Return whether the server takes requests now; False also where there is no answer."""
        try:
            return self._http.get("/readyz", timeout=self._timeout).status_code == 200
        except httpx.TransportError:
            return False

    def _send(self, wanted: Mapping[str, Any], timeout: float | None = None, *, stream: bool = False) -> httpx.Response:
        """Send a request until it is answered with 200; with `stream` the content of the answer is yet to be read."""
        tries = Tries(self._timeout if timeout is None else timeout, self._retries)
        while True:
            try:
                request = self._http.build_request(**wanted, timeout=tries.seconds)
                response = self._http.send(request, stream=stream)
                if response.status_code == 200:
                    return response
                response.read()
                raise problem(response)
            except (httpx.TransportError, ServerError) as error:
                time.sleep(tries.wait_after(error))


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
        self._timeout, self._retries = timeout, retries
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        self._http = httpx.AsyncClient(**_http_options(address, api_key), limits=limits)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *details: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def explain(
        self, picture: Picture, target: Any = None, *, timeout: float | None = None, **options: Any
    ) -> Explained:
        """Explain an image; see `Client.explain`."""
        response = await self._send(explain_request("/v1/explain", picture, target, options), timeout)
        return explained(response.json())

    async def stream(
        self, picture: Picture, target: Any = None, *, timeout: float | None = None, **options: Any
    ) -> AsyncIterator[Explained]:
        """Explain an image and yield updates; see `Client.stream`."""
        response = await self._send(
            explain_request("/v1/explain/stream", picture, target, options), timeout, stream=True
        )
        try:
            with Events() as events:
                async for line in response.aiter_lines():
                    for update in events.updates(line):
                        yield update
        finally:
            await response.aclose()

    async def models(self) -> list[dict[str, Any]]:
        """Return what the server serves; see `Client.models`."""
        return (await self._send(_MODELS)).json()

    async def ready(self) -> bool:
        """Return whether the server takes requests now; see `Client.ready`."""
        try:
            return (await self._http.get("/readyz", timeout=self._timeout)).status_code == 200
        except httpx.TransportError:
            return False

    async def _send(
        self, wanted: Mapping[str, Any], timeout: float | None = None, *, stream: bool = False
    ) -> httpx.Response:
        """Send a request until it is answered with 200; see `Client._send`."""
        tries = Tries(self._timeout if timeout is None else timeout, self._retries)
        while True:
            try:
                request = self._http.build_request(**wanted, timeout=tries.seconds)
                response = await self._http.send(request, stream=stream)
                if response.status_code == 200:
                    return response
                await response.aread()
                raise problem(response)
            except (httpx.TransportError, ServerError) as error:
                await asyncio.sleep(tries.wait_after(error))
