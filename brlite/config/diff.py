"""The differences between two configs, one line for each option. API keys are not shown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

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
    changes = []
    for section in Config.__struct_fields__:
        parts = getattr(old, section), getattr(new, section)
        if not isinstance(parts[0], tuple):
            changes += [Change(section, text) for text in _options(section, *parts)]
            continue
        before, after = ({entry.name or entry.url: entry for entry in entries} for entries in parts)
        for name, entry in before.items():
            gone = [f"- {section} {name}"]
            texts = _options(f"{section} {name}", entry, after[name]) if name in after else gone
            changes += [Change(section, text) for text in texts]
        for name in (name for name in after if name not in before):
            entry = after[name]
            defaults = {field.name: field.default for field in msgspec.structs.fields(entry)}
            options = {key: value for key, value in masked_options(entry).items() if value and value != defaults[key]}
            shown = ", ".join(f"{key} = {show(value)}" for key, value in options.items() if key != "name")
            changes.append(Change(section, f"+ {section} {name}: {shown}"))
    return changes


def _options(path: str, old: msgspec.Struct, new: msgspec.Struct) -> Iterator[str]:
    before, after = masked_options(old), masked_options(new)
    for name in old.__struct_fields__:
        if getattr(old, name) == getattr(new, name):
            continue
        if before[name] == after[name]:  # both are masked, though they differ
            yield f"{path}.{name}: another one"
        else:
            yield f"{path}.{name}: {show(before[name])} -> {show(after[name])}"
