"""`brlite check`: validates a config and computes the memory that it needs. Starts, downloads and allocates nothing.

It connects to the upstreams only with `--dial`.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import TypeVar

import msgspec

from brlite.backends.choose import expand_serialize_file
from brlite.backends.draft import check_draft, find_draft, refuse_drafts
from brlite.backends.sizes import Sizes, find_model, known_sizes, measure_checkpoint
from brlite.checkpoint import open_checkpoint
from brlite.checkpoint.checked_model import check_model
from brlite.commands.given_config import is_model
from brlite.config.load import load_config, read_toml
from brlite.config.options import Config, EngineConfig, ModelSpec, ProxyConfig
from brlite.config.proxy_files import load_proxy_config
from brlite.config.render import render, toml_schema
from brlite.config.validation import find_problems
from brlite.config.warnings import GIB, check_memory, check_supported, config_warnings
from brlite.errors import BrliteError, ConfigError
from brlite.files.quoting import shown
from brlite.http.keys import ApiKeys
from brlite.models.precision import PRECISIONS
from brlite.process.machine import find_memory, show_bytes
from brlite.proxy.routing.connection_check import dial_all
from brlite.proxy.routing.route_table import Route, RouteTable

T = TypeVar("T")


class ModelReport(msgspec.Struct, frozen=True, kw_only=True):
    """Where a model comes from, and its sizes if they are known before it is downloaded."""

    spec: ModelSpec
    origin: str
    sizes: Sizes | None


def run(args: argparse.Namespace) -> int:
    if args.schema:
        print(toml_schema())
        return 0
    if not args.config:
        raise ConfigError("check: name a FILE to check, or give --schema")
    if models := [path for path in args.config if is_model(path)]:
        raise ConfigError(f"{models[0]} is no config file; a model and its memory: brlite tune {models[0]}")
    return check(*args.config, dial=args.dial, is_offline=args.offline)


def check(path: Path, *others: Path, dial: bool = False, is_offline: bool = False) -> int:
    """Print the effective config, the memory of its models, where requests go, and the warnings.

    Several files make one proxy config. With `is_offline` the config is for another machine: only fields are checked,
    not files, memory or environment variables. Raises one error with a line for each fault. Returns 1 if a dialled
    upstream failed, else 0.
    """
    if not others and path.suffix == ".toml" and len(problems := find_problems(read_toml(path))) > 1:
        raise ConfigError("\n".join(f"{path}: {problem}" for problem in problems))
    config = load_proxy_config([path, *others]) if others else load_config(path)
    errors: list[BrliteError] = []

    def tried(work: Callable[[], T]) -> T | None:
        try:
            return work()
        except BrliteError as error:
            errors.append(error)
            return None

    tried(lambda: check_supported(config))
    table = tried(lambda: RouteTable(config))
    reports: list[ModelReport] = []
    if not is_offline:
        tried(lambda: ApiKeys.from_config(config))
        looked_at = [tried(partial(inspect_model, spec, config.engine)) for spec in config.model]
        reports = [report for report in looked_at if report is not None]
        sizes = {report.spec.name: report.sizes.num_bytes for report in reports if report.sizes is not None}
        tried(lambda: check_memory(config.engine, config.model, sizes))
    if len(errors) == 1:
        raise errors[0]
    if errors or table is None:
        raise ConfigError("\n".join(map(str, errors)))
    routes = [line for target in table for line in _describe_route(target, config.proxy)]
    lines = describe(config, reports, find_memory().available)
    note = ["offline: the files, the memory and the keys of the machine were not looked at"] if is_offline else []
    print(shown("\n".join([render(config), "", *routes, *lines, *note])), flush=True)
    if not dial:
        return 0
    results = asyncio.run(dial_all(table.upstreams, config.proxy))
    found = [result.line for result in results] or ["there is no upstream to dial"]
    print(shown("\n".join(["", *found])))
    return 0 if all(result.is_good for result in results) else 1


def inspect_model(spec: ModelSpec, engine: EngineConfig) -> ModelReport:
    """A model's origin and sizes, without downloading it. Opens all its files, and raises the errors of `serve`."""
    from brlite.backends.plugins.discovery import check_engine_name
    from brlite.engine.logits_processors import load_factories
    from brlite.llm.loading import make_scoring_head, refuse_scoring
    from brlite.tokenizer.loader import check_templates, load_tokenizer

    load_factories(engine.logits_processors)
    if engine.name is not None:
        check_engine_name(engine.name)
        refuse_scoring(spec, engine.name)
        return ModelReport(spec=spec, origin=f"engine {engine.name}", sizes=None)
    if spec.serialize_file:
        expand_serialize_file(spec.serialize_file)
    path = find_model(spec)
    if path is None:
        check_templates(spec.chat_template, spec.score_template)
        if spec.draft is not None and engine.speculation != "off":
            open_checkpoint(find_draft(spec.draft))
        origin = "not here yet, fetched by its name at the first start"
        return ModelReport(spec=spec, origin=origin, sizes=known_sizes(spec, engine))
    checkpoint = open_checkpoint(path, spec.model_file)
    model = check_model(checkpoint, spec)
    sizes = measure_checkpoint(checkpoint, spec, engine)
    if not sizes.verifies_drafts:
        refuse_drafts(spec, engine, "torch")
    origin = str(checkpoint.path)
    tokenizer = load_tokenizer(path, chat_template=Path(spec.chat_template) if spec.chat_template else None)
    check_draft(spec, engine, tokenizer)
    make_scoring_head(checkpoint, model, msgspec.structs.replace(spec, build_seq=sizes.context), tokenizer)
    return ModelReport(spec=spec, origin=origin, sizes=sizes)


