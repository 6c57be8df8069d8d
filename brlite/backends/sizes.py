"""Computes how much memory a model will take, from its config and headers, before it is loaded.

`brlite check` prints it, and memory budgets use it. Allocates nothing and reads headers only.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec

from brlite.backends.choose import check_native_only, find_obstacle
from brlite.backends.draft import draft_spec, find_draft
from brlite.backends.native.abi import LANES
from brlite.backends.torch.device import (
    CardMemory,
    compute_dtype,
    device_memory,
    prepare_environment,
    rules_for,
    select_device,
)
from brlite.backends.torch.graph_memory import graph_bytes, most_rows
from brlite.checkpoint import Checkpoint, open_checkpoint
from brlite.checkpoint.bundle import precision_made_for
from brlite.checkpoint.checked_model import CheckedModel, check_spec, find_targets, settle_precision
from brlite.checkpoint.checkpoint import naming
from brlite.checkpoint.fetch import local_sources, locate_model
from brlite.checkpoint.load_plan import card_forms, describe_precision, matrix_parts, num_cache_blocks
from brlite.config.options import DEFAULT_MODEL, EngineConfig, ModelSpec
from brlite.config.warnings import GIB
from brlite.errors import ConfigError, ModelError
from brlite.models.config import KV_BYTES, KVDtype, ModelConfig, cache_dtype, kv_bytes_per_token
from brlite.models.network import list_parameters, native_weight_bytes, num_parameters, weight_bytes
from brlite.models.precision import Precision, PrecisionName
from brlite.models.registry import find_family
from brlite.models.shards import Shard, check_groups, rank_parameters, shard_config
from brlite.process.machine import find_memory, show_bytes

logger = logging.getLogger(__name__)

# The default model's config.json, so that its sizes are known before it is fetched.
DEFAULT_MODEL_CONFIG: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
}
DEFAULT_MODEL_FORMATS: Mapping[str, str] = {
    "model.embed_tokens.weight": "Q8_0",
    **{
        f"model.layers.{layer}.{matrix}_proj.weight": "Q4_1"
        for layer in range(30)
        for matrix in (*(f"self_attn.{each}" for each in "qkvo"), *(f"mlp.{each}" for each in ("gate", "up", "down")))
    },
}
NO_FORMATS: Mapping[str, str] = MappingProxyType({})

SHARED_TOKENS = 2048  # for each of build_batch sequences, in a KV cache without a configured size
LEAST_CONTEXT = 2048  # also with too little memory: then the allocation fails with its own error
MOST_CONTEXT = 131_072  # the longest automatic one; tables of positions grow with it and are not counted here


class RankSizes(msgspec.Struct, frozen=True):
    """Bytes of one rank of several. A key head that several ranks read is counted in the cache of each."""

    weight_bytes: int
    kv_bytes_per_token: int


class Sizes(msgspec.Struct, frozen=True, kw_only=True):
    """How much memory a model takes, in bytes, and in which types. With `ranks` it is the sum over the ranks.

    `graph_bytes` are those of CUDA graphs. With `is_on_card`, `free_bytes` are those that the model's cards have free,
    None if they do not report it. With `is_filled` the KV cache takes all that a card has left. `verifies_drafts` and
    `runs_ahead` are properties of the backend. `draft` has the sizes of the draft model.
    """

    num_parameters: int
    max_context: int
    context: int
    context_reason: str
    dtype: str
    precision: str
    weight_bytes: int
    kv_dtype: str
    kv_bytes_per_token: int
    num_blocks: int
    block_size: int
    graph_bytes: int = 0
    is_on_card: bool = False
    free_bytes: int | None = None
    is_filled: bool = False
    verifies_drafts: bool = True
    runs_ahead: bool = False
    ranks: tuple[RankSizes, ...] = ()
    draft: Sizes | None = None

    @property
    def kv_bytes(self) -> int:
        return self.num_blocks * self.block_size * self.kv_bytes_per_token

    @property
    def num_bytes(self) -> int:
        """Weights, KV cache and graphs together, those of the draft model too."""
        own = self.weight_bytes + self.kv_bytes + self.graph_bytes
        return own + (0 if self.draft is None else self.draft.num_bytes)


def find_model(spec: ModelSpec) -> Path | None:
    """The model's folder or file if it is on this machine. Raises `ModelError` for a `path` that does not exist."""
    try:
        return locate_model(spec.name, spec.path, sources=local_sources)
    except ModelError:
        if spec.path is not None:
            raise
        return None


