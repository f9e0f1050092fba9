"""The page at /docs: the OpenAPI document as plain HTML, without scripts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

_HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Routes of dave-fast</title>
<link rel="stylesheet" href="docs.css">
<link rel="icon" href="data:,">
</head>
"""


def describe(document: Mapping[str, Any]) -> str:
    """Return the page of an OpenAPI document."""
    info = document["info"]
    routes = [
        _route(method, path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    schemas = [_schema(name, schema) for name, schema in document.get("components", {}).get("schemas", {}).items()]
    return (
        f"{_HEAD}<body><main><h1>{escape(info['title'])} {escape(info['version'])}</h1>"
        '<p>For programs: <a href="openapi.json">openapi.json</a>. To try it: <a href="./">the page</a>.</p>'
        f"<h2>Routes</h2>{''.join(routes)}<h2>What they take and return</h2>{''.join(schemas)}</main></body></html>\n"
    )


def _route(method: str, path: str, operation: Mapping[str, Any]) -> str:
    parameters = [
        (
            f"<code>{escape(each['name'])}</code>",
            f"{escape(each['in'])}, {_needed(each.get('required', False))}{_type(each.get('schema', {}))}",
            escape(each.get("description") or each.get("schema", {}).get("description") or ""),
        )
        for each in operation.get("parameters", [])
    ]
    bodies = _contents(operation.get("requestBody", {}))
    answers = [
        (f"<code>{escape(status)}</code>", escape(answer.get("description", "")), _contents(answer))
        for status, answer in operation["responses"].items()
    ]
    return (
        f'<section id="{escape(operation["operationId"])}"><h3>{escape(method.upper())} {escape(path)}</h3>'
        f"<p>{escape(operation.get('description') or operation.get('summary') or '')}</p>"
        f"{_table('Parameters', parameters)}"
        f"{f'<h4>Body</h4><p>{bodies}</p>' if bodies else ''}{_table('Answers', answers)}</section>"
    )


def _schema(name: str, schema: Mapping[str, Any]) -> str:
    required = schema.get("required", [])
    fields = [
        (f"<code>{escape(field)}</code>", _needed(field in required) + _type(of), escape(of.get("description", "")))
        for field, of in schema.get("properties", {}).items()
    ]
    told = escape(schema.get("description", ""))
    return (
        f'<section id="schema-{escape(name)}"><h3>{escape(name)}</h3><p>{told}</p>{_table("Fields", fields)}</section>'
    )


def _table(title: str, rows: Iterable[tuple[str, ...]]) -> str:
    """Return a table of HTML, or nothing without rows."""
    lines = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<h4>{title}</h4><table>{lines}</table>" if lines else ""


def _contents(of: Mapping[str, Any]) -> str:
    """Return the types of media of a body or an answer, and what each holds."""
    return "; ".join(
        f"<code>{escape(kind)}</code>: {_type(content.get('schema', {}))}"
        for kind, content in of.get("content", {}).items()
    )


def _needed(required: bool) -> str:
    return "required, " if required else ""


def _type(schema: Mapping[str, Any]) -> str:
    """Return a JSON schema in words, with links to the named ones."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rsplit("/", 1)[-1])
        return f'<a href="#schema-{name}">{name}</a>'
    for key in ("anyOf", "oneOf", "allOf"):
        if key in schema:
            return " or ".join(map(_type, schema[key])) + _default(schema)
    if "enum" in schema:
        return " | ".join(escape(str(each)) for each in schema["enum"]) + _default(schema)
    kind = escape(str(schema.get("const", schema.get("type", "anything"))))
    if "items" in schema:
        kind += f" of {_type(schema['items'])}"
    limits = {"minimum": "≥ ", "exclusiveMinimum": "> ", "maximum": "≤ ", "exclusiveMaximum": "< "}
    return kind + "".join(f", {word}{schema[key]}" for key, word in limits.items() if key in schema) + _default(schema)


def _default(schema: Mapping[str, Any]) -> str:
    default = schema.get("default")
    return "" if default is None else f", default {escape(str(default))}"
