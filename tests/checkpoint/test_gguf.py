"""GGUF files read as Hugging Face checkpoints: every type, every name, llama.cpp's order of rows undone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from brlite.checkpoint import open_checkpoint
from brlite.checkpoint.gguf_header import read_gguf_header
from brlite.llm import LLM
from brlite.models.registry import find_family
from brlite.sampling_params import SamplingParams
from tests.checkpoint.model_files import (
    HEAD_DIM,
    HEADS,
    HIDDEN_SIZE,
    KV_HEADS,
    VOCAB_SIZE,
    random_gguf_tensors,
    write_gguf,
)
from tests.load_plans import read_tensors

F32 = GGMLQuantizationType.F32
QUANTIZED_BY_THE_PACKAGE = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4")
READ_ONLY_TYPES = (
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S", "IQ1_M"),
    *("IQ4_NL", "IQ4_XS"),
)


def interleaved(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp's order: row `j` of a head's first half beside row `j` of its second half."""
    out = np.empty_like(rows)
    half = len(rows) // num_heads // 2
    for head in range(num_heads):
        for j in range(half):
            begin = head * 2 * half
            out[begin + 2 * j] = rows[begin + j]
            out[begin + 2 * j + 1] = rows[begin + half + j]
    return out


def read(file: Path) -> dict[str, np.ndarray]:
    return read_tensors(open_checkpoint(file))


def test_tensors_get_the_names_of_hugging_face(tmp_path: Path) -> None:
    tensors = random_gguf_tensors()

    found = read(write_gguf(tmp_path / "m.gguf"))

    assert {name: found[name].tolist() for name in found if ".q_proj." not in name and ".k_proj." not in name} == {
        "model.embed_tokens.weight": tensors["token_embd.weight"][0].tolist(),
        "model.layers.0.input_layernorm.weight": tensors["blk.0.attn_norm.weight"][0].tolist(),
        "model.layers.0.self_attn.v_proj.weight": tensors["blk.0.attn_v.weight"][0].tolist(),
        "model.layers.0.self_attn.o_proj.weight": tensors["blk.0.attn_output.weight"][0].tolist(),
        "model.layers.0.post_attention_layernorm.weight": tensors["blk.0.ffn_norm.weight"][0].tolist(),
        "model.layers.0.mlp.gate_proj.weight": tensors["blk.0.ffn_gate.weight"][0].tolist(),
        "model.layers.0.mlp.up_proj.weight": tensors["blk.0.ffn_up.weight"][0].tolist(),
        "model.layers.0.mlp.down_proj.weight": tensors["blk.0.ffn_down.weight"][0].tolist(),
        "model.norm.weight": tensors["output_norm.weight"][0].tolist(),
        "lm_head.weight": tensors["output.weight"][0].tolist(),
    }


def test_llama_rows_of_q_and_k_are_put_back_in_order(tmp_path: Path) -> None:
    tensors = random_gguf_tensors()
    q, k = tensors["blk.0.attn_q.weight"][0], tensors["blk.0.attn_k.weight"][0]
    q_bias = np.arange(HEADS * HEAD_DIM, dtype=np.float32)
    tensors["blk.0.attn_q.weight"] = (interleaved(q, HEADS), F32)
    tensors["blk.0.attn_k.weight"] = (interleaved(k, KV_HEADS), F32)
    tensors["blk.0.attn_q.bias"] = (interleaved(q_bias, HEADS), F32)

    found = read(write_gguf(tmp_path / "m.gguf", tensors))

    assert np.array_equal(found["model.layers.0.self_attn.q_proj.weight"], q)
    assert np.array_equal(found["model.layers.0.self_attn.k_proj.weight"], k)
    assert np.array_equal(found["model.layers.0.self_attn.q_proj.bias"], q_bias)


def test_qwen2_rows_are_in_order_already(tmp_path: Path) -> None:
    tensors = random_gguf_tensors()
    bias = np.arange(KV_HEADS * HEAD_DIM, dtype=np.float32)
    tensors["blk.0.attn_k.bias"] = (bias, F32)

    found = read(write_gguf(tmp_path / "m.gguf", tensors, architecture="qwen2"))

    expected = tensors["blk.0.attn_k.weight"][0]
    assert np.array_equal(found["model.layers.0.self_attn.k_proj.weight"], expected)
    assert np.array_equal(found["model.layers.0.self_attn.k_proj.bias"], bias)


