"""The ASGI app: routes, their documentation, API keys, and the answers to errors. `server` runs it."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, StreamingResponse

from dave_fast._version import __version__
from dave_fast.errors import InputError, NonFiniteError, RefusedError
from dave_fast.serve import formats, kserve
from dave_fast.serve.api import Api, status_of
from dave_fast.serve.heap import give_back_regularly, keep_freed
from dave_fast.serve.jobs import DeadlineError
from dave_fast.serve.limits import Limits
from dave_fast.serve.middleware import LimitsMiddleware
from dave_fast.serve.page import add_page
from dave_fast.serve.schemas import Answer, Health, ModelInfo, StoredImage, describe_errors, problems
from dave_fast.serve.service import Service
from dave_fast.serve.uploads import FORM, ImageStore


def create_app(
    service: Service,
    limits: Limits | None = None,
    *,
    api_keys: Sequence[str] = (),
    cors_origins: Sequence[str] = (),
    store: ImageStore | None = None,
) -> FastAPI:
    """Return the ASGI app of a service, which its lifespan starts and stops.

    Args:
        service: the service.
        limits: limits of bodies and requests; None: the defaults.
        api_keys: if any, the routes below /v1 and /v2 require one (Authorization: Bearer, or X-API-Key).
        cors_origins: origins whose pages may call the server.
        store: the images of /v1/images; None: a store of this server's own.
    """
    limits = limits or Limits()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        keep_freed()
        await asyncio.gather(run_in_threadpool(service.start), api.workshop.start())
        giving_back = asyncio.create_task(give_back_regularly())
        yield
        giving_back.cancel()
        api.workshop.stop()
        await run_in_threadpool(service.stop)

    # FastAPI's own pages of the documentation take their scripts from another server.
    own: dict[str, Any] = {"docs_url": None, "redoc_url": None, "description": __doc__.split("\n")[0]}
    app = FastAPI(title="dave-fast", version=__version__, lifespan=lifespan, **own)
    app.state.service = service
    api = Api(service, limits, store)
    app.include_router(_explanations(api, api_keys))
    app.include_router(_about(api))
    app.include_router(kserve.router(api, _key_checked(api_keys)))
    for error in (RefusedError, InputError, NonFiniteError, DeadlineError, MemoryError, ClientDisconnect, Exception):
        app.add_exception_handler(error, _answer_error)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_middleware(LimitsMiddleware, metrics=service.metrics, limits=limits, account=service.account)
    if cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(cors_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["*"],
        )
    return app


def _explanations(api: Api, api_keys: Sequence[str]) -> APIRouter:
    """Return the routes below /v1."""
    common = (400, 401, 404, 413, 422, 429, 500, 503)
    upload = (*common, 408, 415)
    binary = {"schema": {"type": "string", "format": "binary"}}
    files = {200: {"content": dict.fromkeys(formats.TYPES[1:], binary)}}
    events = {200: {"content": {"text/event-stream": {"schema": _EVENT}}}}
    picture = {200: {"content": {formats.PNG: binary}}}
    image: dict[str, Any] = {"openapi_extra": _body(required=False)}
    stream: dict[str, Any] = {"response_class": StreamingResponse}
    stored: dict[str, Any] = {"openapi_extra": _body(required=True), "response_model": StoredImage}
    # Method, path, function, documented content of 200, documented errors, further settings.
    routes: list[tuple[str, str, Any, Any, Sequence[int], dict[str, Any]]] = [
        ("POST", "/explain", api.explain, files, (*upload, 406, 504), image | {"response_model": Answer}),
        ("POST", "/explain/stream", api.stream, events, upload, image | stream | {"operation_id": "stream_of_body"}),
        ("GET", "/explain/stream", api.stream, events, common, stream | {"operation_id": "stream_of_stored"}),
        ("POST", "/images", api.keep, {}, (400, 401, 408, 413, 415, 422, 503), stored),
        ("GET", "/images/{image}/crop", api.crop, picture, (400, 401, 404, 422), {"response_class": Response}),
        ("GET", "/models", api.models, {}, (401,), {"response_model": list[ModelInfo]}),
    ]
    router = APIRouter(prefix="/v1", tags=["explanations"], dependencies=_key_checked(api_keys))
    for method, path, function, content, errors, settings in routes:
        responses = {**content, **problems(*errors)}
        router.add_api_route(path, function, methods=[method], responses=responses, **settings)
    return router


def _about(api: Api) -> APIRouter:
    """Return the routes about the server, and those of the page."""
    not_ready: dict[int | str, Any] = {503: {"model": Health, "description": "Not ready, and why."}}
    text: dict[int | str, Any] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
    router = APIRouter(tags=["about"])
    router.add_api_route("/healthz", api.alive)
    router.add_api_route("/readyz", api.ready, responses=not_ready)
    router.add_api_route("/metrics", api.metrics, responses=text, response_class=Response)
    add_page(router)
    return router


# A server-sent event in the OpenAPI document; its data are Prediction, Maps, Answer or Problem as JSON.
_EVENT = {
    "type": "object",
    "properties": {"event": {"enum": ["prediction", "maps", "done", "error"]}, "data": {"type": "string"}},
    "required": ["event", "data"],
}


def _key_checked(api_keys: Sequence[str]) -> list[Any]:
    """Return the dependency that requires one of the keys, in a list that is empty if there are no keys."""
    if not api_keys:
        return []
    known = [key.encode() for key in api_keys]

    async def check(request: Request) -> None:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        given = (token if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")).strip().encode()
        # All keys are compared, so that the time taken reveals nothing.
        if sum(hmac.compare_digest(given, key) for key in known) == 0:
            raise HTTPException(
                401, "an API key is needed: Authorization: Bearer KEY, or X-API-Key.", {"www-authenticate": "Bearer"}
            )

    return [Depends(check)]


async def _answer_error(request: Request, error: Exception) -> Response:
    status, detail, headers = status_of(error)
    return JSONResponse({"detail": detail}, status, headers)


async def _answer_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return JSONResponse({"detail": describe_errors(error.errors(), skip=1)}, 422)


def _body(required: bool) -> dict[str, Any]:
    """Return the description of an image in a request, for the OpenAPI document."""
    binary = {"schema": {"type": "string", "format": "binary"}}
    form = {"schema": {"type": "object", "properties": {"image": binary["schema"]}, "required": ["image"]}}
    content = {"image/png": binary, "image/jpeg": binary, "application/octet-stream": binary, FORM: form}
    return {"requestBody": {"required": required, "content": content}}
