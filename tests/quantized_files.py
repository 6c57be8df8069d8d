"""Tiny GGUF models whose matrices are quantized in several ways, as llama.cpp mixes them within a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Kind

from tests.checkpoint.model_files import write_gguf
from tests.tiny_models import VOCAB_SIZE

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, LAYERS = 256, 4, 2, 64, 512, 2
METADATA: dict[str, Any] = {
    ".context_length": 640,
    ".embedding_length": HIDDEN,
    ".block_count": LAYERS,
    ".feed_forward_length": INNER,
    ".attention.head_count": HEADS,
    ".attention.head_count_kv": KV_HEADS,
    ".rope.dimension_count": HEAD_DIM,
}
KV = KV_HEADS * HEAD_DIM
LAYER_SHAPES = {
    "attn_norm": (HIDDEN,),
    "attn_q": (HIDDEN, HIDDEN),
    "attn_k": (KV, HIDDEN),
    "attn_v": (KV, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN),
    "ffn_norm": (HIDDEN,),
    "ffn_gate": (INNER, HIDDEN),
    "ffn_up": (INNER, HIDDEN),
    "ffn_down": (HIDDEN, INNER),
}
# Mixes: the type of every matrix, and of those that differ. `default` is the default model's: tied, the head in 8 bits.
MIXES: dict[str, dict[str, str]] = {
    "q4_0": {"": "Q4_0", "output": "Q6_K"},
    "default": {"": "Q4_1", "token_embd": "Q8_0"},
    "q4_k_m": {"": "Q4_K", "attn_v": "Q6_K", "ffn_down": "Q6_K", "output": "Q6_K"},
    "mixed": {
        "": "Q4_0",
        "attn_k": "Q4_1",
        "ffn_up": "Q8_0",
        "ffn_down": "Q4_K",
        "output": "F16",
        "token_embd": "Q5_0",
    },
    "q8_0": {"": "Q8_0", "output": "Q8_0"},
    "iq4_xs": {"": "IQ4_XS", "attn_v": "IQ4_NL", "output": "Q6_K"},
    "iq4_nl": {"": "IQ4_NL", "ffn_down": "MXFP4", "token_embd": "IQ4_XS"},
    "mxfp4": {"": "MXFP4", "attn_v": "Q8_0", "output": "Q8_0"},
}
# Bytes of a block of those that are random here, and where its numbers in half precision are. MXFP4 has an exponent.
RANDOM_BLOCKS = {
    "Q4_K": (144, (0, 2)),
    "Q6_K": (210, (208,)),
    "IQ4_NL": (18, (0,)),
    "IQ4_XS": (136, (0,)),
    "MXFP4": (17, ()),
}
SUPER_BLOCKS = ("Q4_K", "Q6_K", "IQ4_XS")  # of 256 weights


def quantize(values: npt.NDArray[np.float32], kind: str, generator: np.random.Generator) -> npt.NDArray[Any]:
    """Rows in a type's blocks: of these values, or of any, where the package cannot make them."""
    if kind == "F16":
        return values.astype(np.float16)
    if kind not in RANDOM_BLOCKS:
        return gguf.quants.quantize(values, Kind[kind])
    num_bytes, halves = RANDOM_BLOCKS[kind]
    size = 256 if kind in SUPER_BLOCKS else 32
    blocks = generator.integers(0, 256, (len(values), values.shape[1] // size, num_bytes), dtype=np.uint8)
    if kind == "MXFP4":
        blocks[..., 0] = generator.integers(119, 123, blocks.shape[:2])  # scales from 2^-8 to 2^-5
    for at in halves:
        scales = generator.uniform(2e-5, 8e-5, blocks.shape[:2]) * (16 if at == 2 or size == 32 else 1)
        blocks[..., at : at + 2] = scales.astype("<f2")[..., None].view(np.uint8)
    return blocks.reshape(len(values), -1)


def write_quantized(file: Path, mix: Mapping[str, str]) -> Path:
    """A model of the types that a mix names."""
    generator = np.random.default_rng(5)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (VOCAB_SIZE, HIDDEN), "output_norm": (HIDDEN,)}
    if "output" in mix:
        shapes["output"] = (VOCAB_SIZE, HIDDEN)
    shapes |= {f"blk.{layer}.{name}": shape for layer in range(LAYERS) for name, shape in LAYER_SHAPES.items()}
    tensors = {}
    for name, shape in shapes.items():
        values = (0.1 * generator.standard_normal(shape)).astype(np.float32)
        kind = mix.get(name.rpartition(".")[2], mix[""])
        if len(shape) == 1:
            tensors[f"{name}.weight"] = (1 + values, Kind.F32)
        else:
            tensors[f"{name}.weight"] = (quantize(values, kind, generator), Kind[kind])
    return write_gguf(file, tensors, metadata=METADATA)
