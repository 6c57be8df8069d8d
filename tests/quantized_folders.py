"""Tiny quantized folders in the layouts of AutoGPTQ, AutoAWQ, compressed-tensors and FP8, written from their formulas.

Each matrix is made as codes, scales and zero points, from which come the tensors of the layout and, in float64, the
numbers that they stand for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from brlite.checkpoint.stored_tensor import to_bfloat16
from tests.quantized_files import HEAD_DIM, HEADS, HIDDEN, INNER, KV, KV_HEADS, LAYERS
from tests.tiny_models import LLAMA, VOCAB_SIZE

Array = npt.NDArray[Any]
GROUP = 64
CONFIG = LLAMA | {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "head_dim": HEAD_DIM,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "rope_theta": 50000.0,
    "max_position_embeddings": 640,
}
LAYER: dict[str, tuple[int, int]] = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}


DTYPES = {  # what a numpy type stands for in these tests
    "float32": "F32",
    "float16": "F16",
    "uint16": "BF16",
    "int32": "I32",
    "int64": "I64",
    "int8": "I8",
    "uint8": "F8_E4M3",
}


class Case(NamedTuple):
    """A kind of folder: its `quantization_config`, and how a matrix [R, C] becomes tensors and float64 numbers."""

    config: dict[str, Any]
    quantize: Callable[[tuple[int, int], np.random.Generator], tuple[dict[str, Array], Array]]
    stored_as: str  # the format's name


def write_folder(folder: Path, case: Case, **config: Any) -> dict[str, Array]:
    """Write the folder; give its weights as float64, in the names of a plain one."""
    generator = np.random.default_rng(11)
    expected: dict[str, Array] = {
        "model.embed_tokens.weight": (0.1 * generator.standard_normal((VOCAB_SIZE, HIDDEN))).astype(np.float16),
        "lm_head.weight": (0.1 * generator.standard_normal((VOCAB_SIZE, HIDDEN))).astype(np.float16),
    }
    layers = [f"model.layers.{layer}" for layer in range(LAYERS)]
    norms = [f"{layer}.{norm}_layernorm" for layer in layers for norm in ("input", "post_attention")]
    expected |= {f"{norm}.weight": np.ones(HIDDEN, np.float16) for norm in ("model.norm", *norms)}
    tensors = dict(expected)
    for layer in layers:
        for name, shape in LAYER.items():
            parts, values = case.quantize(shape, generator)
            tensors |= {f"{layer}.{name}.{part}": array for part, array in parts.items()}
            expected[f"{layer}.{name}.weight"] = values
    folder.mkdir(exist_ok=True)
    save_tensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": case.config | config}))
    return {name: values.astype(np.float64) for name, values in expected.items()}


def save_tensors(file: Path, tensors: Mapping[str, Array]) -> None:
    """safetensors' own writer has no bfloat16 and no FP8 for numpy."""
    header: dict[str, Any] = {}
    begin = 0
    for name, array in tensors.items():
        end = begin + array.nbytes
        header[name] = {"dtype": DTYPES[array.dtype.name], "shape": array.shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    data = b"".join(np.ascontiguousarray(array).tobytes() for array in tensors.values())
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def load_tensors(file: Path) -> dict[str, Array]:
    """What `save_tensors` wrote."""
    content = file.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    types = {dtype: name for name, dtype in DTYPES.items()}
    return {
        name: np.frombuffer(content[begin:][slice(*entry["data_offsets"])], types[entry["dtype"]])
        .reshape(entry["shape"])
        .copy()
        for name, entry in json.loads(content[8:begin]).items()
    }


def e4m3(codes: Array) -> Array:
    """The numbers of bytes in E4M3, in float64."""
    exponent, mantissa = (codes >> 3 & 15).astype(int), (codes & 7).astype(int)
    magnitude = np.where(exponent > 0, np.ldexp(8.0 + mantissa, exponent - 10), np.ldexp(1.0 * mantissa, -9))
    return np.where(codes > 127, -magnitude, magnitude)


# Every code of a number, from the lowest number to the highest.
E4M3_CODES = np.array([*range(0xFE, 0x7F, -1), *range(0x7F)], np.uint8)


def packed(codes: Array, num_bits: int, order: tuple[int, ...] | None = None) -> Array:
    """Codes [..., N] as words of 32 bits [..., N / 8 or 4], in which they stand in `order`, the lowest bits first."""
    per_word = 32 // num_bits
    words = codes.reshape(*codes.shape[:-1], -1, per_word).astype(np.uint32)
    result = np.zeros(words.shape[:-1], np.uint32)
    for place, index in enumerate(order or range(per_word)):
        result |= words[..., index] << np.uint32(num_bits * place)
    return result.view(np.int32)


def make_scales(shape: tuple[int, int], generator: np.random.Generator) -> Array:
    """Of half precision, and of bfloat16, too: 8 bits."""
    return (generator.integers(128, 256, shape) / 2.0**15).astype(np.float16)


def gptq(num_bits: int = 4, *, sym: bool = True, act_order: bool = False, version: int = 1) -> Case:
    def quantize(shape: tuple[int, int], generator: np.random.Generator) -> tuple[dict[str, Array], Array]:
        (outputs, inputs), top = shape, 2**num_bits
        codes = generator.integers(0, top, shape)
        scales = make_scales((outputs, inputs // GROUP), generator) / np.float16(1 if num_bits == 4 else 16)
        zeros = np.full(scales.shape, top // 2) if sym else generator.integers(0, top, scales.shape)
        groups = np.arange(inputs) // GROUP
        if act_order:
            groups = generator.permutation(groups)
        parts = {
            "qweight": packed(codes, num_bits).T,
            "qzeros": packed((zeros.T - (version == 1)) % top, num_bits),
            "scales": scales.T,
            "g_idx": groups.astype(np.int32),
        }
        return parts, (codes - zeros[:, groups]) * scales.astype(np.float64)[:, groups]

    config = {"quant_method": "gptq", "bits": num_bits, "group_size": GROUP, "sym": sym, "desc_act": act_order}
    if version == 2:
        config["checkpoint_format"] = "gptq_v2"
    name = f"GPTQ {num_bits}-bit" + ("" if sym else " with zero points") + (" in act-order" if act_order else "")
    return Case(config, quantize, name)


def awq() -> Case:
    def quantize(shape: tuple[int, int], generator: np.random.Generator) -> tuple[dict[str, Array], Array]:
        (outputs, inputs), order = shape, (0, 2, 4, 6, 1, 3, 5, 7)
        codes = generator.integers(0, 16, shape)
        scales = make_scales((outputs, inputs // GROUP), generator)
        zeros = generator.integers(0, 16, scales.shape)
        parts = {"qweight": packed(codes.T, 4, order), "qzeros": packed(zeros.T, 4, order), "scales": scales.T}
        groups = np.arange(inputs) // GROUP
        return parts, (codes - zeros[:, groups]) * scales.astype(np.float64)[:, groups]

    config = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
    return Case(config, quantize, "AWQ 4-bit with zero points")


def compressed(num_bits: int = 4, *, symmetric: bool = True, group_size: int = GROUP) -> Case:
    """pack-quantized, with scales in bfloat16."""

    def quantize(shape: tuple[int, int], generator: np.random.Generator) -> tuple[dict[str, Array], Array]:
        (outputs, inputs), middle = shape, 2 ** (num_bits - 1)
        size = inputs if group_size == -1 else group_size
        values = generator.integers(-middle, middle, shape)
        scales = make_scales((outputs, inputs // size), generator) / np.float16(1 if num_bits == 4 else 16)
        zeros = np.zeros(scales.shape, int) if symmetric else generator.integers(-middle, middle, scales.shape)
        parts = {
            "weight_packed": packed(values + middle, num_bits),
            "weight_scale": to_bfloat16(scales.astype(np.float32)),
            "weight_shape": np.array(shape, np.int64),
        }
        if not symmetric:
            parts["weight_zero_point"] = packed((zeros + middle).T, num_bits).T
        return parts, (values - zeros.repeat(size, axis=1)) * scales.astype(np.float64).repeat(size, axis=1)

    strategy = {"strategy": "channel"} if group_size == -1 else {"strategy": "group", "group_size": group_size}
    weights = {"num_bits": num_bits, "type": "int", "symmetric": symmetric, **strategy}
    name = f"compressed-tensors {num_bits}-bit" + ("" if symmetric else " with zero points")
    return Case(compressed_config("pack-quantized", weights), quantize, name)


def compressed_config(name: str, weights: dict[str, Any]) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": name, "config_groups": groups, "ignore": ["lm_head"]}


def int8_channels() -> Case:
    """int-quantized: what W8A8 models are."""

    def quantize(shape: tuple[int, int], generator: np.random.Generator) -> tuple[dict[str, Array], Array]:
        values = generator.integers(-128, 128, shape)
        scales = make_scales((shape[0], 1), generator) / np.float16(16)
        return {"weight": values.astype(np.int8), "weight_scale": scales}, values * scales.astype(np.float64)

    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    return Case(compressed_config("int-quantized", weights), quantize, "compressed-tensors 8-bit")


def fp8(kind: str) -> Case:
    """Scales by tensor, by output (compressed-tensors) or by blocks of 48 x 32 (as DeepSeek names them)."""

    def quantize(shape: tuple[int, int], generator: np.random.Generator) -> tuple[dict[str, Array], Array]:
        wanted = 64 * generator.standard_normal(shape)
        codes = E4M3_CODES[np.searchsorted(e4m3(E4M3_CODES), wanted)]
        blocks = {"tensor": (1, 1), "channel": (shape[0], 1), "block": (-(-shape[0] // 48), -(-shape[1] // 32))}[kind]
        scales = generator.uniform(1e-4, 5e-4, blocks).astype(np.float32)
        wide = scales.astype(np.float64)
        if kind == "block":
            wide = wide.repeat(48, axis=0)[: shape[0]].repeat(32, axis=1)[:, : shape[1]]
        stored = scales.reshape(()) if kind == "tensor" else scales
        name = "weight_scale_inv" if kind == "block" else "weight_scale"
        parts = {"weight": codes, name: stored, "input_scale": np.ones((), np.float32)}
        return parts, e4m3(codes) * wide

    config: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    if kind == "block":
        config["weight_block_size"] = [48, 32]
    if kind == "channel":
        config = compressed_config("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"})
    return Case(config, quantize, "FP8")


CASES: dict[str, Case] = {
    "gptq": gptq(),
    "gptq-zeros": gptq(sym=False),
    "gptq-v2": gptq(sym=False, version=2),
    "gptq-8": gptq(8),
    "gptq-8-zeros": gptq(8, sym=False),
    "gptq-act-order": gptq(act_order=True),
    "awq": awq(),
    "compressed-4": compressed(),
    "compressed-4-zeros": compressed(symmetric=False),
    "compressed-4-small": compressed(group_size=16)._replace(stored_as="compressed-tensors 4-bit in groups of 16"),
    "compressed-8": compressed(8, group_size=-1),
    "int8": int8_channels(),
    "fp8-tensor": fp8("tensor"),
    "fp8-channel": fp8("channel"),
    "fp8-block": fp8("block"),
}
