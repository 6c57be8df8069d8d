"""Writes docs/configuration.md and brlite.toml: `python docs/configuration.py`.

Types, ranges, defaults and texts come from the structs in `brlite/config/options.py`. tests/test_docs.py compares both
files with what this program would write.
"""

from __future__ import annotations

from pathlib import Path

from brlite.config.render import Option, default_toml, option_tables

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
ROOT = Path(__file__).parent.parent


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
