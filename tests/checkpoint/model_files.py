"""Writes tiny models in every format, for the tests of this room. The numbers mean nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np

if TYPE_CHECKING:
    import torch

    Tensors = Mapping[str, torch.Tensor]

CONFIG = {"model_type": "llama", "hidden_size": 8}

HIDDEN_SIZE, HEADS, KV_HEADS, HEAD_DIM, FEED_FORWARD, VOCAB_SIZE = 64, 4, 2, 16, 96, 40
GGUF_METADATA: dict[str, Any] = {
    "context_length": 128,
    "embedding_length": HIDDEN_SIZE,
    "block_count": 1,
    "feed_forward_length": FEED_FORWARD,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.dimension_count": HEAD_DIM,
    "rope.freq_base": 50000.0,
}
GGUF_SHAPES = {
    "token_embd.weight": (VOCAB_SIZE, HIDDEN_SIZE),
    "blk.0.attn_norm.weight": (HIDDEN_SIZE,),
    "blk.0.attn_q.weight": (HEADS * HEAD_DIM, HIDDEN_SIZE),
    "blk.0.attn_k.weight": (KV_HEADS * HEAD_DIM, HIDDEN_SIZE),
    "blk.0.attn_v.weight": (KV_HEADS * HEAD_DIM, HIDDEN_SIZE),
    "blk.0.attn_output.weight": (HIDDEN_SIZE, HEADS * HEAD_DIM),
    "blk.0.ffn_norm.weight": (HIDDEN_SIZE,),
    "blk.0.ffn_gate.weight": (FEED_FORWARD, HIDDEN_SIZE),
    "blk.0.ffn_up.weight": (FEED_FORWARD, HIDDEN_SIZE),
    "blk.0.ffn_down.weight": (HIDDEN_SIZE, FEED_FORWARD),
    "output_norm.weight": (HIDDEN_SIZE,),
    "output.weight": (VOCAB_SIZE, HIDDEN_SIZE),
}

GgufTensors = dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType]]


def random_tensors() -> dict[str, torch.Tensor]:
    import torch

    generator = torch.Generator().manual_seed(1)
    return {
        "model.embed_tokens.weight": torch.randn(6, 8, generator=generator),
        "model.norm.weight": torch.randn(8, generator=generator).half(),
        "lm_head.weight": torch.randn(6, 8, generator=generator).bfloat16(),
    }


def write_config(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def write_safetensors(folder: Path, tensors: Tensors) -> Path:
    from safetensors.torch import save_file

    save_file(dict(tensors), write_config(folder) / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_bin(folder: Path, tensors: Tensors) -> Path:
    import torch

    torch.save(dict(tensors), write_config(folder) / "pytorch_model.bin")
    return folder


def write_sharded_safetensors(folder: Path, tensors: Tensors) -> Path:
    from safetensors.torch import save_file

    write_config(folder)
    files = _shard_names(tensors, "model-{:05d}-of-{:05d}.safetensors")
    for name, file in files.items():
        save_file({name: tensors[name]}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return folder


def write_sharded_bin(folder: Path, tensors: Tensors) -> Path:
    import torch

    write_config(folder)
    files = _shard_names(tensors, "pytorch_model-{:05d}-of-{:05d}.bin")
    for name, file in files.items():
        torch.save({name: tensors[name]}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    return folder


def _shard_names(tensors: Tensors, pattern: str) -> dict[str, str]:
    return {name: pattern.format(i + 1, len(tensors)) for i, name in enumerate(tensors)}


def random_gguf_tensors() -> GgufTensors:
    generator = np.random.default_rng(2)
    f32 = gguf.GGMLQuantizationType.F32
    return {name: (generator.standard_normal(shape).astype(np.float32), f32) for name, shape in GGUF_SHAPES.items()}


def write_gguf(
    file: Path,
    tensors: GgufTensors | None = None,
    *,
    architecture: str = "llama",
    metadata: Mapping[str, Any] = {},
    part_tensors: int = 0,
) -> Path:
    """Write a GGUF file. Keys of `metadata` that begin with a dot are the architecture's; None leaves a key out.

    With `part_tensors` it is split into parts of so many tensors; returns the first one.
    """
    own = {f"{architecture}.{key}": value for key, value in GGUF_METADATA.items()}
    given = {architecture + key if key.startswith(".") else key: value for key, value in metadata.items()}
    writer = gguf.GGUFWriter(file, architecture, split_max_tensors=part_tensors)
    for key, value in (own | given).items():
        if value is not None:
            _add(writer, key, value)
    for name, (data, kind) in (random_gguf_tensors() if tensors is None else tensors).items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return min(file.parent.glob(f"{file.stem}-00001-of-*")) if part_tensors else file


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    adders = {bool: "add_bool", int: "add_uint32", float: "add_float32", str: "add_string", list: "add_array"}
    getattr(writer, adders[type(value)])(key, value)