def test_qwen3_has_norms_of_heads(tmp_path: Path) -> None:
    tensors = random_gguf_tensors()
    norms = {name: np.arange(HEAD_DIM, dtype=np.float32) + start for name, start in (("q_norm", 1), ("k_norm", 2))}
    tensors |= {f"blk.0.attn_{name}.weight": (norm, F32) for name, norm in norms.items()}

    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors, architecture="qwen3"))

    found = read_tensors(checkpoint)
    family = find_family(checkpoint.config)
    assert family.model_type == "qwen3"
    assert {
        name: place.shape for name, place in family.weight_targets(family.read_config(checkpoint.config)).items()
    } == (checkpoint.shapes())
    assert all(np.array_equal(found[f"model.layers.0.self_attn.{name}.weight"], norms[name]) for name in norms)


@pytest.mark.parametrize("type_name", QUANTIZED_BY_THE_PACKAGE)
def test_a_quantized_tensor_comes_back_as_the_package_reads_it(type_name: str, tmp_path: Path) -> None:
    kind = GGMLQuantizationType[type_name]
    values = np.random.default_rng(3).standard_normal((7, 256)).astype(np.float32)
    stored = gguf.quants.quantize(values, kind)
    tensors = random_gguf_tensors() | {"blk.0.ffn_down.weight": (stored, kind)}

    found = read(write_gguf(tmp_path / "m.gguf", tensors))["model.layers.0.mlp.down_proj.weight"]

    assert found.dtype == np.float32
    assert np.array_equal(found, gguf.quants.dequantize(stored, kind))
    cosine = (found * values).sum() / (np.linalg.norm(found) * np.linalg.norm(values))
    assert cosine > 0.65  # ternary types are this coarse


@pytest.mark.parametrize("type_name", READ_ONLY_TYPES)
def test_types_that_the_package_only_reads_are_read(type_name: str, tmp_path: Path) -> None:
    kind = GGMLQuantizationType[type_name]
    block_elements, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    # Bytes below 0x3C make every float16 scale in a block a finite one.
    stored = np.random.default_rng(4).integers(0, 0x3C, (5, 512 // block_elements * block_bytes), dtype=np.uint8)
    tensors = random_gguf_tensors() | {"blk.0.ffn_down.weight": (stored, kind)}

    found = read(write_gguf(tmp_path / "m.gguf", tensors))["model.layers.0.mlp.down_proj.weight"]

    assert found.shape == (5, 512)
    assert np.array_equal(found, gguf.quants.dequantize(stored, kind))


def test_a_large_tensor_is_dequantized_in_pieces_that_fit_together(tmp_path: Path) -> None:
    values = np.random.default_rng(5).standard_normal((3001, 416)).astype(np.float32)  # more than one chunk, uneven
    stored = gguf.quants.quantize(values, GGMLQuantizationType.Q8_0)
    tensors = random_gguf_tensors() | {"token_embd.weight": (stored, GGMLQuantizationType.Q8_0)}

    found = read(write_gguf(tmp_path / "m.gguf", tensors))["model.embed_tokens.weight"]

    expected = gguf.quants.dequantize(stored, GGMLQuantizationType.Q8_0)
    assert np.array_equal(found, expected)


def test_metadata_becomes_a_config(tmp_path: Path) -> None:
    tokens = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}

    config = open_checkpoint(write_gguf(tmp_path / "m.gguf", metadata=tokens)).config

    assert config.pop("rms_norm_eps") == pytest.approx(1e-5)
    assert config == {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "rope_theta": 50000.0,
        "max_position_embeddings": 128,
        "vocab_size": VOCAB_SIZE,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({".attention.sliding_window": 32}, {"model_type": "mistral", "sliding_window": 32}),
        ({".rope.freq_base": None}, {"rope_theta": 10000.0}),
        ({".attention.head_count_kv": None, ".attention.head_count": 2, ".rope.dimension_count": 32}, {"head_dim": 32}),
        ({".rope.dimension_count": None, ".attention.key_length": 16}, {"head_dim": 16}),
        ({"tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.eot_token_id": 9}, {"eos_token_id": [2, 9]}),
        ({"tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.eot_token_id": 2}, {"eos_token_id": 2}),
        (
            {".rope.scaling.type": "linear", ".rope.scaling.factor": 4.0},
            {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        ),
        ({".rope.scale_linear": 2.0}, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
        (
            {
                ".rope.scaling.type": "yarn",
                ".rope.scaling.factor": 4.0,
                ".rope.scaling.original_context_length": 32,
                ".rope.scaling.finetuned": True,
            },
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
        ),
    ],
)
def test_a_twist_of_the_metadata_reaches_the_config(
    metadata: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    tensors = random_gguf_tensors()
    if ".attention.head_count_kv" in metadata:
        tensors["blk.0.attn_k.weight"] = tensors["blk.0.attn_q.weight"]

    config = open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors, metadata=metadata)).config

    assert {key: config[key] for key in expected} == expected


def test_a_qwen2_window_is_switched_on_for_every_layer(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", architecture="qwen2", metadata={".attention.sliding_window": 16})

    config = open_checkpoint(file).config

    assert (config["model_type"], config["sliding_window"]) == ("qwen2", 16)
    assert (config["use_sliding_window"], config["max_window_layers"]) == (True, 0)


def test_without_an_output_matrix_the_embeddings_are_tied(tmp_path: Path) -> None:
    tensors = random_gguf_tensors()
    del tensors["output.weight"]

    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors))

    assert checkpoint.config["tie_word_embeddings"] is True
    assert "lm_head.weight" not in checkpoint.shapes()


