"""What `auto` comes to, and how the log and `brlite check` say it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

import pytest

from brlite.checkpoint.checked_model import CheckedModel, settle_precision
from brlite.checkpoint.load_plan import describe_precision, matrix_parts
from brlite.config.options import ModelSpec
from brlite.models.network import MatrixPart, list_parameters
from brlite.models.precision import PRECISIONS, Precision, PrecisionName, PrecisionOption
from brlite.models.registry import find_family

PLAIN = {"norm": "F32", "a": "BF16", "b": "F16"}
MIXED = {"norm": "F32", "a": "Q4_K", "b": "Q6_K", "c": "Q5_K"}
MATRICES = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}


def stored_model(mix: Mapping[str, str], option: PrecisionOption = "auto", **changes: Any) -> CheckedModel:
    """One layer, its matrices in the formats of `mix`, by their short names; "" are the others'."""
    config = CONFIG | changes
    family = find_family(config)
    model_config = family.read_config(config)
    targets = family.weight_targets(model_config)
    formats = {
        name: mix.get(name.split(".")[-2].removesuffix("_proj"), mix[""]) if len(target.shape) == 2 else "F32"
        for name, target in targets.items()
    }
    precision = settle_precision(option, formats)
    return CheckedModel(model_config, list_parameters(model_config), targets, set(), formats, precision)


def described(model: CheckedModel, option: PrecisionOption = "auto", *, is_native: bool = True, ranks: int = 1) -> str:
    spec = ModelSpec(name="m", precision=option, tensor_parallel=ranks)
    return describe_precision(model, spec, is_native=is_native, keeps_forms=is_native)


def test_what_no_file_has_quantized_is_bfloat16() -> None:
    assert settle_precision("auto", PLAIN) == PRECISIONS["bf16"]
    assert described(stored_model({"": "BF16"})) == "bf16, as no matrix of the files is quantized (auto)"


@pytest.mark.parametrize(
    ("is_native", "text"),
    [
        (True, "the file's own: Q4_K is kept, Q5_K is rounded to int8, Q6_K is kept, F16 is rounded to int8 (auto)"),
        (False, "bf16: torch widens the file's Q4_K, Q5_K, Q6_K (auto)"),
    ],
)
def test_a_quantized_file_is_kept_and_every_change_is_said(is_native: bool, text: str) -> None:
    model = stored_model({"": "Q4_K", "v": "Q6_K", "down": "Q5_K", "lm_head": "F16"})

    assert settle_precision("auto", MIXED) == Precision("stored", "bfloat16")
    assert described(model, is_native=is_native) == text


def test_a_four_bit_file_with_tables_is_kept() -> None:
    model = stored_model({"": "IQ4_XS", "v": "IQ4_NL", "down": "MXFP4"}, head_dim=32)

    assert matrix_parts(model)["layers.0.qkv.weight"] == (MatrixPart("iq4_xs", 96), MatrixPart("iq4_nl", 32))
    assert described(model) == "the file's own: IQ4_XS is kept, IQ4_NL is kept, MXFP4 is kept (auto)"


def test_a_matrix_that_becomes_int8_for_a_border_within_sixteen_rows_is_not_said_to_be_kept() -> None:
    """Heads of 24 rows: k begins at row 48, a multiple of 16, and v at row 72."""
    model = stored_model({"": "Q4_0", "v": "Q4_1"}, head_dim=24)

    assert matrix_parts(model)["layers.0.qkv.weight"] == (MatrixPart("int8", 96),)
    assert described(model) == (
        "the file's own: Q4_0 is rounded to int8 in 2 of 8 matrices, else kept, Q4_1 is rounded to int8 (auto)"
    )


def test_a_border_at_a_multiple_of_sixteen_rows_keeps_both_formats() -> None:
    model = stored_model({"": "Q4_0", "k": "Q4_1", "v": "Q4_1"}, head_dim=24)

    assert matrix_parts(model)["layers.0.qkv.weight"] == (MatrixPart("int4", 48), MatrixPart("int4_min", 48))
    assert described(model) == "the file's own: Q4_0 is kept, Q4_1 is kept (auto)"


def test_a_border_that_only_ranks_have_is_told_too() -> None:
    """A rank has one query head of 24 rows."""
    model = stored_model({"": "Q4_0", "k": "Q4_1", "v": "Q4_1"}, head_dim=24, num_key_value_heads=2)

    assert described(model) == "the file's own: Q4_0 is kept, Q4_1 is kept (auto)"
    assert described(model, ranks=2) == (
        "the file's own: Q4_0 is rounded to int8 in 1 of 7 matrices, else kept, Q4_1 is rounded to int8 (auto)"
    )


def test_a_head_that_is_scaled_on_its_way_is_said_to_be_rounded() -> None:
    model = stored_model({"": "Q4_0"}, architectures=["BaichuanForCausalLM"], num_key_value_heads=2)

    text = "the file's own: Q4_0 is rounded to int8 in 1 of 7 matrices, else kept (auto)"
    assert described(model) == text


def test_int8_activations_keep_a_quantized_file_and_round_others_to_int8() -> None:
    assert settle_precision("a_int8_w_int8", PLAIN) == Precision("int8", "bfloat16", has_int8_activations=True)
    assert settle_precision("a_int8_w_int8", MIXED) == Precision("stored", "bfloat16", has_int8_activations=True)
    assert described(stored_model({"": "Q8_0"}, "a_int8_w_int8"), "a_int8_w_int8") == (
        "the file's own: Q8_0 is kept (a_int8_w_int8, set by precision)"
    )


def test_four_bits_are_kept_and_all_others_rounded_but_the_head() -> None:
    model = stored_model(
        {"": "Q4_K", "v": "Q6_K", "down": "Q8_0", "gate": "F16", "up": "F16"}, "a_bf16_w_int4", head_dim=32
    )
    plain = stored_model({"": "BF16"}, "a_bf16_w_int4")

    parts = matrix_parts(model)
    assert parts["layers.0.qkv.weight"] == (MatrixPart("q4_k", 96), MatrixPart("int4_min", 32))
    assert parts["layers.0.down.weight"] == (MatrixPart("int4_min", 256),)
    assert parts["head.weight"] == (MatrixPart("q4_k", 64),)
    assert described(model, "a_bf16_w_int4") == (
        "the file's own: Q4_K is kept, Q6_K is rounded to 4 bits, Q8_0 is rounded to 4 bits, F16 is rounded to 4 bits "
        "(a_bf16_w_int4, set by precision)"
    )
    assert {name: part.form for name, (part,) in matrix_parts(plain).items()} == {
        "layers.0.qkv.weight": "int4_min",
        "layers.0.o.weight": "int4_min",
        "layers.0.gate_up.weight": "int4_min",
        "layers.0.down.weight": "int4_min",
        "head.weight": "int8",
    }
    assert described(plain, "a_bf16_w_int4") == "a_bf16_w_int4, set by precision"


@pytest.mark.parametrize("name", get_args(PrecisionName))
def test_a_precision_of_the_manual_means_the_same_for_every_file(name: PrecisionOption) -> None:
    assert settle_precision(name, MIXED) == settle_precision(name, PLAIN) == PRECISIONS[name]
    assert described(stored_model({"": "Q4_K"}, name), name) == f"{name}, set by precision"