def describe(config: Config, reports: Sequence[ModelReport], available_bytes: int) -> Iterator[str]:
    """The lines about the models and their memory, then the warnings."""
    for report in reports:
        yield from _describe_model(report, config.engine)
    by_card: dict[tuple[int, ...], list[Sizes]] = {}  # () for the machine's memory
    named = config.engine.device.partition(":")[2]  # a device with a number is the card of all models
    for report in reports:
        if report.sizes is not None:
            cards = (int(named),) if named.isdecimal() else report.spec.devices
            devices = cards if report.sizes.is_on_card else ()
            by_card.setdefault(devices, []).append(report.sizes)
    for devices, group in sorted(by_card.items()):
        place = f" of card{'s' * (len(devices) > 1)} {', '.join(map(str, devices))}" if devices else ""
        total = sum(sizes.num_bytes for sizes in group)
        free = group[0].free_bytes if devices else available_bytes
        at_once = min(total, int(config.engine.memory_gib * GIB) or total)
        bound = f", at most {show_bytes(at_once)} at once" if at_once < total else ""
        parts = "weights, KV cache and graphs" if devices else "weights and KV cache"
        left = "how much is free is not reported" if free is None else f"{show_bytes(free)} are free now"
        yield f"memory{place}: {show_bytes(total)} for {parts}{bound}; {left}"
        if free is not None and at_once > free:
            yield "warning: this is more than is free; lower build_batch, build_seq or num_blocks"
    yield from (f"warning: {warning}" for warning in config_warnings(config))


def _describe_route(target: Route, proxy: ProxyConfig) -> Iterator[str]:
    """Where requests for a forwarded model go, and its other names."""
    yield f"forwarded {target.model}"
    for word, upstream in zip(chain(["to"], repeat("")), target.upstreams, strict=False):
        name, config = target.name_at(upstream), upstream.config
        where = "" if upstream.name == config.url else f" at {config.url}"
        renamed = "" if name == target.model else f", as {name}"
        yield f"  {word:<9} {upstream.name}{where}, weight {upstream.weight}{renamed}"
    aliases = [alias for alias, model in proxy.aliases.items() if model == target.model]
    if aliases:
        yield f"  also as   {', '.join(aliases)}"
    if target.fallbacks:
        yield f"  or else   {', '.join(target.fallbacks)}"


def _describe_model(report: ModelReport, engine: EngineConfig) -> Iterator[str]:
    spec, sizes = report.spec, report.sizes
    yield f"model {spec.name}"
    yield f"  from      {report.origin}"
    if sizes is None:
        yield "  sizes     unknown until it is there"
        return
    limit = f" of the {sizes.max_context} that the model allows" if spec.build_seq else f": {sizes.context_reason}"
    yield f"  context   {sizes.context} tokens{limit}"
    yield f"  weights   {show_bytes(sizes.weight_bytes)}: {sizes.num_parameters / 1e6:.4g} million as {sizes.dtype}"
    yield f"  precision {sizes.precision}"
    named = sizes.precision.partition(",")[0]
    if named in PRECISIONS and PRECISIONS[named].weights == "int8" and sizes.dtype != "int8":
        yield f"            ({named}: rounded to int8, but held as {sizes.dtype} by torch)"
    blocks = f"{sizes.num_blocks} blocks of {sizes.block_size} tokens as {sizes.kv_dtype}"
    yield f"  KV cache  {show_bytes(sizes.kv_bytes)}: {blocks}, {show_bytes(sizes.kv_bytes_per_token)} a token"
    if sizes.graph_bytes:
        yield f"  graphs    {show_bytes(sizes.graph_bytes)} at most, for steps without a prompt"
    if sizes.runs_ahead:
        yield f"  drafts    {_describe_drafts(spec, sizes, engine)}"
    if spec.draft is not None and (draft := sizes.draft) is not None:
        memory = f"{show_bytes(draft.weight_bytes)} of weights and {show_bytes(draft.kv_bytes)} of KV cache"
        yield f"  draft     {spec.draft.path}: {memory}, precision {draft.precision}"
    num_tokens = sizes.num_blocks * sizes.block_size
    for number, rank in enumerate(sizes.ranks):
        word = "ranks" if number == 0 else ""
        weights, kv = show_bytes(rank.weight_bytes), show_bytes(rank.kv_bytes_per_token * num_tokens)
        yield f"  {word:<9} {number}: {weights} of the weights, {kv} of the KV cache"


def _describe_drafts(spec: ModelSpec, sizes: Sizes, engine: EngineConfig) -> str:
    """What `speculation` chooses for a model whose steps are launched ahead."""
    if engine.speculation == "off":
        return "none: engine.speculation is off"
    if sizes.verifies_drafts and engine.drafts_text(has_draft=spec.draft is not None, runs_ahead=sizes.runs_ahead):
        return "of a draft model and of repeated text" if spec.draft is not None else "of repeated text"
    more = '; engine.speculation = "on" drafts text, too' if sizes.verifies_drafts else ""
    return f"only tokens that a grammar forces{more}"