def known_sizes(spec: ModelSpec, engine: EngineConfig) -> Sizes | None:
    """The sizes of a model that is on this machine, or of the default model; None for one to be fetched first."""
    path = find_model(spec)
    if path is not None:
        return sizes_at(path, spec, engine)
    if spec.name != DEFAULT_MODEL:
        return None
    return _measure_with_draft(describe_model(DEFAULT_MODEL_CONFIG, spec, DEFAULT_MODEL_FORMATS), spec, engine)


def sizes_at(path: Path, spec: ModelSpec, engine: EngineConfig) -> Sizes:
    """The sizes of the model in a folder or file. Raises `ModelError` and `ConfigError`."""
    prepare_environment()  # before a checkpoint imports torch
    return measure_checkpoint(open_checkpoint(path, spec.model_file), spec, engine)


def measure_checkpoint(checkpoint: Checkpoint, spec: ModelSpec, engine: EngineConfig) -> Sizes:
    """The sizes of an open model, and of its draft model, if it has one that is used. Raises `ModelError`."""
    formats, made_for = checkpoint.formats(), precision_made_for(checkpoint)
    with naming(checkpoint.path):
        model = describe_model(checkpoint.config, spec, formats, made_for)
    return _measure_with_draft(model, spec, engine)


def _measure_with_draft(model: CheckedModel, spec: ModelSpec, engine: EngineConfig) -> Sizes:
    """The sizes with those of the draft model, whose memory on a card the served model's KV cache leaves free."""
    sizes = measure(model, spec, engine)
    if spec.draft is None or engine.speculation == "off":
        return sizes
    checkpoint = open_checkpoint(find_draft(spec.draft))

    def measure_draft() -> Sizes:
        served = sizes.context, sizes.num_blocks * sizes.block_size
        return measure_checkpoint(checkpoint, draft_spec(spec, engine, checkpoint.config, served), engine)

    draft = measure_draft()
    if sizes.is_filled:
        sizes = measure(model, spec, engine, reserved=draft.num_bytes)
        draft = measure_draft()
    return msgspec.structs.replace(sizes, draft=draft)


def describe_model(
    hf_config: Mapping[str, Any],
    spec: ModelSpec,
    formats: Mapping[str, str] = NO_FORMATS,
    made_for: PrecisionName | None = None,
) -> CheckedModel:
    """A model by its config alone: no tensor is looked for.

    `formats` are those of the checkpoint's tensors; a tensor without one is not quantized. `made_for` is a bundle's.
    """
    family = find_family(hf_config)
    config = family.read_config(hf_config)
    check_spec(spec, config)
    precision = settle_precision(spec.precision, formats, made_for)
    targets = find_targets(family, config, formats)
    return CheckedModel(config, list_parameters(config), targets, set(), formats, precision)


