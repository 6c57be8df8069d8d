from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest
import torch

from brlite.backends.torch.parameters import allocate_parameters
from brlite.errors import ModelError
from brlite.models.config import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    ModelConfig,
    YarnScaling,
    kv_bytes_per_token,
)
from brlite.models.network import num_parameters, weight_bytes
from brlite.models.precision import MatrixForm
from brlite.models.registry import FAMILIES, find_family
from tests.tiny_models import (
    BAICHUAN,
    CHATGLM,
    LLAMA,
    LLAMA3,
    MISTRAL,
    PHI3,
    QWEN2,
    QWEN3,
    SMOLLM3,
    TINY_CONFIGS,
    YARN,
    tiny_tensors,
)

CHATGLM_ALIAS = "ChatGLMForConditionalGeneration"
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "Baichuan2-7B": (
        BAICHUAN
        | {"vocab_size": 125696, "hidden_size": 4096, "intermediate_size": 11008}
        | {"num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 4096},
        7_505_973_248,
    ),
    "ChatGLM3-6B": (
        CHATGLM
        | {"padded_vocab_size": 65024, "hidden_size": 4096, "ffn_hidden_size": 13696, "num_layers": 28}
        | {"num_attention_heads": 32, "kv_channels": 128, "seq_length": 8192},
        6_243_584_000,
    ),
    "Qwen3-0.6B": (
        QWEN3
        | {"vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28}
        | {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True},
        596_049_920,
    ),
    "SmolLM3-3B": (
        SMOLLM3
        | {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36}
        | {"num_attention_heads": 16, "num_key_value_heads": 4, "no_rope_layers": None, "tie_word_embeddings": True},
        3_075_098_624,
    ),
    "Phi-3-mini-4k": (
        PHI3
        | {"vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32}
        | {"num_attention_heads": 32, "num_key_value_heads": 32, "sliding_window": 2047},
        3_821_079_552,
    ),
}


def read(config: dict[str, Any]) -> ModelConfig:
    return find_family(config).read_config(config)


def test_family_is_found_by_the_whole_name_of_the_architecture() -> None:
    families = [find_family(config).model_type for config in (LLAMA, MISTRAL, QWEN2)]

    assert families == ["llama", "mistral", "qwen2"]


def test_family_is_found_by_model_type_where_no_architecture_is_named() -> None:
    assert find_family({"model_type": "qwen2"}).architecture == "Qwen2ForCausalLM"


def test_a_family_may_have_several_architectures() -> None:
    families = [find_family({**CHATGLM, "architectures": [name]}) for name in (CHATGLM_ALIAS, "ChatGLMModel")]

    assert families[0] is families[1]


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "LlamaForTokenClassification", "Qwen2MoeForCausalLM"])
def test_unknown_architecture_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(ModelError) as refusal:
        find_family({"architectures": [name], "model_type": "llama"})

    assert name in str(refusal.value)
    assert all(family.architecture in str(refusal.value) for family in FAMILIES)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", None),
        ("hidden_size", "64"),
        ("hidden_size", True),
        ("hidden_size", 0),
        ("num_attention_heads", 4.5),
        ("num_attention_heads", 3),
        ("num_key_value_heads", 3),
        ("vocab_size", -1),
        ("vocab_size", 10**12),
        ("num_hidden_layers", 10**9),
        ("architectures", "LlamaForCausalLM"),
        ("rms_norm_eps", "small"),
        ("rope_theta", float("nan")),
        ("hidden_act", "gelu"),
        ("tie_word_embeddings", "yes"),
        ("rope_scaling", [1]),
        ("rope_scaling", {"type": "longrope", "factor": 2.0}),
        ("rope_scaling", {"type": "linear"}),
        ("rope_scaling", {"type": "linear", "factor": 0}),
        ("quantization_config", {"quant_method": "gptq"}),
    ],
)
def test_bad_value_is_refused_by_the_name_of_its_key(key: str, value: object) -> None:
    with pytest.raises(ModelError) as refusal:
        read({**LLAMA, key: value})

    assert key in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "change", [{"hidden_size": 5120, "num_attention_heads": 40}, {"max_position_embeddings": None}]
)
def test_baichuan_13b_is_refused_by_name_for_its_alibi(change: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"Baichuan 13B has ALiBi .* not supported; Baichuan2 7B is"):
        read({**BAICHUAN, **change})


def test_a_scaled_head_is_never_the_embedding() -> None:
    with pytest.raises(ModelError, match="tie_word_embeddings must be false"):
        read({**BAICHUAN, "tie_word_embeddings": True})


