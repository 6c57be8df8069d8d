"""Tiny models for the native backend, of the sizes that kernels like least: hardly any is a multiple of 16 or 32.

Between them they have every head size, grouping, window, bias, rope and tie that the kernels know.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from brlite.backends.native.backend import NativeBackend
from brlite.backends.native.library import NativeLibrary
from brlite.checkpoint import Checkpoint
from brlite.config.options import EngineConfig, ModelSpec
from brlite.models.precision import PrecisionOption
from brlite.models.registry import find_family
from tests.load_plans import make_plan
from tests.tiny_models import (
    BAICHUAN,
    CHATGLM,
    LLAMA,
    MISTRAL,
    PHI3,
    QWEN2,
    QWEN3,
    SMOLLM3,
    VOCAB_SIZE,
    TensorCheckpoint,
)

MAX_CONTEXT = 640  # attention works on 256 tokens at a time: this takes three such chunks
MAX_ROWS = 96
EMBEDDING = "model.embed_tokens.weight"

MODELS: dict[str, dict[str, Any]] = {
    "llama": LLAMA | {"hidden_size": 72, "intermediate_size": 90, "num_attention_heads": 6, "head_dim": 16},
    "llama-tied": LLAMA
    | {"hidden_size": 50, "intermediate_size": 67, "num_attention_heads": 2, "head_dim": 64}
    | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "qwen3": QWEN3 | {"hidden_size": 48, "intermediate_size": 50, "num_attention_heads": 4, "head_dim": 40},
    "smollm3": SMOLLM3
    | {"hidden_size": 64, "intermediate_size": 80, "no_rope_layers": [0, 1], "tie_word_embeddings": True},
    "phi3": PHI3 | {"hidden_size": 64, "intermediate_size": 60, "sliding_window": 60, "partial_rotary_factor": 0.75},
    "baichuan": BAICHUAN | {"hidden_size": 60, "intermediate_size": 70, "num_attention_heads": 6},
    "chatglm": CHATGLM
    | {"hidden_size": 40, "ffn_hidden_size": 50, "num_attention_heads": 4, "kv_channels": 24, "rope_ratio": 2},
    "mistral": MISTRAL
    | {"hidden_size": 48, "intermediate_size": 100, "num_attention_heads": 4, "head_dim": 32}
    | {"num_key_value_heads": 1, "sliding_window": 43},
    "qwen2": QWEN2
    | {"hidden_size": 56, "intermediate_size": 66, "num_attention_heads": 3, "head_dim": 80}
    | {"num_key_value_heads": 1, "use_sliding_window": True, "sliding_window": 300, "max_window_layers": 1},
}
for _config in MODELS.values():
    _config.update(num_hidden_layers=2, max_position_embeddings=MAX_CONTEXT)
MODELS["chatglm"].update(num_layers=2, seq_length=MAX_CONTEXT)


def make_tensors(name: str) -> dict[str, torch.Tensor]:
    """Random tensors, exact in bfloat16."""
    random = np.random.default_rng(list(name.encode()))
    family = find_family(MODELS[name])
    places = family.weight_targets(family.read_config(MODELS[name]))
    return {tensor: _random(tensor, place.shape, random) for tensor, place in places.items()}


def make_checkpoint(name: str, **changes: torch.Tensor) -> TensorCheckpoint:
    return TensorCheckpoint(MODELS[name], {**make_tensors(name), **changes})


def load_native(
    library: NativeLibrary,
    name: str,
    precision: PrecisionOption = "bf16",
    *,
    isa: int | None = None,
    threads: int = 1,
    num_blocks: int = 160,
    block_size: int = 16,
    max_rows: int = MAX_ROWS,
    checkpoint: Checkpoint | None = None,
) -> NativeBackend:
    spec = ModelSpec(name=name, precision=precision, build_seq=MAX_CONTEXT, build_batch=8, num_blocks=num_blocks)
    checkpoint = checkpoint or make_checkpoint(name)
    engine = EngineConfig(threads=threads, max_num_batched_tokens=max_rows, block_size=block_size)
    return NativeBackend(library if isa is None else library._replace(isa=isa), make_plan(checkpoint, spec, engine))


def random_ids(length: int, *, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, VOCAB_SIZE, length).tolist()


def _random(name: str, shape: tuple[int, ...], random: np.random.Generator) -> torch.Tensor:
    values = torch.from_numpy(random.standard_normal(shape).astype(np.float32))
    scaled = 1 + 0.1 * values if name.endswith("norm.weight") else 0.15 * values
    return scaled.to(torch.bfloat16).float()
