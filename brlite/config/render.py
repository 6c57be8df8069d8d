"""Writes a config as TOML with masked keys, for `brlite check`, and the JSON Schema of a config file for editors."""

from __future__ import annotations

import json

import msgspec

from brlite.config.options import Config

MASK = "***"


def toml_schema() -> str:
    """The JSON Schema of a `.toml`, as JSON, for completion and checks in editors."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **msgspec.json.schema(Config)}
    return json.dumps(schema, indent=2, ensure_ascii=False)


def render(config: Config) -> str:
    """The config as TOML: every option with its value. Options without a value are commented out."""
    sections = []
    for name in config.__struct_fields__:
        value = getattr(config, name)
        heading, tables = (f"[[{name}]]", value) if isinstance(value, tuple) else (f"[{name}]", (value,))
        for table in tables:
            options = masked_options(table).items()
            lines = (f"# {key} =" if option is None else f"{key} = {toml_value(option)}" for key, option in options)
            sections.append("\n".join([heading, *lines]))
    return "\n\n".join(sections)


def masked_options(table: msgspec.Struct) -> dict[str, object]:
    """A table's options by name, with API keys masked."""
    options = msgspec.structs.asdict(table)
    if "keys" in options:
        options["keys"] = [MASK] * len(options["keys"])
    return options | {name: MASK for name in ("key", "api_key") if options.get(name) is not None}


def toml_value(value: object) -> str:
    """A value of an option in TOML."""
    if isinstance(value, msgspec.Struct):
        value = msgspec.structs.asdict(value)
    if isinstance(value, dict):
        pairs = (f"{_string(name)} = {toml_value(item)}" for name, item in value.items())
        return f"{{ {', '.join(pairs)} }}" if value else "{}"
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, float):
        return repr(value)  # as TOML has it: inf and nan, which JSON writes otherwise
    return _string(value) if isinstance(value, str) else json.dumps(value)


def _string(text: str) -> str:
    # TOML has JSON's escapes, and also requires one for DEL.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