def test_llama3_rope_frequencies_become_the_parameters_that_made_them(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    reference = LlamaConfig(
        hidden_size=512,
        num_attention_heads=4,
        head_dim=128,
        max_position_embeddings=131072,
        rope_parameters={**scaling, "rope_theta": 500000.0},
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](reference, torch.device("cpu"))
    plain = 500000.0 ** -(torch.arange(0, 128, 2) / 128)
    freqs = (plain / scaled).numpy().astype(np.float32)
    generator = np.random.default_rng(6)
    tensors = random_gguf_tensors() | {
        "blk.0.attn_q.weight": (generator.standard_normal((512, HIDDEN_SIZE)).astype(np.float32), F32),
        "blk.0.attn_k.weight": (generator.standard_normal((256, HIDDEN_SIZE)).astype(np.float32), F32),
        "rope_freqs.weight": (freqs, F32),
    }
    metadata = {".rope.freq_base": 500000.0, ".rope.dimension_count": 128, ".attention.key_length": 128}

    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors, metadata=metadata))

    assert checkpoint.config["rope_scaling"] == scaling
    assert "rope_freqs.weight" not in checkpoint.shapes()


def test_rope_frequencies_that_divide_by_one_are_no_scaling(tmp_path: Path) -> None:
    tensors = random_gguf_tensors() | {"rope_freqs.weight": (np.ones(HEAD_DIM // 2, np.float32), F32)}

    config = open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors)).config

    assert "rope_scaling" not in config


def test_the_header_reads_what_the_package_wrote(tmp_path: Path) -> None:
    metadata = {"a.text": "äöü 你好", "a.list": ["x", "", "🙂"], "a.numbers": [1, -2, 3], "a.flag": True, "a.real": 0.5}

    header = read_gguf_header(write_gguf(tmp_path / "m.gguf", metadata=metadata), with_texts=True)

    found = {key: header.metadata[key] for key in metadata}
    assert found.pop("a.numbers").tolist() == metadata.pop("a.numbers")
    assert found == metadata
    assert {tensor.name: tensor.shape for tensor in header.tensors}["token_embd.weight"] == (VOCAB_SIZE, HIDDEN_SIZE)


def test_the_size_on_disk_counts_quantized_bytes(tmp_path: Path) -> None:
    tensors = random_gguf_tensors()
    stored = gguf.quants.quantize(tensors["output.weight"][0], GGMLQuantizationType.Q8_0)

    checkpoint = open_checkpoint(
        write_gguf(tmp_path / "m.gguf", tensors | {"output.weight": (stored, GGMLQuantizationType.Q8_0)})
    )

    unquantized = sum(math.prod(shape) * 4 for name, shape in checkpoint.shapes().items() if name != "lm_head.weight")
    assert checkpoint.num_bytes == unquantized + stored.nbytes


@pytest.mark.model
def test_the_default_model_opens_with_all_its_tensors(smollm2_path: Path) -> None:
    checkpoint = open_checkpoint(smollm2_path)

    shapes = checkpoint.shapes()

    assert checkpoint.config["num_hidden_layers"] == 30
    assert shapes["model.embed_tokens.weight"] == (49152, 576)
    assert len(shapes) == 2 + 9 * 30


def test_a_file_without_the_ending_is_known_by_its_first_bytes(tmp_path: Path) -> None:
    shapes = open_checkpoint(write_gguf(tmp_path / "m.gguf")).shapes()

    blob = (tmp_path / "m.gguf").rename(tmp_path / "sha256-0a1b")

    assert open_checkpoint(blob).shapes() == shapes


@pytest.mark.model
def test_such_a_file_is_served(smollm2_path: Path, tmp_path: Path) -> None:
    if smollm2_path.is_dir():
        pytest.skip("the default model on this machine is a folder")
    (tmp_path / "sha256-0a1b").symlink_to(smollm2_path)

    with LLM(model=tmp_path / "sha256-0a1b") as llm:
        (output,) = llm.generate("The sea is", SamplingParams(temperature=0, max_tokens=4))

    assert len(output.outputs[0].token_ids) == 4
