"""Folders that GPTQ, AWQ, compressed-tensors or FP8 have quantized: the numbers, and what is refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from brlite.checkpoint import open_checkpoint
from brlite.checkpoint.checked_model import check_model
from brlite.checkpoint.load_plan import NATIVE_FORMS, describe_precision
from brlite.checkpoint.quantization import FOLDER_FORMS, Quantization
from brlite.checkpoint.quantized_matrix import E4M3_VALUES, Fp8Matrix, Int8Matrix
from brlite.checkpoint.safetensors import TensorEntry
from brlite.checkpoint.stored_tensor import StoredTensor
from brlite.config.options import ModelSpec
from brlite.errors import ModelError
from tests.load_plans import read_tensors
from tests.quantized_folders import (
    CASES,
    DTYPES,
    Array,
    awq,
    compressed,
    fp8,
    gptq,
    load_tensors,
    save_tensors,
    write_folder,
)

Q_PROJ = "model.layers.0.self_attn.q_proj"


def decoded(tensor: StoredTensor) -> Array:
    """What a tensor's codes stand for, in float64."""
    coded = tensor.coded()
    codes, form = coded.codes.astype(np.float64), FOLDER_FORMS[tensor.format.name]
    scales = coded.scales.view(np.float16).astype(np.float64).repeat(32, axis=1)
    if form == "int8_f16":
        return coded.codes.view(np.int8) * scales
    assert coded.codes.max() < 16
    if form == "int4":
        return (codes - 8) * scales
    assert coded.offsets is not None
    return (codes - coded.offsets.view(np.float16).astype(np.float64).repeat(32, axis=1)) * scales


@pytest.mark.parametrize("name", CASES)
def test_a_folder_holds_the_numbers_that_its_tool_dequantizes(name: str, tmp_path: Path) -> None:
    expected = write_folder(tmp_path / "m", CASES[name])

    checkpoint = open_checkpoint(tmp_path / "m")
    found = read_tensors(checkpoint)
    shapes = checkpoint.shapes()

    assert found.keys() == expected.keys() == shapes.keys()
    for each, values in expected.items():
        assert np.array_equal(found[each], values.astype(np.float32)), each
        assert shapes[each] == values.shape


@pytest.mark.parametrize("name", CASES)
def test_codes_and_scales_are_the_numbers_exactly_where_a_form_keeps_them(name: str, tmp_path: Path) -> None:
    expected = write_folder(tmp_path / "m", CASES[name])

    checkpoint = open_checkpoint(tmp_path / "m")
    formats = checkpoint.formats()
    for tensor in checkpoint.tensors():
        if formats[tensor.name] in NATIVE_FORMS:
            assert np.array_equal(decoded(tensor), expected[tensor.name]), tensor.name

    assert formats[f"{Q_PROJ}.weight"] == CASES[name].stored_as


@pytest.mark.parametrize("name", ["gptq-zeros", "gptq-act-order", "awq", "compressed-4-zeros", "fp8-block"])
def test_rows_and_columns_can_be_read_alone(name: str, tmp_path: Path) -> None:
    expected = write_folder(tmp_path / "m", CASES[name])

    checkpoint = open_checkpoint(tmp_path / "m")
    for tensor in checkpoint.tensors():
        if tensor.name.startswith(Q_PROJ):
            part = tensor.part(range(13, 75), range(32, 96)).float32()
            assert np.array_equal(part, expected[tensor.name][13:75, 32:96].astype(np.float32))


def test_tensors_of_a_matrix_may_lie_in_two_shards(tmp_path: Path) -> None:
    expected = write_folder(tmp_path / "m", awq())
    tensors = load_tensors(tmp_path / "m/model.safetensors")
    (tmp_path / "m/model.safetensors").unlink()
    files = {name: f"{'b' if name.endswith('scales') else 'a'}.safetensors" for name in tensors}
    for file in set(files.values()):
        save_tensors(tmp_path / "m" / file, {name: tensors[name] for name in tensors if files[name] == file})
    (tmp_path / "m/model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))

    checkpoint = open_checkpoint(tmp_path / "m")
    found = read_tensors(checkpoint)

    assert all(np.array_equal(found[name], values.astype(np.float32)) for name, values in expected.items())


def test_every_byte_is_the_number_that_e4m3_has() -> None:
    torch = pytest.importorskip("torch")
    expected = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()

    assert np.array_equal(E4M3_VALUES, expected, equal_nan=True)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("gptq", "GPTQ 4-bit is kept"),
        ("gptq-act-order", "GPTQ 4-bit in act-order is rounded to int8"),
        ("awq", "AWQ 4-bit with zero points is kept"),
        ("gptq-8-zeros", "GPTQ 8-bit with zero points is rounded to int8"),
        ("compressed-4-small", "compressed-tensors 4-bit in groups of 16 is rounded to int8"),
        ("int8", "compressed-tensors 8-bit is kept"),
        ("fp8-block", "FP8 is rounded to int8"),
    ],
)
def test_what_becomes_of_each_format_is_said(name: str, text: str, tmp_path: Path) -> None:
    write_folder(tmp_path / "m", CASES[name])
    spec = ModelSpec(name="m", build_seq=16)

    checkpoint = open_checkpoint(tmp_path / "m")
    model = check_model(checkpoint, spec)

    said = describe_precision(model, spec, is_native=True)
    assert said == f"the file's own: {text}, F16 is rounded to int8 (auto)"
    assert (
        describe_precision(model, spec, is_native=False, keeps_forms=False)
        == f"bf16: torch widens the file's {CASES[name].stored_as} (auto)"
    )


