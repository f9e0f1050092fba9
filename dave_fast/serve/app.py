"""The ASGI app: routes, their documentation, keys, and how errors are answered. `server` runs it."""

from __future__ import annotations

import hmac
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, StreamingResponse

from dave_fast._version import __version__
from dave_fast.errors import InputError, NonFiniteError, RefusedError
from dave_fast.serve import formats, kserve
from dave_fast.serve.api import Api, in_words, status_of
from dave_fast.serve.limits import Limits
from dave_fast.serve.middleware import LimitsMiddleware
from dave_fast.serve.page import add_page
from dave_fast.serve.schemas import Answer, Health, ModelInfo, StoredImage, problems
from dave_fast.serve.service import DeadlineError, Service
from dave_fast.serve.uploads import FORM, ImageStore


def create_app(
    service: Service,
    limits: Limits | None = None,
    *,
    api_keys: Sequence[str] = (),
    cors_origins: Sequence[str] = (),
    store: ImageStore | None = None,
) -> FastAPI:
    """The ASGI app. It starts the service with its lifespan, and stops it.

    api_keys: where there are some, routes below /v1 and /v2 want one (Authorization: Bearer, or X-API-Key).
    cors_origins: whose pages may call; none by default. store: of images, where several servers share one.
    """
    limits = limits or Limits()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await run_in_threadpool(service.start)
        yield
        await run_in_threadpool(service.stop)

    app = FastAPI(title="dave-fast", version=__version__, lifespan=lifespan, description=__doc__.split("\n")[0])
    app.state.service = service
    api = Api(service, limits, store)
    app.include_router(_explanations(api, api_keys))
    app.include_router(_about(api))
    app.include_router(kserve.router(api, _key_checked(api_keys)))
    for error in (RefusedError, InputError, NonFiniteError, DeadlineError, Exception):
        app.add_exception_handler(error, _answer_error)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_middleware(LimitsMiddleware, metrics=service.metrics, limits=limits, held=api.held)
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
    router = APIRouter(prefix="/v1", tags=["explanations"], dependencies=_key_checked(api_keys))
    asked = (400, 401, 404, 408, 413, 415, 422, 429, 500, 503)
    formats_of = {kind: {"schema": {"type": "string", "format": "binary"}} for kind in formats.TYPES[1:]}
    router.add_api_route(
        "/explain",
        api.explain,
        methods=["POST"],
        response_model=Answer,
        openapi_extra=_body(False),
        responses={200: {"content": formats_of}, **problems(*asked, 406, 504)},
    )
    events: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": _EVENT}}}}
    router.add_api_route(
        "/explain/stream",
        api.stream,
        methods=["POST"],
        response_class=StreamingResponse,
        openapi_extra=_body(False),
        responses={**events, **problems(*asked)},
        operation_id="stream_of_body",
    )
    router.add_api_route(
        "/explain/stream",
        api.stream,
        methods=["GET"],
        response_class=StreamingResponse,
        responses={**events, **problems(400, 401, 404, 413, 422, 429, 500, 503)},
        operation_id="stream_of_stored",
    )
    router.add_api_route(
        "/images",
        api.keep,
        methods=["POST"],
        response_model=StoredImage,
        openapi_extra=_body(True),
        responses=problems(400, 401, 408, 413, 415, 422, 503),
    )
    picture: dict[int | str, dict[str, Any]] = {200: {"content": {formats.PNG: formats_of[formats.PNG]}}}
    router.add_api_route(
        "/images/{image}/crop",
        api.crop,
        methods=["GET"],
        response_class=Response,
        responses={**picture, **problems(400, 401, 404, 422)},
    )
    router.add_api_route(
        "/models", api.models, methods=["GET"], response_model=list[ModelInfo], responses=problems(401)
    )
    return router


def _about(api: Api) -> APIRouter:
    router = APIRouter(tags=["about"])
    router.add_api_route("/healthz", api.alive, methods=["GET"], response_model=Health)
    router.add_api_route(
        "/readyz",
        api.ready,
        methods=["GET"],
        response_model=Health,
        responses={503: {"model": Health, "description": "Not ready, and why."}},
    )
    text = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
    router.add_api_route(
        "/metrics",
        api.metrics,
        methods=["GET"],
        response_class=Response,
        responses=text,  # type: ignore[arg-type]
    )
    add_page(router)
    return router


# one server-sent event, for the OpenAPI document; its data are Prediction, Maps, Answer or Problem as JSON
_EVENT = {
    "type": "object",
    "properties": {"event": {"enum": ["prediction", "maps", "done", "error"]}, "data": {"type": "string"}},
    "required": ["event", "data"],
}


def _key_checked(api_keys: Sequence[str]) -> list[Any]:
    """A dependency that wants one of the keys; none where there are no keys."""
    if not api_keys:
        return []
    known = [key.encode() for key in api_keys]

    async def check(request: Request) -> None:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        given = (token if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")).strip().encode()
        # all are compared, so that time tells nothing
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
    return JSONResponse({"detail": in_words(error.errors())}, 422)


def _body(required: bool) -> dict[str, Any]:
    """An image in a request, for the OpenAPI document."""
    binary = {"schema": {"type": "string", "format": "binary"}}
    form = {"schema": {"type": "object", "properties": {"image": binary["schema"]}, "required": ["image"]}}
    content = {"image/png": binary, "image/jpeg": binary, "application/octet-stream": binary, FORM: form}
    return {"requestBody": {"required": required, "content": content}}