def measure(model: CheckedModel, spec: ModelSpec, engine: EngineConfig, *, reserved: int = 0) -> Sizes:
    """The sizes of a model on the backend that would compute it here.

    An automatic KV cache leaves `reserved` bytes of the memory to others.
    """
    config = model.config
    holding = _find_holding(config, spec, engine, model.precision)
    is_native, kv_dtype = holding.is_native, cache_dtype(model.precision, engine.dtype)
    shards = [Shard(rank, spec.tensor_parallel, sums=not is_native) for rank in range(spec.tensor_parallel)]
    ranks, dtype = _rank_sizes(model, shards, holding, kv_dtype)
    block_size = math.ceil(engine.block_size / LANES) * LANES if is_native else engine.block_size
    graphs = 0
    if holding.has_kernels and len(ranks) == 1:
        graphs = graph_bytes(config, most_rows(spec, engine), spec.build_seq or min(config.max_context, MOST_CONTEXT))
    cards = [] if is_native else find_cards(spec, engine)
    room = partial(_cache_room, engine, cards, ranks, graphs + reserved)
    cache = _find_cache(config, spec, block_size, room)
    return Sizes(
        num_parameters=num_parameters(config),
        max_context=config.max_context,
        context=cache.context,
        context_reason=cache.reason,
        dtype=dtype,
        precision=describe_precision(model, spec, is_native=is_native, keeps_forms=holding.keeps_forms),
        weight_bytes=sum(rank.weight_bytes for rank in ranks),
        kv_dtype=kv_dtype,
        kv_bytes_per_token=sum(rank.kv_bytes_per_token for rank in ranks),
        num_blocks=cache.num_blocks,
        block_size=block_size,
        graph_bytes=graphs,
        is_on_card=holding.is_on_card,
        free_bytes=sum(card.free for card in cards) if cards else None,
        is_filled=cache.is_filled,
        verifies_drafts=is_native or holding.has_kernels,
        runs_ahead=holding.runs_ahead and len(ranks) == 1,
        ranks=tuple(ranks) if len(ranks) > 1 else (),
    )


class Holding(NamedTuple):
    """How weights are held: by native code, or by torch with each weight in `dtype` that is not in its form.

    With `has_kernels` our kernels for cards compute. With `runs_ahead` steps are launched ahead, on one card.
    """

    is_native: bool = True
    is_on_card: bool = False
    dtype: KVDtype = "bfloat16"
    keeps_forms: bool = True
    has_kernels: bool = False
    runs_ahead: bool = False


def _find_holding(config: ModelConfig, spec: ModelSpec, engine: EngineConfig, precision: Precision) -> Holding:
    """How the backend that computes the model holds it. Raises `ConfigError` for a precision that it does not have."""
    obstacle = find_obstacle(config, spec, engine)
    if obstacle is None:
        return Holding()
    check_native_only(spec, obstacle)
    device = select_device(engine.device)
    if precision.weights == "int8":
        check_groups(config, spec.tensor_parallel)
    dtype: KVDtype = "bfloat16" if compute_dtype(engine.dtype, device).itemsize == 2 else "float32"
    rules = rules_for(device)
    has_kernels = rules.has_triton and engine.torch_kernels != "eager" and dtype == "bfloat16"
    return Holding(False, device.type != "cpu", dtype, rules.keeps_forms(precision), has_kernels, rules.runs_ahead)


def _rank_sizes(
    model: CheckedModel, shards: Sequence[Shard], holding: Holding, kv_dtype: KVDtype
) -> tuple[list[RankSizes], str]:
    """The sizes of each rank, and the types of the matrices: int4, int8, bfloat16, or several."""
    ranks, types = [], set()
    for shard in shards:
        config = shard_config(model.config, shard)
        if holding.is_native:
            parts = matrix_parts(model, shard)
            forms = {part.form for matrix in parts.values() for part in matrix}
            num_bytes = native_weight_bytes(rank_parameters(model.config, shard), parts)
        else:
            by_name = card_forms(model, shard if len(shards) > 1 else None) if holding.keeps_forms else {}
            forms = set(by_name.values())
            num_bytes = weight_bytes(config, KV_BYTES[holding.dtype], by_name)
        types |= {form.partition("_")[0] for form in forms}
        ranks.append(RankSizes(num_bytes, kv_bytes_per_token(config, kv_dtype)))
    return ranks, " and ".join(sorted(types)) or holding.dtype


