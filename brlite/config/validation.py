"""Checks plain data against a struct. An error is one line with the field, its value and the allowed values.

The struct's types contain the ranges. `make_config` also checks the fields of a config against each other. `load.py`
and `manual_json.py` read the files.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, TypeVar, get_args

import msgspec
from msgspec import inspect

from brlite.config.address import is_host, parse_address
from brlite.config.options import ENGINE_VARIABLE, NEVER_TO_CLIENTS, NEVER_TO_UPSTREAMS, Backend, Config
from brlite.config.type_errors import (
    FieldProblem,
    bare,
    describe,
    join_path,
    read_problem,
    remove_at,
    type_info,
    types_at,
    value_at,
)
from brlite.errors import ConfigError
from brlite.files.cache import expand_home
from brlite.files.quoting import excerpt

T = TypeVar("T")

MAX_SHOWN = 80
MAX_PROBLEMS = 50
SNAPSHOT = re.compile(r"/models--([^/]+)/snapshots/[^/]+\Z")  # of a model in the cache of Hugging Face's hub
SECRET_FIELDS = re.compile(r"keys\.keys.*|key\[\d+\]\.key|upstream\[\d+\]\.api_key", re.DOTALL)  # never shown


def convert(data: object, kind: type[T], *, source: str, is_text: bool = False) -> T:
    """Return `data` as a `kind`, or raise a `ConfigError` that begins with `source`, the file or command at fault.

    With `is_text` strings are converted to numbers and booleans, as on a command line.
    """
    try:
        return msgspec.convert(data, kind, strict=not is_text)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{source}: {_explain(read_problem(error), data, kind)}") from None


def show(value: object) -> str:
    """`value` as JSON on one line, cut to a maximum length."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, RecursionError):  # a number of 5,000 digits, or nested too deeply
        text = excerpt(value)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 1] + "…"


def _explain(fault: FieldProblem, data: object, kind: object) -> str:
    path = fault.path.removesuffix("[...]")
    try:
        value, (type_here,) = value_at(data, path), types_at(kind, path)
    except (LookupError, TypeError, ValueError):  # a key of the data makes the path in msgspec's error ambiguous
        return fault.problem
    if fault.unknown is not None:
        from difflib import get_close_matches

        allowed = [field.encode_name for field in bare(type_here).fields]  # type: ignore[attr-defined]
        homes = _tables_with(fault.unknown) if kind is Config else []
        matches = get_close_matches(fault.unknown, allowed, 1)
        near = f"it belongs to {' or '.join(homes)}; " if homes else f"did you mean {matches[0]}? " if matches else ""
        field, shown = join_path(path, fault.unknown), show(value.get(fault.unknown))
        return f"{field} = {shown}: no such field; {near}allowed are {', '.join(allowed)}"
    if fault.missing is not None:
        field = join_path(path, fault.missing)
        return f"{field} is missing: {_allowed(types_at(kind, field)[0])}"
    shown = "…" if SECRET_FIELDS.fullmatch(path) else show(value)
    hint = ""
    if path and isinstance(value, list) and isinstance(bare(type_here), inspect.StructType):
        hint = f"; its header is [{path}]"
    if path and isinstance(value, dict) and isinstance(bare(type_here), inspect.VarTupleType):
        hint = f"; its header is [[{path}]]"
    return f"{path or 'the file'} = {shown}: {_allowed(type_here)}{hint}"


def _tables_with(option: str) -> list[str]:
    """The headings of the tables of a config that have this option."""
    config: Any = type_info(Config)
    headings = []
    for table in config.fields:
        kind: Any = bare(table.type)
        is_list = isinstance(kind, inspect.VarTupleType)
        if option in [field.name for field in (kind.item_type if is_list else kind).fields]:
            headings.append(f"[[{table.name}]]" if is_list else f"[{table.name}]")
    return headings


def _allowed(kind: inspect.Type) -> str:
    return f"allowed {'are' if isinstance(bare(kind), inspect.LiteralType) else 'is'} {describe(kind)}"


