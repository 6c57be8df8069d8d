"""Writes docs/configuration.md and brlite.toml: `python docs/configuration.py`.

Types, ranges, defaults and texts come from the structs in `brlite/config/options.py`. tests/test_docs.py compares both
files with what this program would write.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from msgspec import NODEFAULT, inspect

from brlite.config.options import Config
from brlite.config.render import toml_value
from brlite.config.type_errors import bare, describe

HEAD = """\
# Configuration

Every option of brlite, with its range and its default. Put the options that you change into a TOML file and name it:
`brlite serve my.toml`. `brlite check my.toml` validates a file without starting anything. An unknown option, or a value
out of its range, is an error of one line that names the option and what is allowed. Flags of the command line replace
options of the file. A relative path begins at the folder in which brlite is started, wherever the file is; `~` is the
home folder.

[`brlite.toml`](../brlite.toml) is the same list as a file. A running server reads its file again on SIGHUP, or when
the file has changed. It applies `[[upstream]]`, `[proxy]`, `[[key]]` and `[keys]`. The other options need a restart.
JSON files of br-vllm-serving are read too ([coming from br-vllm-serving](manual.md)).

This page is printed by `docs/configuration.py` from `brlite/config/options.py`; do not edit it.
"""
TOML_HEAD = """\
# Every option of brlite with its default; docs/configuration.md adds the ranges. `brlite serve` reads this file from
# the current folder; `brlite check brlite.toml` validates it without starting. Options without a default are commented
# out.
# SIGHUP or a change of the file applies [[upstream]], [proxy], [[key]] and [keys]; the rest needs a restart.
# This file is printed by docs/configuration.py; do not edit the original.
"""
COMMENT_COLUMN = 34
ROOT = Path(__file__).parent.parent


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
                    None if option.required or default is None else toml_value(default),
                    toml_value(examples[0]) if examples else None,
                )
            )
        text, is_there = _json_schema(field, "description"), field.default != ()
        tables.append(Table(field.name, text, struct is not kind, is_there, options))
    return tables


def default_toml() -> str:
    """The text of `brlite.toml`: every option with its default and its description."""
    sections = [TOML_HEAD]
    for table in option_tables():
        lines = [_commented(table.heading, table.text, is_on=table.is_there)]
        for option in table.options:
            is_on = table.is_there and option.default is not None
            value = option.default if is_on else option.example or option.default
            lines.append(_commented(f"{option.name} = {value}", option.text, is_on=is_on))
        sections.append("\n".join(lines) + "\n")
    return "\n".join(sections)


def _commented(line: str, text: str, *, is_on: bool) -> str:
    line = line if is_on else f"# {line}"
    return f"{line:{COMMENT_COLUMN - 2}}  # {text}"


def _fields(struct: Any) -> tuple[inspect.Field, ...]:
    fields: tuple[inspect.Field, ...] = struct.fields
    return fields


def _json_schema(field: inspect.Field, key: str) -> Any:
    assert isinstance(field.type, inspect.Metadata), f"{field.name} has no text"
    return (field.type.extra_json_schema or {}).get(key)


def main() -> None:
    (ROOT / "docs" / "configuration.md").write_text(render(), encoding="utf-8")
    (ROOT / "brlite.toml").write_text(default_toml(), encoding="utf-8")


def render() -> str:
    """The whole page as Markdown."""
    sections = [HEAD]
    for table in option_tables():
        rows = [
            f"| `{option.name}` | {option.allowed} | {show_default(option)} | {option.text} |"
            for option in table.options
        ]
        lines = ["| option | value | default | |", "|---|---|---|---|", *rows]
        sections.append("\n".join([f"## {table.name}", "", f"`{table.heading}`: {table.text}.", "", *lines, ""]))
    return "\n".join(sections)


def show_default(option: Option) -> str:
    if option.is_required:
        return "required"
    return "not set" if option.default is None else f"`{option.default}`"


if __name__ == "__main__":
    main()