def test_chatglm_sizes_are_read_by_its_own_words() -> None:
    config = read({**CHATGLM, "rope_ratio": 50})

    assert (config.num_layers, config.intermediate_size, config.vocab_size, config.max_context) == (3, 96, 300, 128)
    assert (config.num_kv_heads, config.head_dim, config.rms_norm_eps, config.qkv_bias) == (2, 16, 1e-5, True)
    assert (config.rope.rotary_dim, config.rope.theta, config.rope.interleaved) == (8, 500_000.0, True)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("kv_channels", None),
        ("multi_query_group_num", 3),
        ("multi_query_attention", False),
        ("rmsnorm", False),
        ("add_bias_linear", True),
        ("apply_residual_connection_post_layernorm", True),
        ("quantization_bit", 4),
        ("pre_seq_len", 128),
    ],
)
def test_chatglm_of_another_make_is_refused_by_the_name_of_its_key(key: str, value: object) -> None:
    with pytest.raises(ModelError) as refusal:
        read({**CHATGLM, key: value})

    assert key in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"no_rope_layers": [1, 0, 1]}, (1,)),
        ({"no_rope_layers": None, "no_rope_layer_interval": 2}, (1,)),
        ({"no_rope_layers": None, "no_rope_layer_interval": None}, ()),
        ({"no_rope_layers": None, "no_rope_layer_interval": None, "num_hidden_layers": 9}, (3, 7)),
    ],
)
def test_layers_without_positions_are_those_that_the_config_says(
    change: dict[str, Any], expected: tuple[int, ...]
) -> None:
    assert read({**SMOLLM3, **change}).nope_layers == expected


@pytest.mark.parametrize(
    ("config", "key", "value"),
    [
        (SMOLLM3, "no_rope_layers", [1, 0]),
        (SMOLLM3, "no_rope_layers", [1, 0, 2]),
        (SMOLLM3, "no_rope_layers", 4),
        (SMOLLM3, "use_sliding_window", True),
        (QWEN3, "attention_bias", "yes"),
        (PHI3, "sliding_window", 0),
        (PHI3, "rope_scaling", {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}),
    ],
)
def test_what_a_newer_family_cannot_do_is_refused_by_the_name_of_its_key(
    config: dict[str, Any], key: str, value: object
) -> None:
    with pytest.raises(ModelError, match=key):
        read({**config, key: value})


def test_head_dim_comes_from_the_config_or_from_the_division() -> None:
    assert read(LLAMA).head_dim == 16
    assert read({**LLAMA, "head_dim": 24}).head_dim == 24


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        (None, None),
        ({"type": "default"}, None),
        ({"type": "linear", "factor": 4.0}, LinearScaling(4.0)),
        ({"rope_type": "linear", "factor": 4}, LinearScaling(4.0)),
        ({"type": "dynamic", "factor": 2.0}, DynamicScaling(2.0, 128)),
        (LLAMA3, Llama3Scaling(8.0, 1.0, 4.0, 32)),
        (YARN, YarnScaling(4.0, 32, 1.1386294361119891, 32.0, 1.0, True)),
        ({**YARN, "attention_factor": 1.5, "truncate": False}, YarnScaling(4.0, 32, 1.5, 32.0, 1.0, False)),
    ],
)
def test_rope_scaling_is_read_from_old_configs_and_new_ones(scaling: dict[str, Any] | None, expected: object) -> None:
    old = read({**LLAMA, "rope_scaling": scaling, "rope_theta": 5000.0}).rope
    new = read({**LLAMA, "rope_theta": None, "rope_parameters": {**(scaling or {}), "rope_theta": 5000.0}}).rope

    assert old == new
    assert (old.theta, old.scaling) == (5000.0, expected)


def test_stretched_rope_allows_a_longer_context() -> None:
    stretched = read({**QWEN2, "max_position_embeddings": 32, "rope_scaling": YARN})

    assert read(QWEN2).max_context == 128
    assert stretched.max_context == 128


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LLAMA, [None, None, None]),
        (MISTRAL, [None, None, None]),
        ({**MISTRAL, "sliding_window": 11}, [11, 11, 11]),
        ({key: value for key, value in MISTRAL.items() if key != "sliding_window"}, [4096, 4096, 4096]),
        (QWEN2, [None, None, None]),
        (TINY_CONFIGS["qwen2-window"], [None, 11, 11]),
        ({**TINY_CONFIGS["qwen2-window"], "max_window_layers": 0}, [11, 11, 11]),
        (TINY_CONFIGS["qwen2-layer-types"], [11, None, 11]),
    ],
)
def test_sliding_window_is_in_the_layers_that_the_config_says(
    config: dict[str, Any], expected: list[int | None]
) -> None:
    read_config = read(config)

    assert [read_config.window(layer) for layer in range(3)] == expected