def make_config(data: Mapping[str, Any], *, source: str) -> Config:
    """Check plain data against the structs, and the fields against each other. Every error begins with `source`.

    If the data has upstreams and no `model`, no default model is served.
    """
    if data.get("upstream") and "model" not in data:
        data = {**data, "model": []}
    config = convert(data, Config, source=source)
    for index, spec in enumerate(data.get("model", ())):  # a model with a path must not get the default name
        if "path" in spec and "name" not in spec:
            raise ConfigError(
                f"{source}: model[{index}].name is missing: it is required beside path: requests name the model by it"
            )
    for contradiction in _contradictions(config):
        raise ConfigError(f"{source}: {contradiction}")
    return config


def find_problems(data: Mapping[str, Any]) -> list[str]:
    """All errors that `make_config` would raise one after the other, at most `MAX_PROBLEMS`.

    After each error the invalid field is removed and the check repeated. Contradictions between fields are checked only
    if all fields are valid.
    """
    try:
        left = copy.deepcopy(dict(data))
    except RecursionError:  # nested too deeply: `make_config` names the field
        return []
    problems: list[str] = []
    removed = set[str]()
    while len(problems) < MAX_PROBLEMS:
        try:
            msgspec.convert(left, Config)
        except msgspec.ValidationError as error:
            fault = read_problem(error)
            if fault.missing is not None and join_path(fault.path, fault.missing) in removed:
                break  # its value was invalid
            problems.append(_explain(fault, left, Config))
            at = join_path(fault.path, fault.unknown) if fault.unknown is not None else fault.path.removesuffix("[...]")
            if fault.missing is not None or not remove_at(left, at):
                break
            removed.add(at)
        else:
            break
    if not problems:
        problems = list(_contradictions(msgspec.convert(left, Config)))
    return problems


def override(config: Config, values: Mapping[str, object], *, source: str = "command line") -> Config:
    """`config` with some values replaced, checked again. Keys are paths such as `server.port` or `model[0].name`.

    A config that was made in Python may have `Path` objects for text.
    """

    def to_text(value: object) -> str:
        if isinstance(value, os.PathLike):
            return os.fsdecode(value)
        raise ConfigError(f"{source}: {show(value)}: allowed are text, numbers, true, false, lists and tables")

    data = msgspec.to_builtins(config, enc_hook=to_text)
    for path, value in values.items():
        section, _, field = path.partition(".")
        if section == "model[0]" and len(data["model"]) != 1:
            found = (
                "no [[model]]"
                if not data["model"]
                else f"{len(data['model'])} [[model]] tables: set it there, or choose one of them by --model"
            )
            raise ConfigError(f"{source}: {path} = {show(value)}: this config has {found}")
        value_at(data, section)[field] = value
    return make_config(data, source=source)


def model_override(model: str | None) -> dict[str, object]:
    """The values for `override` to serve one model: a name to download, or the path of a folder or `.gguf` file.

    With a path, the model's name in requests is derived from it.
    """
    if model is None:
        return {}
    path = expand_home(model)
    is_file = path.suffix.lower() == ".gguf" and (":" not in model or path.exists())
    if not (is_file or path.exists() or model.startswith(("/", ".", "~"))):
        return {"model[0].name": model, "model[0].path": None}
    # Not resolved: a link's name was chosen by a person, that of its target in a hub's cache is a hash.
    folder = os.path.abspath(path)
    cached = SNAPSHOT.search(folder)
    name = path.stem if is_file else cached[1].replace("--", "/", 1) if cached else os.path.basename(folder)
    if not name:
        raise ConfigError(f"--model {model}: this is the root folder, and no model")
    # A name goes into JSON, where bytes of a path that are no UTF-8 have no place.
    return {"model[0].name": os.fsencode(name).decode(errors="replace"), "model[0].path": str(path)}


def engine_override(name: str | None) -> dict[str, object]:
    """The values for `override` to choose an engine: its name, or one of the values of `engine.backend`.

    Without a name the environment variable decides, if it is set.
    """
    if not name and not (name := os.environ.get(ENGINE_VARIABLE, "").strip()):
        return {}
    if len(name.split()) > 1:
        raise ConfigError(f"{ENGINE_VARIABLE}, or --engine: {show(name)}: allowed is a name without spaces")
    is_ours = name in get_args(Backend)
    return {"engine.name": None, "engine.backend": name} if is_ours else {"engine.name": name}


