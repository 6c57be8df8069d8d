"""The differences between two configs, one line for each option. API keys are not shown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec

from brlite.config.options import Config
from brlite.config.render import masked_options
from brlite.config.validation import show


class Change(NamedTuple):
    """One option that changed, or one entry that was added or removed. `section` is its field of `Config`."""

    section: str
    text: str


def diff(old: Config, new: Config) -> list[Change]:
    """All changes, in the order of the config. Entries of a list are compared by name; their order has no meaning."""
    return [
        Change(section, text)
        for section in Config.__struct_fields__
        for text in _section(section, getattr(old, section), getattr(new, section))
    ]


def _section(section: str, old: Any, new: Any) -> Iterator[str]:
    if not isinstance(old, tuple):
        yield from _options(section, old, new)
        return
    before, after = ({entry.name or entry.url: entry for entry in entries} for entries in (old, new))
    for name, entry in before.items():
        if name in after:
            yield from _options(f"{section} {name}", entry, after[name])
        else:
            yield f"- {section} {name}"
    for name, entry in after.items():
        if name not in before:
            defaults = {field.name: field.default for field in msgspec.structs.fields(entry)}
            options = {key: value for key, value in masked_options(entry).items() if value and value != defaults[key]}
            shown = ", ".join(f"{key} = {show(value)}" for key, value in options.items() if key != "name")
            yield f"+ {section} {name}: {shown}"


def _options(path: str, old: msgspec.Struct, new: msgspec.Struct) -> Iterator[str]:
    before, after = masked_options(old), masked_options(new)
    for name in old.__struct_fields__:
        if getattr(old, name) == getattr(new, name):
            continue
        if before[name] == after[name]:  # both are masked, though they differ
            yield f"{path}.{name}: another one"
        else:
            yield f"{path}.{name}: {show(before[name])} -> {show(after[name])}"