def test_scales_that_are_not_used_or_are_rounded_are_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    write_folder(tmp_path / "m", fp8("tensor"))
    write_folder(tmp_path / "n", compressed())
    change(tmp_path / "n", f"{Q_PROJ}.weight_scale", lambda scales: np.full(scales.shape, 1 / 3, np.float32))

    for name in "mn":
        checkpoint = open_checkpoint(tmp_path / name)
        read_tensors(checkpoint)

    assert "m: 14 scales of activations and caches are not used" in caplog.text
    assert "n: 1024 scales are rounded to half precision where codes are kept" in caplog.text


def change(folder: Path, name: str, edit: Callable[[Array], Array | None]) -> None:
    """Replace a tensor of the folder, or leave it out."""
    tensors = load_tensors(folder / "model.safetensors")
    changed = edit(tensors.pop(name))
    save_tensors(folder / "model.safetensors", tensors if changed is None else tensors | {name: changed})


def weights_with(**changes: Any) -> dict[str, Any]:
    weights = compressed().config["config_groups"]["group_0"]["weights"]
    return {"config_groups": {"group_0": {"weights": weights | changes}}}


@pytest.mark.parametrize(
    ("case", "config", "message"),
    [
        (
            gptq(),
            {"quant_method": "bitsandbytes"},
            "quantization_config ('bitsandbytes') is not supported; allowed",
        ),
        (gptq(), {"quant_method": 7}, "quantization_config.quant_method must be a string"),
        (gptq(), {"bits": 3}, "quantization_config.bits must be 4 or 8, got 3"),
        (gptq(), {"bits": None}, "quantization_config.bits must be 4 or 8, got None"),
        (gptq(), {"group_size": 0}, "quantization_config.group_size must be an integer from 1"),
        (gptq(), {"group_size": 2**70}, "quantization_config.group_size must be an integer from 1"),
        (gptq(), {"checkpoint_format": "marlin"}, "quantization_config.checkpoint_format must be gptq or gptq_v2"),
        (
            gptq(),
            {"dynamic": {"+:.*": {"bits": 8}}},
            "quantization_config.dynamic must be a list of modules that are left",
        ),
        (awq(), {"version": "gemv"}, "quantization_config.version must be gemm"),
        (awq(), {"zero_point": False}, "quantization_config.zero_point must be True"),
        (compressed(), {"format": "nvfp4-pack-quantized"}, "quantization_config.format must be pack-quantized or"),
        (compressed(), {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config.format must be dense"),
        (compressed(), {"transform_config": {"a": 1}}, "quantization_config.transform_config must be left out"),
        (compressed(), weights_with(num_bits=2), "weights.num_bits must be 4 or 8, got 2"),
        (compressed(), weights_with(strategy="tensor_group"), "weights.strategy must be group or channel"),
        (compressed(), {"config_groups": {}}, "quantization_config.config_groups must be alike"),
        (fp8("block"), {"weight_block_size": [128]}, "quantization_config.weight_block_size must be two numbers"),
        (
            fp8("block"),
            {"weight_block_size": [float("inf"), 1]},
            "quantization_config.weight_block_size must be two numbers",
        ),
        (fp8("block"), {"fmt": "e5m2"}, "quantization_config.fmt must be e4m3, got 'e5m2'"),
    ],
)
def test_a_quantization_that_is_not_known_is_refused_by_its_key(
    case: Any, config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_folder(tmp_path / "m", case, **config)

    with pytest.raises(ModelError) as error:
        open_checkpoint(tmp_path / "m")

    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("case", "part", "edit", "message"),
    [
        (gptq(), "qzeros", lambda _: None, "'model.layers.0.self_attn.q_proj.weight' is quantized, but has no qzeros"),
        (gptq(), "scales", lambda scales: scales[:1], "scales of 'model.layers.0.self_attn.q_proj.weight' has shape"),
        (gptq(), "scales", lambda scales: scales.astype(np.int32), "has dtype 'I32'; allowed are F32 or F16 or BF16"),
        (gptq(), "scales", lambda scales: scales * np.float16(np.inf), "has a scale that is not finite"),
        (gptq(), "scales", lambda scales: scales.astype(np.float32) * 1e9, "has a scale beyond half precision"),
        (
            fp8("tensor"),
            "weight_scale",
            lambda scale: np.full_like(scale, 1e38),
            "has a scale that is not finite, or makes its weights so",
        ),
        (gptq(), "qzeros", lambda zeros: zeros + 1, "has zero points beside 8, but its config says symmetric"),
        (gptq(), "g_idx", lambda groups: groups[::-1].copy(), "has inputs in act-order, which its config does not say"),
        (gptq(act_order=True), "g_idx", lambda groups: groups + 1, "has a g_idx beyond its 4 groups"),
        (gptq(act_order=True), "g_idx", lambda _: None, "is quantized, but has no g_idx"),
        (gptq(), "qweight", lambda _: None, "q_proj.qzeros' has dtype 'I32'; allowed are F32, F16 and BF16, and"),
        (awq(), "qweight", lambda words: words[:, :-1], "qzeros of"),
        (compressed(), "weight_shape", lambda shape: shape + 1, "has weight_shape [257, 257], and [256, 256] codes"),
        (compressed(), "weight_packed", lambda words: words.reshape(-1), "must be a matrix, not of shape [8192]"),
        (compressed(symmetric=False), "weight_zero_point", lambda _: None, "but has no weight_zero_point"),
        (fp8("tensor"), "weight_scale", lambda _: None, "but has no weight_scale"),
        (fp8("block"), "weight_scale_inv", lambda scales: scales[:-1], "weight_scale_inv of"),
    ],
)
def test_a_damaged_matrix_is_refused_in_one_line(
    case: Any, part: str, edit: Callable[[Array], Array | None], message: str, tmp_path: Path
) -> None:
    write_folder(tmp_path / "m", case)
    change(tmp_path / "m", f"{Q_PROJ}.{part}", edit)

    with pytest.raises(ModelError) as error:
        read_tensors(open_checkpoint(tmp_path / "m"))

    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_matrix_that_is_there_both_plain_and_quantized_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "m", gptq())
    file = tmp_path / "m/model.safetensors"
    save_tensors(file, load_tensors(file) | {f"{Q_PROJ}.weight": np.ones((256, 256), np.float16)})

    with pytest.raises(ModelError, match=r"q_proj\.weight' is there both plain and quantized"):
        open_checkpoint(tmp_path / "m")


def entries_of(arrays: dict[str, Array]) -> dict[str, TensorEntry]:
    """What the headers say of arrays."""
    return {
        name: TensorEntry(name, DTYPES[str(array.dtype)], array.shape, Path("m"), 0, array.nbytes)
        for name, array in arrays.items()
    }


def test_a_block_larger_than_any_matrix_takes_no_memory_of_its_size() -> None:
    quantization = Quantization(method="FP8", group_size=2**31 - 1, block_rows=2**31 - 1)
    arrays = {"weight": np.full((3, 32), 0x38, np.uint8), "weight_scale": np.full((1, 1), 2.5, np.float32)}

    tensor = Fp8Matrix("w", quantization, entries_of(arrays)).tensor(arrays)

    assert (tensor.float32() == 2.5).all()


@pytest.mark.parametrize("scale_shape", [(), (1, 1), (3,), (3, 1)])
@pytest.mark.parametrize("zero_shape", [(), (1,), (3,), (3, 1)])
def test_scales_and_zero_points_may_have_different_shapes(
    scale_shape: tuple[int, ...], zero_shape: tuple[int, ...]
) -> None:
    quantization = Quantization(method="compressed-tensors", is_symmetric=False)
    arrays: dict[str, Array] = {
        "weight": np.arange(96, dtype=np.int8).reshape(3, 32),
        "weight_scale": np.full(scale_shape, 0.5, np.float32),
        "weight_zero_point": np.full(zero_shape, 4, np.int8),
    }

    tensor = Int8Matrix("w", quantization, entries_of(arrays)).tensor(arrays)

    assert np.array_equal(tensor.float32(), (np.arange(96).reshape(3, 32) - 4) / 2)
