"""Tests of the page at /docs, which needs no network, no script and no other server."""

import re

import httpx
import pytest

from dave_fast.serve.page.routes import describe


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server[0]) as client:
        yield client


@pytest.fixture(scope="module")
def page(http):
    return http.get("/docs")


def test_every_route_and_schema_is_described(http, page):
    document = http.get("/openapi.json").json()
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert f"<h3>{method.upper()} {path}</h3>" in page.text
            assert all(f"<code>{each['name']}</code>" in page.text for each in operation.get("parameters", []))
    anchors = set(re.findall(r'id="([^"]+)"', page.text))
    assert set(re.findall(r'href="#([^"]+)"', page.text)) <= anchors
    assert {f"schema-{name}" for name in document["components"]["schemas"]} <= anchors


def test_nothing_is_loaded_from_elsewhere(http, page):
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "http" not in policy
    assert "<script" not in page.text and "style=" not in page.text
    # What the page names lies on this server.
    named = set(re.findall(r'(?:href|src)="([^#"][^"]*)"', page.text))
    assert named == {"docs.css", "data:,", "openapi.json", "./"}
    style = http.get("/docs.css")
    assert style.status_code == 200 and style.headers["content-type"].startswith("text/css")
    assert "url(" not in style.text and "@import" not in style.text


@pytest.mark.parametrize("path", ["/redoc", "/docs/oauth2-redirect"])
def test_pages_of_fastapi_are_gone(http, path):
    assert http.get(path).status_code == 404


@pytest.mark.parametrize("where", ["title", "path", "parameter", "description", "default", "enum", "schema"])
def test_markup_in_the_document_is_text_on_the_page(where):
    def bad(place):
        return '<script src="//x">"' if place == where else "fine"

    operation = {
        "operationId": "one",
        "description": bad("description"),
        "parameters": [{"name": bad("parameter"), "in": "query", "schema": {"default": bad("default")}}],
        "responses": {"200": {"content": {"a/b": {"schema": {"enum": [bad("enum")]}}}}},
    }
    schemas = {bad("schema"): {"properties": {"a": {"$ref": f"#/components/schemas/{bad('schema')}"}}}}
    document = {
        "info": {"title": bad("title"), "version": "1"},
        "paths": {f"/{bad('path')}": {"get": operation}},
        "components": {"schemas": schemas},
    }
    assert "<script" not in describe(document) and "&lt;script" in describe(document)