def settle_context(checkpoint: Checkpoint, spec: ModelSpec, engine: EngineConfig) -> ModelSpec:
    """The spec with its unset context and KV cache filled in, which are logged with the reason."""
    if spec.build_seq:
        return spec
    sizes = measure_checkpoint(checkpoint, spec, engine)
    logger.info(
        "model %s: a context of %d tokens, %s; KV cache: %s, %d tokens in all for at most %d sequences",
        *(spec.name, sizes.context, sizes.context_reason),
        *(show_bytes(sizes.kv_bytes), sizes.num_blocks * sizes.block_size, spec.build_batch),
    )
    return msgspec.structs.replace(spec, build_seq=sizes.context, num_blocks=sizes.num_blocks)


class CacheSize(NamedTuple):
    """The context and the reason for it, the blocks of the KV cache, and whether it takes all that a card has left."""

    context: int
    reason: str
    num_blocks: int
    is_filled: bool = False


class CacheRoom(NamedTuple):
    """The most tokens that the KV cache may have, and what limits them. With `is_filled` the cache gets all of them."""

    num_tokens: int
    bound: str
    is_filled: bool = False


def _find_cache(config: ModelConfig, spec: ModelSpec, block_size: int, room: Callable[[], CacheRoom]) -> CacheSize:
    """The context and the KV cache, of which `room` is the one that memory allows.

    The default context is the model's own if the cache can hold one. The cache then has `SHARED_TOKENS` for each
    sequence, at least one whole context, and at most half of the memory that the weights leave, or `num_blocks`. On a
    card it takes all the memory that is left.
    """
    if spec.build_seq:
        return CacheSize(spec.build_seq, "set by build_seq", num_cache_blocks(spec, block_size))
    own, reason = config.max_context, "the model's own"
    if own > MOST_CONTEXT:
        own, reason = MOST_CONTEXT, f"of the model's {own}; build_seq or --context may ask for more"
    most, bound, is_filled = CacheRoom(spec.num_blocks * block_size, "num_blocks") if spec.num_blocks else room()
    if most < own:
        context = max(most // block_size * block_size, min(own, LEAST_CONTEXT))
        own, reason = context, f"of the model's {config.max_context}, limited by {bound}"
    shared = (most if is_filled else min(spec.build_batch * SHARED_TOKENS, most)) // block_size
    return CacheSize(own, reason, spec.num_blocks or max(math.ceil(own / block_size), shared), is_filled)


def find_cards(spec: ModelSpec, engine: EngineConfig) -> list[CardMemory]:
    """The memory of the ranks' cards in this machine; empty on the CPU, and where a card does not report it."""
    devices = [select_device(engine.device, spec.devices[0])]
    for index in spec.devices[1:]:
        with suppress(ConfigError):  # it is in another machine
            devices.append(select_device(engine.device, index))
    return [card for card in map(device_memory, devices) if card is not None]


def _cache_room(
    engine: EngineConfig, cards: Sequence[CardMemory], ranks: Sequence[RankSizes], reserved: int
) -> CacheRoom:
    """How many tokens of KV cache fit into the memory that the weights and `reserved` bytes leave.

    Each rank has a card of its own; the fullest one decides.
    """
    weights, per_token = (sum(each) for each in zip(*map(msgspec.structs.astuple, ranks), strict=True))
    if cards:
        rooms = [int(card.total * engine.gpu_memory_utilization) - (card.total - card.free) for card in cards]
        memory, bound = max(0, min(rooms)) * len(ranks), "engine.gpu_memory_utilization of the card's memory"
    else:
        memory, bound = find_memory().total, "memory"
    is_bound = 0 < engine.memory_gib * GIB < memory
    if is_bound:
        memory, bound = int(engine.memory_gib * GIB), "engine.memory_gib"
    left = max(0, memory - weights - reserved)
    if cards and not is_bound:
        return CacheRoom(left // per_token, bound, is_filled=True)
    return CacheRoom(left // 2 // per_token, bound)
