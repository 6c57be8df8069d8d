"""Checks plain data against a struct and words what is wrong: one line with the field, its value and what is allowed.

The ranges themselves stand in the struct's types. `make_config` also checks the fields of a config against each other.
Reads no files: `load.py` and `manual_json.py` do.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, TypeVar, get_args

import msgspec
from msgspec import inspect

from brlite.config.address import parse_address
from brlite.config.options import ENGINE_VARIABLE, NEVER_TO_CLIENTS, NEVER_TO_UPSTREAMS, Backend, Config
from brlite.errors import ConfigError

T = TypeVar("T")

MAX_SHOWN = 80
SECRET_FIELDS = re.compile(r"keys\.keys.*|key\[\d+\]\.key|upstream\[\d+\]\.api_key", re.DOTALL)  # never shown
# msgspec names the field and the problem, not the value, and calls any value of a mapping `[...]`.
_COMPLAINT = re.compile(r"(?P<problem>.*?)(?: - at `\$\.?(?P<path>.*)`)?", re.DOTALL)
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(.*)`", re.DOTALL)
_STEP = re.compile(r"\[(\d+)\]|([^.\[\]]+)")


def convert(data: object, kind: type[T], *, source: str, is_text: bool = False) -> T:
    """Return `data` as a `kind`, or raise a `ConfigError` that begins with `source`, the file or command at fault.

    With `is_text` values may be strings that say what is meant, as on a command line.
    """
    try:
        return msgspec.convert(data, kind, strict=not is_text)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{source}: {_explain(str(error), data, inspect.type_info(kind))}") from None


def show(value: object) -> str:
    """`value` on one line, as JSON writes it, cut to a readable length."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 1] + "…"


def _explain(complaint: str, data: object, kind: inspect.Type) -> str:
    match = _COMPLAINT.fullmatch(complaint)
    assert match is not None  # the pattern matches any text
    problem, path = match["problem"], (match["path"] or "").removesuffix("[...]")
    at = _follow(data, kind, path)
    if unknown := _UNKNOWN.fullmatch(problem):
        return _explain_unknown(path, unknown[1], at)
    if missing := _MISSING.fullmatch(problem):
        field = _join(path, missing[1])
        return f"{field} is missing: {_allowed(_child(at[1], missing[1]))}"
    shown = "…" if SECRET_FIELDS.fullmatch(path) else show(at[0])
    return f"{path or 'the file'} = {shown}: {_allowed(at[1])}"


def _explain_unknown(path: str, name: str, at: tuple[Any, inspect.Type]) -> str:
    value, kind = at[0], bare(at[1])
    assert isinstance(kind, inspect.StructType)  # only structs have fields to be unknown
    allowed = [field.encode_name for field in kind.fields]
    near = "".join(f"did you mean {match}? " for match in get_close_matches(name, allowed, 1))
    return f"{_join(path, name)} = {show(value[name])}: no such field; {near}allowed are {', '.join(allowed)}"


def _follow(data: Any, kind: inspect.Type, path: str) -> tuple[Any, inspect.Type]:
    """The value and the type at the end of `path`, such as `model[0].devices`."""
    for index, name in _STEP.findall(path):
        kind = _child(kind, name)
        data = data[int(index) if index else name]
    return data, kind


def _child(kind: inspect.Type, name: str) -> inspect.Type:
    kind = bare(kind)
    if isinstance(kind, inspect.StructType):
        return next(field.type for field in kind.fields if field.encode_name == name)
    if isinstance(kind, inspect.TupleType):
        return kind.item_types[0]
    if isinstance(kind, inspect.VarTupleType):
        return kind.item_type
    return kind


def _allowed(kind: inspect.Type) -> str:
    return f"allowed {'are' if isinstance(bare(kind), inspect.LiteralType) else 'is'} {describe(kind)}"


def bare(kind: inspect.Type) -> inspect.Type:
    """A type without the texts that belong to it."""
    return kind.type if isinstance(kind, inspect.Metadata) else kind


def describe(kind: inspect.Type) -> str:
    """A type and its range in words, as errors and docs/configuration.md say them."""
    if isinstance(kind, inspect.Metadata):
        return str((kind.extra or {}).get("allowed") or describe(kind.type))
    if isinstance(kind, inspect.LiteralType):
        return ", ".join(str(value) for value in kind.values)
    if isinstance(kind, inspect.UnionType):
        return " or ".join(describe(member) for member in kind.types if not isinstance(member, inspect.NoneType))
    if isinstance(kind, inspect.TupleType):
        return f"a list of {len(kind.item_types)}, each {describe(kind.item_types[0])}"
    if isinstance(kind, inspect.VarTupleType):
        return f"a list, each {describe(kind.item_type)}"
    if isinstance(kind, inspect.DictType):
        return f"a table, each value {describe(kind.value_type)}"
    return _NAMES.get(type(kind), "something else") + _range(kind)


