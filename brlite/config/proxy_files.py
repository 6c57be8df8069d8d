"""The config of `brlite proxy`: a TOML, the manual's JSON files and `--upstream NAME=URL`, merged.

Opens no connections. Servers in `all_models` become upstreams. Entries without an address, such as the manual's
placeholders, stay in `proxy.all_models`, and `warnings.py` reports them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from brlite.config.address import Address, parse_address
from brlite.config.load import load_config, read_toml
from brlite.config.options import Config, UpstreamConfig
from brlite.config.validation import convert, make_config, show
from brlite.errors import ConfigError

COMMAND_LINE = "command line"
_NAMED_URL = re.compile(r"(?P<name>.+?)=(?P<url>(?:https?://|unix:).+)")


class _Entry(NamedTuple):
    """A server URL and its model. `source` is the file, or the command line, that contains this entry."""

    url: str
    model: str
    source: str

    @property
    def place(self) -> Address | str:
        """The parsed address: equal for two spellings of one address."""
        return parse_address(self.url) or self.url


def load_proxy_config(files: Sequence[Path], named_urls: Sequence[str] = ()) -> Config:
    """The config of a proxy. Raises a one-line `ConfigError` for a contradiction, or if there is no server."""
    if not files and not named_urls:
        raise ConfigError(
            "proxy: no upstream; give a config (a .toml, or br-vllm-serving's .json files) or --upstream NAME=URL"
        )
    tomls = [path for path in files if path.suffix == ".toml"]
    if len(tomls) > 1:
        raise ConfigError(f"{tomls[1]}: only one .toml is allowed, and {tomls[0]} is one; .json files may be added")
    source = str(tomls[0]) if tomls else COMMAND_LINE
    config = Config(model=())
    if tomls:
        data = read_toml(tomls[0])
        if data.get("model"):
            raise ConfigError(
                f"{source}: [[model]]: `brlite proxy` serves no model of its own; `brlite serve` does both"
            )
        config = convert({**data, "model": []}, Config, source=source)
    manuals = {path: load_config(path) for path in files if path not in tomls}
    tables = [(source, config.proxy.all_models)]
    tables += [(str(path), manual.proxy.all_models) for path, manual in manuals.items()]
    listed = _agreed([_Entry(url, model, source) for source, table in tables for url, model in table.items()])
    servers = [entry for entry in listed if isinstance(entry.place, Address)]
    upstreams = _with(config.upstream, [*servers, *map(_named_url, named_urls)])
    placeholders = {entry.url: entry.model for entry in listed if entry not in servers}
    if not upstreams:
        urls = ", ".join(list(placeholders)[:3])
        problem = (
            f"all_models: {urls}: none is an address; allowed is http://HOST[:PORT]"
            if placeholders
            else "no [[upstream]] and no all_models: no server to forward to"
        )
        raise ConfigError(f"{', '.join(map(str, files))}: {problem}")
    known = {*(entry.model for entry in listed), *(model for upstream in upstreams for model in upstream.models)}
    for path, manual in manuals.items():
        if manual.model[0].name not in known:
            name = show(manual.model[0].name)
            raise ConfigError(f"{path}: all_models: {name}, the model of this file, has no URL")
    proxy = msgspec.structs.replace(config.proxy, all_models=placeholders)
    merged = msgspec.structs.replace(config, upstream=upstreams, proxy=proxy)
    return make_config(msgspec.to_builtins(merged), source=source)


def upstream_configs(config: Config) -> list[UpstreamConfig]:
    """The upstreams of a config: its own, and those in `proxy.all_models` whose models are not served here.

    URLs that are placeholders are left out; `warnings.py` warns of them.
    """
    here = {spec.name for spec in config.model}
    configs = [
        # A model that is served here needs no second hop.
        msgspec.structs.replace(each, models=tuple(model for model in each.models if model not in here))
        for each in config.upstream
    ]
    models_by_url: dict[str, list[str]] = {}
    for url, model in config.proxy.all_models.items():
        if model not in here and parse_address(url) is not None:
            models_by_url.setdefault(url, []).append(model)
    urls = {each.url for each in configs}
    configs += [
        UpstreamConfig(url=url, models=tuple(models)) for url, models in models_by_url.items() if url not in urls
    ]
    return [each for each in configs if each.models]


def _agreed(entries: Iterable[_Entry]) -> list[_Entry]:
    """The entries without duplicates. Raises `ConfigError` if two entries name different models for one address."""
    seen: dict[Address | str, _Entry] = {}
    for entry in entries:
        other = seen.setdefault(entry.place, entry)
        if other.model != entry.model:
            where = entry.source if other.source == entry.source else f"{other.source} and {entry.source}"
            raise ConfigError(
                f"{where}: all_models: {entry.url} has two models, {show(other.model)} and {show(entry.model)}; "
                "allowed is one model for each URL"
            )
    return list(seen.values())


def _named_url(text: str) -> _Entry:
    match = _NAMED_URL.fullmatch(text)
    if match is None or parse_address(match["url"]) is None:
        raise ConfigError(
            f"{COMMAND_LINE}: --upstream {show(text)}: allowed is NAME=URL, with a URL such as http://HOST:PORT, "
            "https://HOST or unix:/PATH"
        )
    return _Entry(match["url"], match["name"], COMMAND_LINE)


def _with(upstreams: Iterable[UpstreamConfig], entries: Iterable[_Entry]) -> tuple[UpstreamConfig, ...]:
    """The upstreams with the entries added: to the upstream of the same address, else as a new one."""
    merged = list(upstreams)
    indices: dict[Address | str, int] = {}
    for index, upstream in enumerate(merged):
        indices.setdefault(parse_address(upstream.url) or upstream.url, index)
    for entry in entries:
        index = indices.setdefault(entry.place, len(merged))
        if index == len(merged):
            merged.append(UpstreamConfig(url=entry.url, models=(entry.model,)))
        elif entry.model not in merged[index].models:
            merged[index] = msgspec.structs.replace(merged[index], models=(*merged[index].models, entry.model))
    return tuple(merged)