@pytest.mark.parametrize("layer_types", [["full_attention"], ["chunked_attention"] * 3, "sliding_attention"])
def test_layer_types_that_cannot_be_meant_are_refused(layer_types: object) -> None:
    with pytest.raises(ModelError, match="layer_types"):
        read({**TINY_CONFIGS["qwen2-window"], "layer_types": layer_types})


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_parameters_are_counted_as_the_checkpoint_holds_them(name: str) -> None:
    tensors = tiny_tensors(name)

    assert num_parameters(read(TINY_CONFIGS[name])) == sum(tensor.numel() for tensor in tensors.values())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_the_published_number_of_parameters(name: str) -> None:
    config, expected = PUBLISHED[name]

    assert num_parameters(read(config)) == expected


@pytest.mark.parametrize("name", ["llama", "llama-tied", "llama-biases", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("form", [None, "int8", "int8_f16", "int4", "int4_min", "int4_zero"])
def test_weight_bytes_are_those_that_are_allocated(name: str, dtype: torch.dtype, form: MatrixForm | None) -> None:
    config = read(TINY_CONFIGS[name])
    matrices = (f"layers.{layer}.{each}.weight" for layer in range(2) for each in ("qkv", "o", "gate_up", "down"))
    forms = {} if form is None else dict.fromkeys(matrices, form)

    counted = weight_bytes(config, dtype.itemsize, forms)

    parameters = allocate_parameters(config, dtype, torch.device("cpu"), forms)
    assert counted == parameters.num_bytes


def test_kv_bytes_of_a_token_are_known_by_arithmetic() -> None:
    config = read(LLAMA)

    sizes = [kv_bytes_per_token(config, dtype) for dtype in ("float32", "bfloat16", "int8")]

    assert sizes == [3 * 2 * 2 * 16 * 4, 3 * 2 * 2 * 16 * 2, 3 * 2 * 2 * (16 + 4)]


def test_a_config_is_judged_without_importing_torch() -> None:
    code = "import sys, brlite.models, brlite.models.config; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("value", [10**400, -1, 0, 1e308, 1e-320, float("inf"), float("nan"), True, "1", [[[]]] * 3])
@pytest.mark.parametrize("key", ["rope_theta", "rms_norm_eps", "factor"])
def test_a_number_that_nothing_can_be_computed_with_is_refused_in_one_line(key: str, value: object) -> None:
    change = {"rope_scaling": {"type": "linear", key: value}} if key == "factor" else {key: value}

    with pytest.raises(ModelError, match=f"{key} must be a number from") as caught:
        read({**LLAMA, **change})

    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"head_dim": 2, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type must be other than dynamic"),
        ({"rope_theta": 1.0, "rope_scaling": YARN}, "rope_theta must be other than 1 with yarn, got 1.0"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, "high_freq_factor must be above low_freq_factor (4)"),
    ],
)
def test_rope_scaling_that_would_divide_by_zero_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=re.escape(words)):
        read({**LLAMA, **change})


def test_rope_parameters_of_each_kind_of_layer_are_refused() -> None:
    full = {"rope_type": "default", "rope_theta": 5000.0}

    with pytest.raises(ModelError, match=r"rope_parameters\.full_attention must be one value"):
        read({**LLAMA, "rope_theta": None, "rope_parameters": {"full_attention": full, "sliding_attention": full}})


def test_a_config_without_an_architecture_says_so() -> None:
    with pytest.raises(ModelError, match="architectures is missing"):
        find_family({"hidden_size": 64})


def test_the_name_of_a_quantizer_is_cut_and_escaped_in_the_error() -> None:
    config = LLAMA | {"quantization_config": {"quant_method": "\x1b[2J" + "x" * 10**6}}

    with pytest.raises(ModelError, match="is read with safetensors only") as refusal:
        find_family(config).read_config(config)

    assert str(refusal.value).isprintable()
    assert len(str(refusal.value)) < 300


def test_rope_scaling_that_a_user_adds_to_a_new_config_counts() -> None:
    saved = {"rope_type": "default", "rope_theta": 5000.0}

    rope = read({**LLAMA, "rope_theta": None, "rope_parameters": saved, "rope_scaling": YARN}).rope

    assert rope.theta == 5000.0
    assert isinstance(rope.scaling, YarnScaling)
