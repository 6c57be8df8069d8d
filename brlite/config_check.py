"""What is doubtful in a config that is valid, and what this version cannot do yet. Both `serve` and `check` ask here.

Reads the config and the environment variable of the key; no model, no device, no network.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence

from brlite.config import Config, EngineConfig, ModelSpec
from brlite.errors import ConfigError

LOOPBACK = ("localhost", "::1")
GIB = 2**30
_TOGETHER = 'the models of load = "start" need together'

Warnings = Iterator[str]


def check_supported(config: Config) -> None:
    """Raise a `ConfigError` for a valid config that this version cannot serve."""
    for index, spec in enumerate(config.model):
        if spec.tensor_parallel > 1:
            raise ConfigError(
                f"model[{index}].tensor_parallel = {spec.tensor_parallel}: this version runs on one device; "
                "tensor parallelism is not built yet"
            )


def check_memory(engine: EngineConfig, models: Sequence[ModelSpec], num_bytes: Mapping[str, int]) -> None:
    """Raise a `ConfigError` for models that `engine.memory_gib` can never hold. `num_bytes` has the sizes known so far.

    One at a time must fit, and all of `load = "start"` together.
    """
    first = [spec for spec in models if spec.load == "start"]
    for specs, who in (*(([spec], f"the model {spec.name} needs") for spec in models), (first, _TOGETHER)):
        total = sum(num_bytes.get(spec.name, 0) for spec in specs)
        if 0 < engine.memory_gib * GIB < total:
            raise ConfigError(
                f"engine.memory_gib = {engine.memory_gib:g}: {who} {total / GIB:.3g} GiB for weights and KV cache; "
                "allow more, or lower build_batch, build_seq or num_blocks"
            )


def config_warnings(config: Config) -> list[str]:
    """One line for everything an operator should know before starting with this config."""
    warnings = [*_keys(config), *_forwarding(config), *_step_budget(config)]
    for index, spec in enumerate(config.model):
        warnings += (f"model[{index}]: {text}" for rule in _MODEL_RULES for text in rule(spec))
    return warnings


def _keys(config: Config) -> Warnings:
    keys = config.keys
    has_key = keys.keys or keys.file or config.key or os.environ.get(keys.env)
    is_local = config.server.host in LOOPBACK or config.server.host.startswith("127.")
    if not has_key and not is_local:
        yield f"server.host = {config.server.host}: whoever reaches this address may ask, since no API key is set"


def _forwarding(config: Config) -> Warnings:
    here = {spec.name for spec in config.model}
    listed = set(config.proxy.all_models.values())
    for name in sorted(listed - here):
        yield f"all_models: {name} runs elsewhere and requests are not forwarded yet: asking for it here gives 404"
    for name in sorted(here - listed if listed else ()):
        yield f"all_models: {name} is served here but not listed; the manual asks for the same name as in model"


def _step_budget(config: Config) -> Warnings:
    budget = config.engine.max_num_batched_tokens
    for index, spec in enumerate(config.model):
        if budget < spec.build_batch:
            text = (
                f"steps compute up to {spec.build_batch} tokens, one for each of model[{index}].build_batch sequences"
            )
            yield f"engine.max_num_batched_tokens = {budget}: {text}"


def _weights(spec: ModelSpec) -> Warnings:
    if spec.model_file and spec.path is None:
        yield f"model_file {spec.model_file} is not read by this version; {spec.name} is looked for by its name"
    elif spec.model_file and spec.path != spec.model_file:
        yield f"model_file {spec.model_file} is not read; the weights come from {spec.path}"


def _manual_limits(spec: ModelSpec) -> Warnings:
    """Limits of the manual's engine that brlite lifts: said where a config may be taken back to that engine."""
    if not (spec.model_file or spec.serialize_file or spec.output_name):
        return
    if len(spec.devices) == 1 and spec.devices[0] != 0:
        yield f"devices [{spec.devices[0]}]: fine here, but on a single card the manual's engine allows only card 0"
    if spec.build_seq > 8192:
        yield f"build_seq {spec.build_seq}: fine here, but the manual's engine allows at most 8192"
    if spec.build_batch > 64:
        yield f"build_batch {spec.build_batch}: fine here, but the manual's engine fails above 64"


_MODEL_RULES: tuple[Callable[[ModelSpec], Warnings], ...] = (_weights, _manual_limits)
