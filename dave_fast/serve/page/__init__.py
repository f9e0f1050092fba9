"""The pages at / and at /docs: HTML, style and scripts. Their policy forbids requests to other origins."""

from __future__ import annotations

from functools import partial
from importlib.resources import files

from fastapi import APIRouter, Request, Response

from dave_fast.models.demo import demo_scene
from dave_fast.serve import formats
from dave_fast.serve.page.routes import describe

_SCRIPTS = ("page.js", "explain.js", "questions.js", "maps.js", "pictures.js", "server.js", "shared.js")
_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    **{f"/{name}": (name, "text/css; charset=utf-8") for name in ("page.css", "docs.css")},
    **{f"/{name}": (name, "text/javascript; charset=utf-8") for name in _SCRIPTS},
}
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "form-action 'none'; base-uri 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def add_page(router: APIRouter) -> None:
    """Add the routes of the page, of its example image, and of the documentation."""
    for path, (name, kind) in _FILES.items():
        router.add_api_route(path, partial(_asset, name, kind), methods=["GET"], include_in_schema=False)
    router.add_api_route("/example.png", _example, methods=["GET"], include_in_schema=False)
    router.add_api_route("/docs", _docs, methods=["GET"], include_in_schema=False)


async def _asset(name: str, kind: str) -> Response:
    return Response(files(__name__).joinpath(name).read_bytes(), media_type=kind, headers=_HEADERS)


def _example() -> Response:
    """Return the embedded scene as PNG; FastAPI calls this in a thread, since it is not asynchronous."""
    return Response(formats.png(demo_scene().image), media_type=formats.PNG)


def _docs(request: Request) -> Response:
    """Return the documentation of the routes."""
    return Response(describe(request.app.openapi()), media_type="text/html; charset=utf-8", headers=_HEADERS)
