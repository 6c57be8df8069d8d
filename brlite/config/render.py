"""Writes a config as TOML that can be loaded again, keys masked: what `brlite check` prints."""

from __future__ import annotations

import json

import msgspec

from brlite.config.options import Config

MASK = "***"


def render(config: Config) -> str:
    """Every option with its value; those that have none are commented out."""
    sections = []
    for name in config.__struct_fields__:
        value = getattr(config, name)
        tables = [(f"[[{name}]]", spec) for spec in value] if isinstance(value, tuple) else [(f"[{name}]", value)]
        sections += [_section(heading, table) for heading, table in tables]
    return "\n\n".join(sections)


def masked_options(table: msgspec.Struct) -> dict[str, object]:
    """A table's options by name, with a mask where a key stands."""
    options = msgspec.structs.asdict(table)
    if "keys" in options:
        options["keys"] = [MASK] * len(options["keys"])
    return options | {name: MASK for name in ("key", "api_key") if options.get(name) is not None}


def _section(heading: str, table: msgspec.Struct) -> str:
    return "\n".join([heading, *(_option(name, value) for name, value in masked_options(table).items())])


def _option(name: str, value: object) -> str:
    return f"# {name} =" if value is None else f"{name} = {_value(value)}"


def _value(value: object) -> str:
    if isinstance(value, dict):
        pairs = (f"{_string(name)} = {_value(item)}" for name, item in value.items())
        return f"{{ {', '.join(pairs)} }}" if value else "{}"
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_value, value))}]"
    return _string(value) if isinstance(value, str) else json.dumps(value)


def _string(text: str) -> str:
    # JSON's escapes are TOML's too, but for DEL, which TOML wants escaped.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
