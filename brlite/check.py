"""`brlite check`: what a config means and what it will take, by arithmetic. Starts, fetches and allocates nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from brlite.config import DEFAULT_MODEL, Config, EngineConfig, ModelSpec, load_config
from brlite.config_check import check_supported, config_warnings
from brlite.config_text import render
from brlite.errors import ModelError
from brlite.machine import find_memory, show_bytes

if TYPE_CHECKING:
    from brlite.models.config import KVDtype

# Its config.json, so that the sizes can be told before it is fetched.
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


class Sizes(msgspec.Struct, frozen=True, kw_only=True):
    """What a model will hold in memory, in bytes, and in which form."""

    num_parameters: int
    max_context: int
    dtype: str
    weight_bytes: int
    kv_dtype: str
    kv_bytes_per_token: int
    num_blocks: int
    block_size: int

    @property
    def kv_bytes(self) -> int:
        return self.num_blocks * self.block_size * self.kv_bytes_per_token


class ModelReport(msgspec.Struct, frozen=True, kw_only=True):
    """Where a model comes from, and its sizes where they are known before it is fetched."""

    spec: ModelSpec
    origin: str
    sizes: Sizes | None


def run(path: Path) -> int:
    """Print the effective config, what its models will take, and the warnings. Raises what makes it unusable."""
    from brlite.http.keys import ApiKeys

    config = load_config(path)
    check_supported(config)
    ApiKeys.from_config(config)
    reports = [inspect_model(spec, config.engine) for spec in config.model]
    print("\n".join([render(config), "", *describe(config, reports, find_memory().available)]))
    return 0


def inspect_model(spec: ModelSpec, engine: EngineConfig) -> ModelReport:
    """Find out about a model without fetching it. Raises where `serve` would: all files are opened, none is read."""
    from brlite.checkpoint import open_checkpoint
    from brlite.tokenizer import load_tokenizer
    from brlite.worker.fit import check_fit

    path = _find(spec)
    if path is None:
        sizes = _measure(spec, engine, DEFAULT_MODEL_CONFIG) if spec.name == DEFAULT_MODEL else None
        return ModelReport(spec=spec, origin="not here yet, fetched by its name at the first start", sizes=sizes)
    with closing(open_checkpoint(path)) as checkpoint:
        check_fit(checkpoint, spec)
        sizes = _measure(spec, engine, checkpoint.config)
    load_tokenizer(path, chat_template=Path(spec.chat_template) if spec.chat_template else None)
    return ModelReport(spec=spec, origin=str(path), sizes=sizes)


def describe(config: Config, reports: Sequence[ModelReport], available_bytes: int) -> Iterator[str]:
    """The lines about the models and their memory, then the warnings."""
    for report in reports:
        yield from _describe_model(report)
    known = [report.sizes for report in reports if report.sizes is not None]
    total = sum(sizes.weight_bytes + sizes.kv_bytes for sizes in known)
    if known:
        yield f"memory: {show_bytes(total)} for weights and KV cache; {show_bytes(available_bytes)} are free now"
    if total > available_bytes:
        yield "warning: this is more than is free; lower build_batch, build_seq or num_blocks"
    yield from (f"warning: {warning}" for warning in config_warnings(config))


def _describe_model(report: ModelReport) -> Iterator[str]:
    spec, sizes = report.spec, report.sizes
    yield f"model {spec.name}"
    yield f"  from      {report.origin}"
    if sizes is None:
        yield "  sizes     unknown until it is fetched"
        return
    yield f"  context   {spec.build_seq} tokens of the {sizes.max_context} that the model allows"
    yield f"  weights   {show_bytes(sizes.weight_bytes)}: {sizes.num_parameters / 1e6:.4g} million as {sizes.dtype}"
    if spec.precision != "bf16" and sizes.dtype != "int8":
        yield f"            ({spec.precision}: rounded to int8, but held as {sizes.dtype} by torch)"
    blocks = f"{sizes.num_blocks} blocks of {sizes.block_size} tokens as {sizes.kv_dtype}"
    yield f"  KV cache  {show_bytes(sizes.kv_bytes)}: {blocks}, {show_bytes(sizes.kv_bytes_per_token)} a token"


def _find(spec: ModelSpec) -> Path | None:
    """The model's folder or file if it is on this machine already. A `path` that leads nowhere is an error."""
    from brlite.checkpoint.fetch import local_sources, locate_model

    try:
        return locate_model(spec.name, spec.path, sources=local_sources())
    except ModelError:
        if spec.path is not None:
            raise
        return None


def _measure(spec: ModelSpec, engine: EngineConfig, hf_config: Mapping[str, Any]) -> Sizes:
    from brlite.models import find_family
    from brlite.models.config import KV_BYTES, kv_bytes_per_token, native_weight_bytes, num_parameters, weight_bytes
    from brlite.worker.choosing import find_obstacle
    from brlite.worker.fit import check_spec

    config = find_family(hf_config).read_config(hf_config)
    check_spec(spec, config)
    is_native = engine.backend != "torch" and find_obstacle(config, spec, engine) is None
    dtype: KVDtype = "bfloat16" if is_native else _torch_dtype(engine)
    kv_dtype: KVDtype = "int8" if spec.precision == "a_bf16_w_int8_kv_int8" else "bfloat16"
    is_int8 = spec.precision != "bf16"
    return Sizes(
        num_parameters=num_parameters(config),
        max_context=config.max_context,
        dtype="int8" if is_native and is_int8 else dtype,
        weight_bytes=native_weight_bytes(config, is_int8=is_int8)
        if is_native
        else weight_bytes(config, KV_BYTES[dtype]),
        kv_dtype=kv_dtype,
        kv_bytes_per_token=kv_bytes_per_token(config, kv_dtype),
        num_blocks=spec.num_blocks or spec.build_batch * math.ceil(spec.build_seq / engine.block_size),
        block_size=engine.block_size,
    )


def _torch_dtype(engine: EngineConfig) -> KVDtype:
    from brlite.worker.device import compute_dtype, select_device

    is_bfloat16 = compute_dtype(engine.dtype, select_device(engine.device)).itemsize == 2
    return "bfloat16" if is_bfloat16 else "float32"
