"""Warnings about a valid config, and errors for configs that this version cannot serve. For `serve`, `check` and `LLM`.

Reads the config, environment variables and the limits of this process for threads and open files. Reads no model and
does not use the network.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

from brlite.config.address import is_loopback_address, parse_address
from brlite.config.options import Config, EngineConfig, ModelSpec
from brlite.config.proxy_files import upstream_configs
from brlite.errors import ConfigError
from brlite.process.children import read_secret
from brlite.process.machine import OWN_DESCRIPTORS, descriptor_limit, find_cpus

GIB = 2**30

# RFC 6454 §6.1, as browsers write it; includes file:// and the origins of extensions.
_ORIGIN = re.compile(
    r"null|(?!http://[^:/]*:80\Z|https://[^:/]*:443\Z)[a-z][a-z0-9+.-]*://(?:[a-z0-9._~-]*|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?"
)
_HOST = re.compile(r"(?:[A-Za-z0-9._~-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?")

Warnings = Iterator[str]


def check_supported(config: Config) -> None:
    """Raise a `ConfigError` for a valid config that this version cannot serve."""
    if config.engine.name is not None:
        return  # an engine plugin itself reports what it cannot serve
    shared = [index for index, spec in enumerate(config.model) if spec.tensor_parallel > 1]
    for index in shared[1:]:
        raise ConfigError(
            f"model[{index}].tensor_parallel = {config.model[index].tensor_parallel}: only one model of a server "
            f"can use several ranks, and model[{shared[0]}] does; start another server for this one, behind "
            "`brlite proxy`"
        )


def check_memory(engine: EngineConfig, models: Sequence[ModelSpec], num_bytes: Mapping[str, int]) -> None:
    """Raise a `ConfigError` for models that can never fit in `engine.memory_gib`. `num_bytes` has the known sizes.

    Each model must fit alone, and all models of `load = "start"` together.
    """
    groups = [([spec], f"the model {spec.name} needs") for spec in models]
    groups.append(([spec for spec in models if spec.load == "start"], 'the models of load = "start" need together'))
    for specs, who in groups:
        total = sum(num_bytes.get(spec.name, 0) for spec in specs)
        if 0 < engine.memory_gib * GIB < total:
            raise ConfigError(
                f"engine.memory_gib = {engine.memory_gib:g}: {who} {total / GIB:.3g} GiB for weights and KV cache; "
                "allow more, or lower build_batch, build_seq or num_blocks"
            )


def config_warnings(config: Config) -> list[str]:
    """The warnings about this config, one line each."""
    warnings = [text for rule in _RULES for text in rule(config)]
    models = config.model if config.engine.name is None else ()  # an engine plugin itself reports what it cannot serve
    for index, spec in enumerate(models):
        warnings += (f"model[{index}]: {text}" for rule in _MODEL_RULES for text in rule(spec))
    return warnings


def sent_variables(config: Config) -> list[str]:
    """One line for every environment variable whose value goes to another server."""
    return [
        f"the value of {upstream.api_key_env} is sent to {upstream.url} (upstream[{index}].api_key_env)"
        for index, upstream in enumerate(config.upstream)
        if upstream.api_key_env is not None
    ]


def metrics_notes(config: Config) -> list[str]:
    """A line with the kind of key that `/metrics` needs; empty if it needs none."""
    if not _has_key(config) or not (config.server.metrics_need_key or config.key):
        return []
    which = "an operator's API key (admin = true)" if config.key else "an API key"
    return [f"/metrics needs {which}: configure one in Prometheus (authorization.credentials_file)"]


def _has_key(config: Config) -> bool:
    keys = config.keys
    return bool(keys.keys or keys.file or config.key or read_secret(keys.env))


def _server(config: Config) -> Warnings:
    if not _has_key(config) and not is_loopback_address(config.server.host):
        yield (
            f"server.host = {config.server.host}: any client that can reach this address can use the server: "
            "no API key is set"
        )
    for origin in config.server.cors_origins:
        if origin != "*" and _ORIGIN.fullmatch(origin) is None:
            yield (
                f"server.cors_origins: no browser sends {origin} as an origin; allowed are *, null and "
                "SCHEME://HOST[:PORT] in small letters, without a path and without the scheme's own port"
            )
    for host in config.server.allowed_hosts:
        if host != "*" and _HOST.fullmatch(host) is None:
            yield f"server.allowed_hosts: no client sends {host} as Host; allowed are * and names, without a scheme"
    needed, limit = needed_descriptors(config), descriptor_limit()
    if needed > limit:
        yield (
            f"limits.max_connections = {config.limits.max_connections}: this needs up to {needed} open files, but this "
            f"process may open {limit}: {usable_connections(config)} connections are served at once; raise the hard "
            "limit (ulimit -Hn, LimitNOFILE, --ulimit nofile)"
        )


def needed_descriptors(config: Config) -> int:
    """The number of open files that the config may need: one for each connection, one for each forwarded request."""
    num_connections = config.limits.max_connections
    models = _forwarded_models(config)
    return OWN_DESCRIPTORS + num_connections + min(num_connections, len(models) * config.proxy.max_in_flight)


def usable_connections(config: Config) -> int:
    """The number of connections that the process's limit of open files allows."""
    limit = descriptor_limit()
    if needed_descriptors(config) <= limit:
        return config.limits.max_connections
    for_forwarding = len(_forwarded_models(config)) * config.proxy.max_in_flight
    return max(1, limit - OWN_DESCRIPTORS - min(for_forwarding, (limit - OWN_DESCRIPTORS) // 2))


def _manual_table(config: Config) -> Warnings:
    """Entries of the manual's `all_models` that have no effect."""
    here, table = _local_models(config), config.proxy.all_models
    upstream_models = {upstream.url: upstream.models for upstream in config.upstream}
    for url, model in table.items():
        if model in here:
            continue
        if parse_address(url) is None:
            yield f"all_models: {url} is not an address, so {model} is not forwarded to it; allowed is http://HOST[:PORT]"
        elif model not in upstream_models.get(url, (model,)):
            yield f"all_models: {url} is also an [[upstream]], and only its models count: {model} is not forwarded"
    for name in sorted(here - set(table.values()) if table else ()):
        yield f"all_models: {name} is served here but not listed; br-vllm-serving wants every model listed by its name"
    for name in sorted(name for name, count in Counter(table.values()).items() if count > 1 and name in here):
        yield f"all_models: {name} is served here, not forwarded: the other servers that have it are not used"


def _upstreams(config: Config) -> Warnings:
    here = _local_models(config)
    for upstream in config.upstream:
        name, address = upstream.name or upstream.url, parse_address(upstream.url)
        for model in upstream.models:
            if model in here:
                yield f"upstream {name}: {model} is served here, not forwarded"
        has_key = upstream.api_key is not None or upstream.api_key_env is not None
        if has_key and address is not None and not (address.is_tls or is_loopback_address(address.host)):
            yield f"upstream {name}: its API key is sent unencrypted; use https"
        if not has_key and upstream.api_key_header != "authorization":
            yield f"upstream {name}: api_key_header has no effect without an api_key"
        if not upstream.health_path:
            yield f'upstream {name}: health_path = "": no health checks; only failed requests show that it is down'


def _names(config: Config) -> Warnings:
    """Model names in aliases, fallbacks and keys that no served model has."""
    forwarded, aliases = _forwarded_models(config), config.proxy.aliases
    known = _local_models(config) | forwarded
    for alias, model in aliases.items():
        if model not in known:
            yield f"proxy.aliases.{alias}: {model} has no upstream; requests get 404"
    for model, others in config.proxy.fallbacks.items():
        if model not in forwarded:
            yield f"proxy.fallbacks.{model}: has no effect: only forwarded requests use fallbacks"
        for other in others:
            if other == model:
                yield f"proxy.fallbacks.{model}: names itself"
            elif other not in forwarded:
                yield f"proxy.fallbacks.{model}: {other} has no upstream, so it cannot be a fallback"
    for key in config.key:
        for name in key.models:
            if name in aliases:
                yield f"key {key.name}: models: {name} is an alias; write the model's own name, {aliases[name]}"
            elif name not in known:
                yield f"key {key.name}: models: {name} is neither served here nor forwarded"


def _engine(config: Config) -> Warnings:
    engine, default = config.engine, EngineConfig()
    if not config.model and engine != default:
        yield "engine: has no effect: no model is served here"
    # Threads beyond the available cores wait for each other: on one core, 4 threads take 36 to 90 times as long as 1.
    cpus = find_cpus()
    if config.model and engine.name is None and engine.threads > cpus.num_threads:
        yield (
            f"engine.threads = {engine.threads}: this process may use {cpus.num_threads} ({cpus.decided_by}); "
            "more threads make each step many times slower; 0 sets the right number"
        )
    if engine.name is None and engine.options:
        yield "engine.options: have no effect without engine.name"
    if engine.name is not None:
        for name in ("block_size", "memory_gib"):
            if getattr(engine, name) != getattr(default, name):
                yield f"engine.{name}: has no effect on engine {engine.name}, which manages its own memory"
        for index, spec in enumerate(config.model):
            if spec.num_blocks:
                yield f"model[{index}].num_blocks: has no effect on engine {engine.name}, which has build_batch slots"
    budget = engine.max_num_batched_tokens
    for index, spec in enumerate(config.model):
        if spec.draft is not None and engine.speculation == "off":
            yield f'model[{index}].draft: has no effect with engine.speculation = "off"'
        if 0 < budget < spec.build_batch:
            text = (
                f"steps compute up to {spec.build_batch} tokens, one for each of model[{index}].build_batch sequences"
            )
            yield f"engine.max_num_batched_tokens = {budget}: {text}"


def _local_models(config: Config) -> set[str]:
    return {spec.name for spec in config.model}


def _forwarded_models(config: Config) -> set[str]:
    """The models whose requests are forwarded."""
    return {model for upstream in upstream_configs(config) for model in upstream.models}


def _weights(spec: ModelSpec) -> Warnings:
    if spec.model_file and spec.path is None:
        yield f"model_file {spec.model_file} is not read: without path the model is downloaded by its name, {spec.name}"
    elif spec.model_file.endswith(".pt"):
        yield f"model_file {spec.model_file} is read only if {spec.path} has no weights"
    elif spec.model_file and spec.path != spec.model_file:
        yield f"model_file {spec.model_file} is not read; the weights come from {spec.path}"


def _manual_limits(spec: ModelSpec) -> Warnings:
    """Values that brlite allows but the manual's engine does not. The config may later be used with that engine."""
    if not (spec.model_file or spec.serialize_file or spec.output_name):
        return
    if len(spec.devices) == 1 and spec.devices[0] != 0:
        yield f"devices [{spec.devices[0]}]: fine here, but br-vllm-serving with a single card allows only card 0"
    if spec.build_seq > 8192:
        yield f"build_seq {spec.build_seq}: fine here, but br-vllm-serving allows at most 8192"
    if spec.build_batch > 64:
        yield f"build_batch {spec.build_batch}: fine here, but br-vllm-serving fails above 64"


_RULES: tuple[Callable[[Config], Warnings], ...] = (_server, _manual_table, _upstreams, _names, _engine)
_MODEL_RULES: tuple[Callable[[ModelSpec], Warnings], ...] = (_weights, _manual_limits)
