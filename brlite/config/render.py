"""Writes TOML: a config with masked keys, for `brlite check`, and `brlite.toml` with the descriptions of all options.

The descriptions come from `options.py`. docs/configuration.md is made from the same tables.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import msgspec
from msgspec import NODEFAULT, inspect

from brlite.config.options import Config
from brlite.config.type_errors import bare, describe

MASK = "***"
COMMENT_COLUMN = 34
HEAD = """\
# Every option of brlite with its default; docs/configuration.md adds the ranges. `brlite serve` reads this file from
# the current folder; `brlite check brlite.toml` validates it without starting. Options without a default are commented
# out.
# SIGHUP or a change of the file applies [[upstream]], [proxy], [[key]] and [keys]; the rest needs a restart.
# This file is printed by docs/configuration.py; do not edit the original.
"""


class Option(NamedTuple):
    """An option: its name, the allowed values in words, its description, and its default and an example as TOML."""

    name: str
    allowed: str
    text: str
    is_required: bool
    default: str | None
    example: str | None


class Table(NamedTuple):
    """A TOML table of options. `is_list`: it may occur several times. `is_there`: the default config has it."""

    name: str
    text: str
    is_list: bool
    is_there: bool
    options: list[Option]

    @property
    def heading(self) -> str:
        return f"[[{self.name}]]" if self.is_list else f"[{self.name}]"


def option_tables() -> list[Table]:
    """Every table of a config file, in the order of `Config`."""
    tables = []
    for field in _fields(inspect.type_info(Config)):
        kind = bare(field.type)
        struct = kind.item_type if isinstance(kind, inspect.VarTupleType) else kind
        options = []
        for option in _fields(struct):
            examples = _json_schema(option, "examples")
            default = option.default_factory() if option.default_factory is not NODEFAULT else option.default
            options.append(
                Option(
                    option.name,
                    describe(option.type),
                    _json_schema(option, "description"),
                    option.required,
                    None if option.required or default is None else _value(default),
                    _value(examples[0]) if examples else None,
                )
            )
        text, is_there = _json_schema(field, "description"), field.default != ()
        tables.append(Table(field.name, text, struct is not kind, is_there, options))
    return tables


def default_toml() -> str:
    """The text of `brlite.toml`: every option with its default and its description."""
    sections = [HEAD]
    for table in option_tables():
        lines = [_commented(table.heading, table.text, is_on=table.is_there)]
        for option in table.options:
            is_on = table.is_there and option.default is not None
            value = option.default if is_on else option.example or option.default
            lines.append(_commented(f"{option.name} = {value}", option.text, is_on=is_on))
        sections.append("\n".join(lines) + "\n")
    return "\n".join(sections)


def toml_schema() -> str:
    """The JSON Schema of a `.toml`, as JSON, for completion and checks in editors."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **msgspec.json.schema(Config)}
    return json.dumps(schema, indent=2, ensure_ascii=False)


def _commented(line: str, text: str, *, is_on: bool) -> str:
    line = line if is_on else f"# {line}"
    return f"{line:{COMMENT_COLUMN - 2}}  # {text}"


def render(config: Config) -> str:
    """The config as TOML: every option with its value. Options without a value are commented out."""
    sections = []
    for name in config.__struct_fields__:
        value = getattr(config, name)
        heading, tables = (f"[[{name}]]", value) if isinstance(value, tuple) else (f"[{name}]", (value,))
        for table in tables:
            options = masked_options(table).items()
            lines = (f"# {key} =" if option is None else f"{key} = {_value(option)}" for key, option in options)
            sections.append("\n".join([heading, *lines]))
    return "\n\n".join(sections)


def masked_options(table: msgspec.Struct) -> dict[str, object]:
    """A table's options by name, with API keys masked."""
    options = msgspec.structs.asdict(table)
    if "keys" in options:
        options["keys"] = [MASK] * len(options["keys"])
    return options | {name: MASK for name in ("key", "api_key") if options.get(name) is not None}


def _fields(struct: Any) -> tuple[inspect.Field, ...]:
    fields: tuple[inspect.Field, ...] = struct.fields
    return fields


def _json_schema(field: inspect.Field, key: str) -> Any:
    assert isinstance(field.type, inspect.Metadata), f"{field.name} has no text"
    return (field.type.extra_json_schema or {}).get(key)


def _value(value: object) -> str:
    if isinstance(value, msgspec.Struct):
        value = msgspec.structs.asdict(value)
    if isinstance(value, dict):
        pairs = (f"{_string(name)} = {_value(item)}" for name, item in value.items())
        return f"{{ {', '.join(pairs)} }}" if value else "{}"
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_value, value))}]"
    return _string(value) if isinstance(value, str) else json.dumps(value)


def _string(text: str) -> str:
    # TOML has JSON's escapes, and also requires one for DEL.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