_NAMES: dict[type[Any], str] = {
    inspect.IntType: "a whole number",
    inspect.FloatType: "a number",
    inspect.StrType: "a string",
    inspect.BoolType: "true or false",
    inspect.StructType: "a table",
}


def _range(kind: Any) -> str:
    low, above, high = (getattr(kind, bound, None) for bound in ("ge", "gt", "le"))
    if low is not None:
        return f" from {low:.12g} to {high:.12g}" if high is not None else f" of at least {low:.12g}"
    return "" if above is None else f" above {above:.12g}, at most {high:.12g}"


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def make_config(data: Mapping[str, object], *, source: str) -> Config:
    """Check plain data against the structs and their fields against each other; `source` begins every error.

    With upstreams and no model it is a proxy's: no default model is served beside them.
    """
    if data.get("upstream") and "model" not in data:
        data = {**data, "model": []}
    config = convert(data, Config, source=source)
    for contradiction in (*_nameless(data), *_contradictions(config)):
        raise ConfigError(f"{source}: {contradiction}")
    return config


def override(config: Config, values: Mapping[str, object], *, source: str = "command line") -> Config:
    """`config` with fields replaced by their path, such as `server.port` or `model[0].name`, and checked again."""
    data = msgspec.to_builtins(config)
    for path, value in values.items():
        section, _, field = path.partition(".")
        if section == "model[0]" and not data["model"]:
            raise ConfigError(f"{source}: {path} = {show(value)}: this config has no [[model]]")
        table = data["model"][0] if section == "model[0]" else data[section]
        table[field] = value
    return make_config(data, source=source)


def engine_override(name: str | None) -> dict[str, object]:
    """What `override` takes to choose an engine: by its name, or one of the values of `engine.backend`.

    Without a name that of the environment counts, if it has one.
    """
    name = name or os.environ.get(ENGINE_VARIABLE)
    if not name:
        return {}
    is_ours = name in get_args(Backend)
    return {"engine.name": None, "engine.backend": name} if is_ours else {"engine.name": name}


def _nameless(data: Mapping[str, Any]) -> Iterator[str]:
    """Models with a path and no name, which would get the default model's name."""
    for index, spec in enumerate(data.get("model", ())):
        if "path" in spec and "name" not in spec:
            yield f"model[{index}].name is missing: it is required beside path: requests name the model by it"


def _contradictions(config: Config) -> Iterator[str]:
    """What no single field shows."""
    limits = config.limits
    if limits.max_body_bytes_in_flight < 2 * limits.max_body_bytes:
        yield (
            f"limits.max_body_bytes_in_flight = {limits.max_body_bytes_in_flight}: must be at "
            f"least twice limits.max_body_bytes, which is {limits.max_body_bytes}"
        )
    if not config.model and not config.upstream:
        yield "model = []: at least one [[model]] or [[upstream]] is required"
    names = [spec.name for spec in config.model]
    for index, spec in enumerate(config.model):
        at = f"model[{index}]"
        if spec.name in names[:index]:
            yield f"{at}.name = {show(spec.name)}: allowed is a name that no other model has"
        if len(set(spec.devices)) < len(spec.devices):
            yield f"{at}.devices = {show(spec.devices)}: allowed is each device once"
        if spec.tensor_parallel != len(spec.devices):
            count = len(spec.devices)
            yield f"{at}.tensor_parallel = {spec.tensor_parallel}: allowed is the number of devices, here {count}"
    yield from _upstream_contradictions(config)
    yield from _key_contradictions(config)


def _upstream_contradictions(config: Config) -> Iterator[str]:
    seen: set[str] = set()
    for index, upstream in enumerate(config.upstream):
        at, name = f"upstream[{index}]", upstream.name or upstream.url
        if parse_address(upstream.url) is None:
            yield f"{at}.url = {show(upstream.url)}: allowed is http://HOST[:PORT], https://HOST[:PORT] or unix:/PATH"
        if name in seen:
            yield f"{at} = {show(name)}: allowed is a name, or else a url, that no other upstream has"
        seen.add(name)
        if upstream.api_key and upstream.api_key_env:
            yield f"{at}.api_key_env and api_key are both set; allowed is one of them"
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


def _key_contradictions(config: Config) -> Iterator[str]:
    names = [key.name for key in config.key]
    for index, key in enumerate(config.key):
        if key.name in names[:index]:
            yield f"key[{index}].name = {show(key.name)}: allowed is a name that no other key has"
        if (key.key is None) == (key.env is None):
            yield f"key[{index}]: exactly one of key and env is required"