def _contradictions(config: Config) -> Iterator[str]:
    """Errors in combinations of fields."""
    limits = config.limits
    if not is_host(config.server.host):
        yield (
            f"server.host = {show(config.server.host)}: allowed is a host name or an address alone, such as localhost, "
            "0.0.0.0 or ::1; the port is server.port (--port)"
        )
    if limits.max_body_bytes_in_flight < 2 * limits.max_body_bytes:
        yield (
            f"limits.max_body_bytes_in_flight = {limits.max_body_bytes_in_flight}: must be at "
            f"least twice limits.max_body_bytes, which is {limits.max_body_bytes}"
        )
    if not config.model and not config.upstream:
        yield "model = []: at least one [[model]] or [[upstream]] is required"
    seen: set[str] = set()
    for index, spec in enumerate(config.model):
        at = f"model[{index}]"
        if spec.name in seen:
            yield f"{at}.name = {show(spec.name)}: allowed is a name that no other model has"
        seen.add(spec.name)
        if "\0" in spec.serialize_file:
            yield f"{at}.serialize_file = {show(spec.serialize_file)}: allowed is a path without a zero byte"
        if len(set(spec.devices)) < len(spec.devices):
            yield f"{at}.devices = {show(spec.devices)}: allowed is each device once"
        if spec.tensor_parallel != len(spec.devices):
            count = len(spec.devices)
            found = f"{at}.tensor_parallel = {spec.tensor_parallel}: allowed is the number of devices, here {count}"
            yield f"{found}; list one for each rank, as in devices = [0, 1]"
        if spec.draft is not None and config.engine.name is not None:
            yield f"{at}.draft: engine {config.engine.name} takes no draft model; allowed is one without engine.name"
    seen = set()
    for index, key in enumerate(config.key):
        if key.name in seen:
            yield f"key[{index}].name = {show(key.name)}: allowed is a name that no other key has"
        seen.add(key.name)
        if (key.key is None) == (key.env is None):
            yield f"key[{index}]: exactly one of key and env is required"
    yield from _proxy_contradictions(config)


def _proxy_contradictions(config: Config) -> Iterator[str]:
    seen: set[str] = set()
    for index, upstream in enumerate(config.upstream):
        at, name = f"upstream[{index}]", upstream.name or upstream.url
        if parse_address(upstream.url) is None:
            if "@" in upstream.url:  # the text may hold a password
                yield f"{at}.url: allowed is one without user and password; {at}.api_key is the upstream's key"
                continue
            yield f"{at}.url = {show(upstream.url)}: allowed is http://HOST[:PORT], https://HOST[:PORT] or unix:/PATH"
        if name in seen:
            yield f"{at} = {show(name)}: allowed is a name, or else a url, that no other upstream has"
        seen.add(name)
        if upstream.api_key and upstream.api_key_env:
            yield f"{at}.api_key_env and api_key are both set; allowed is one of them"
        if upstream.ca_file is not None and not upstream.url.startswith("https:"):
            yield f"{at}.ca_file = {show(upstream.ca_file)}: allowed is one beside an https:// url"
        if upstream.health_path and not upstream.health_path.startswith("/"):
            yield f'{at}.health_path = {show(upstream.health_path)}: allowed is a path that begins with /, or ""'
        for model in upstream.rename.keys() - set(upstream.models):
            yield f"{at}.rename.{model}: allowed are the names in {at}.models"
    for field, never in (("request_headers", NEVER_TO_UPSTREAMS), ("response_headers", NEVER_TO_CLIENTS)):
        for name in getattr(config.proxy, field):
            if any(fnmatchcase(name.lower(), pattern) for pattern in never):
                yield f"proxy.{field}: {show(name)}: allowed is any name but {', '.join(never)}"
    known = {name for upstream in config.upstream for name in upstream.models} | {spec.name for spec in config.model}
    known |= set(config.proxy.all_models.values())
    for alias, model in config.proxy.aliases.items():
        if model not in known:
            yield f"proxy.aliases.{alias} = {show(model)}: allowed is a model of a [[model]] or an [[upstream]]"
        if alias in known:
            yield f"proxy.aliases.{alias}: allowed is a name that no model has"
    for model, others in config.proxy.fallbacks.items():
        for name in (model, *others):
            if name not in known:
                yield f"proxy.fallbacks.{model}: {show(name)}: allowed is a model of a [[model]] or an [[upstream]]"
