"""`/docs`: the OpenAPI document as one HTML page, without scripts and without resources of other servers."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em }
summary { cursor: pointer } code { font-size: 14px }
td { padding: 2px 12px 2px 0; text-align: left; vertical-align: top }
@media (prefers-color-scheme: dark) { body { background: #111; color: #ddd } }
"""


def docs_page(document: Mapping[str, Any]) -> str:
    """The HTML page of an OpenAPI document made by `openapi.py`."""
    info, components = document["info"], document["components"]["schemas"]
    title = escape(f"{info['title']} {info['version']}")
    operations = "".join(
        _operation(method, path, operation, components)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head><body><h1>{title}</h1><p>{escape(info['description'])} "
        f'The same for programs: <a href="openapi.json">openapi.json</a>.</p>{operations}</body></html>\n'
    )


def _operation(method: str, path: str, operation: Mapping[str, Any], components: Mapping[str, Any]) -> str:
    head = f"<code>{method.upper()} {escape(path)}</code> {escape(operation['summary'])}"
    rows = [(parameter["name"], f"in the {parameter['in']}", "") for parameter in operation["parameters"]]
    if "requestBody" in operation:  # if several body types are allowed, the fields of the first one
        schema = operation["requestBody"]["content"]["application/json"]["schema"]
        name = schema["anyOf"][0]["$ref"] if "anyOf" in schema else schema["$ref"]
        fields = components[name.rsplit("/", 1)[1]]["properties"]
        rows += [(field, _kind(described), described.get("description", "")) for field, described in fields.items()]
    if not rows:
        return f"<p>{head}</p>"
    cells = "".join(
        f"<tr><td><code>{escape(name)}</code></td><td>{escape(kind)}</td><td>{escape(text)}</td></tr>"
        for name, kind, text in rows
    )
    return f"<details><summary>{head}</summary><table>{cells}</table></details>"


def _kind(schema: Mapping[str, Any]) -> str:
    if "anyOf" in schema:
        kinds = dict.fromkeys(map(_kind, schema["anyOf"]))
        return " or ".join(kind for kind in kinds if kind != "null")
    if "enum" in schema:
        return " or ".join(repr(value) for value in schema["enum"] if value is not None) or "null"
    kind = schema.get("type", "object" if "$ref" in schema else "any")
    words = (("minimum", "from"), ("exclusiveMinimum", "above"), ("maximum", "to"))
    bounds = [f"{word} {schema[key]:g}" for key, word in words if key in schema]
    return " ".join([kind, *bounds])
