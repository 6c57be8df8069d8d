"""Prints docs/configuration.md: `python docs/configuration.py > docs/configuration.md`.

Types, ranges and defaults come from the structs in `brlite/config/options.py`, the texts from the comments in
`brlite.toml`. tests/test_docs.py compares the page with this output.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec

from brlite.config.options import Config

HEAD = """\
# Configuration

Every option of brlite, with its range and its default. Put the options that you change into a TOML file and name it:
`brlite serve my.toml`. `brlite check my.toml` validates a file without starting anything. An unknown option, or a value
out of its range, is an error of one line that names the option and what is allowed.

[`brlite.toml`](../brlite.toml) is the same list as a file. A running server reads its file again on SIGHUP, or when
the file has changed. It applies `[[upstream]]`, `[proxy]`, `[[key]]` and `[keys]`. The other options need a restart.
JSON files of br-vllm-serving are read too ([coming from br-vllm-serving](manual.md)).

This page is printed by `docs/configuration.py`; do not edit it.
"""
TITLES = {
    "server": "where and how the server listens",
    "engine": "how tokens are computed",
    "model": "a model to serve; one table a model",
    "upstream": "a server to forward to; one table an upstream",
    "limits": "bounds on what a client can request",
    "keys": "API keys that may use everything",
    "key": "an API key with rules of its own; one table a key",
    "proxy": "how requests are forwarded",
}
IS_LIST = ("model", "upstream", "key")
NAMES = {"integer": "integer", "number": "number", "string": "string", "boolean": "true or false", "object": "table"}


def main() -> None:
    print(render(), end="")


def render() -> str:
    """The whole page as Markdown."""
    _, definitions = msgspec.json.schema_components([Config])
    texts = read_texts((Path(__file__).parent.parent / "brlite.toml").read_text(encoding="utf-8"))
    sections = [HEAD]
    for section, schema in definitions["Config"]["properties"].items():
        heading = f"[[{section}]]" if section in IS_LIST else f"[{section}]"
        options = definitions[find_reference(schema)]
        rows = [
            f"| `{name}` | {describe(field)} | {show_default(name, field, options)} | {texts[section, name]} |"
            for name, field in options["properties"].items()
        ]
        table = ["| option | value | default | |", "|---|---|---|---|", *rows]
        sections.append("\n".join([f"## {section}", "", f"`{heading}`: {TITLES[section]}.", "", *table, ""]))
    return "\n".join(sections)


def read_texts(toml: str) -> dict[tuple[str, str], str]:
    """The comment behind each option of `brlite.toml`, by section and option."""
    texts: dict[tuple[str, str], str] = {}
    section = ""
    for line in toml.splitlines():
        if heading := re.match(r"(?:# )?\[+(\w+)\]+", line):
            section = heading[1]
        elif option := re.match(r'(?:# )?(\w+) = (?:"[^"]*"|[^"#])*#\s*(.*)', line):
            texts[section, option[1]] = option[2].replace("|", "\\|")
    return texts


def find_reference(schema: dict[str, Any]) -> str:
    """The name of the struct that a section, or each element of it, is."""
    reference = schema.get("items", schema).get("$ref") or schema["items"]["$ref"]
    return str(reference).rpartition("/")[2]


def describe(schema: dict[str, Any]) -> str:
    """Type and range of an option in words."""
    if "anyOf" in schema:
        return " or ".join(describe(member) for member in schema["anyOf"] if member.get("type") != "null")
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "description" in schema:
        return str(schema["description"])
    if schema["type"] == "array":
        return f"list of: {describe(schema['items'])}"
    if schema["type"] == "object":
        return f"table of: {describe(schema['additionalProperties'])}"
    return NAMES[schema["type"]] + describe_range(schema)


def describe_range(schema: dict[str, Any]) -> str:
    """The bounds of a number, such as `, 0 to 65535`."""
    if "exclusiveMinimum" in schema:
        return f", above {schema['exclusiveMinimum']:.15g}, to {schema['maximum']:.15g}"
    return f", {schema['minimum']:.15g} to {schema['maximum']:.15g}" if "minimum" in schema else ""


def show_default(name: str, schema: dict[str, Any], options: dict[str, Any]) -> str:
    if name in options.get("required", ()):
        return "required"
    default = schema["default"]
    return "not set" if default is None else f"`{msgspec.json.encode(default).decode()}`"


if __name__ == "__main__":
    main()
