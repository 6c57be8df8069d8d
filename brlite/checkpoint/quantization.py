"""Reads the `quantization_config` of a model's config.json: which tool quantized its matrices, and how.

GPTQ (AutoGPTQ, GPTQModel), AWQ (AutoAWQ), compressed-tensors (llm-compressor) and FP8. Scales of activations and of KV
caches are not read: brlite does not quantize those by the file's scales. `quantized_matrix.py` reads the tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from brlite.errors import ModelError
from brlite.files.quoting import excerpt
from brlite.models.families.hf_config import QUANTIZATION_KEY, ConfigReader
from brlite.models.precision import MatrixForm

METHODS = ("gptq", "awq", "compressed-tensors", "fp8", "fbgemm_fp8")
COMPRESSED_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
ZERO_POINTS, ACT_ORDER = " with zero points", " in act-order"

# A format's name → the form in memory that keeps its codes. Other formats, such as FP8, are rounded to int8.
FOLDER_FORMS: dict[str, MatrixForm] = {
    "GPTQ 4-bit": "int4",
    f"GPTQ 4-bit{ZERO_POINTS}": "int4_zero",
    "GPTQ 8-bit": "int8_f16",
    f"AWQ 4-bit{ZERO_POINTS}": "int4_zero",
    "compressed-tensors 4-bit": "int4",
    f"compressed-tensors 4-bit{ZERO_POINTS}": "int4_zero",
    "compressed-tensors 8-bit": "int8_f16",
}


class Quantization(msgspec.Struct, frozen=True, kw_only=True):
    """How the matrices of a folder are quantized. A matrix that lacks the tensors of the method's layouts is plain.

    `group_size` inputs of a row share a scale; 0: all inputs of the row. The file stores a zero point minus
    `zero_point_bias`. A scale of FP8 is for a block of `block_rows` x `group_size`, unless the scales' shape shows that
    it is for a row or for the whole matrix.
    """

    method: Literal["GPTQ", "AWQ", "compressed-tensors", "FP8"]
    num_bits: int = 8
    group_size: int = 0
    is_symmetric: bool = True
    has_act_order: bool = False
    zero_point_bias: int = 0
    block_rows: int = 1


def read_quantization(config: Mapping[str, Any]) -> Quantization | None:
    """The quantization of a folder with this config.json; None where it has none.

    Raises `ModelError` for one that cannot be read, with the key and what is allowed.
    """
    if config.get(QUANTIZATION_KEY) is None:
        return None
    section = ConfigReader(config).section(QUANTIZATION_KEY)
    method = section.text("quant_method", "unknown")
    match method:
        case "gptq":
            return _gptq(section)
        case "awq":
            _choose(section, "version", ("gemm", "GEMM"), "gemm")
            _choose(section, "zero_point", (True,), True)
            _choose(section, "backend", ("autoawq",), "autoawq")
            num_bits = int(_choose(section, "bits", (4,)))
            return Quantization(method="AWQ", num_bits=num_bits, group_size=_group_size(section), is_symmetric=False)
        case "compressed-tensors":
            return _compressed_tensors(section)
        case "fp8" | "fbgemm_fp8":
            _choose(section, "fmt", ("e4m3",), "e4m3")
            return _fp8(section, "weight_block_size")
    raise ModelError(
        f"model config: {QUANTIZATION_KEY} ({excerpt(method)}) is not supported; allowed are {', '.join(METHODS)}, "
        "or the model's plain or GGUF weights"
    )


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the same model without quantization."""
    return {key: value for key, value in config.items() if key != QUANTIZATION_KEY}


def _gptq(section: ConfigReader) -> Quantization:
    checkpoint_format = _choose(section, "checkpoint_format", ("gptq", "gptq_v2"), section.text("format", "gptq"))
    if "dynamic" in section and not all(name.startswith("-") for name in section.section("dynamic")):
        raise section.error("dynamic", "a list of modules that are left out (-:…)", "other settings for some modules")
    if section.flag("is_marlin_format", False):
        raise section.error("is_marlin_format", "false", True)
    group_size = _group_size(section)
    has_act_order = section.flag("desc_act", False) and not section.flag("static_groups", False) and group_size > 0
    return Quantization(
        method="GPTQ",
        num_bits=int(_choose(section, "bits", (4, 8))),
        group_size=group_size,
        is_symmetric=section.flag("sym", True),
        has_act_order=has_act_order,
        zero_point_bias=1 if checkpoint_format == "gptq" else 0,
    )


def _compressed_tensors(section: ConfigReader) -> Quantization:
    _choose(section, "format", COMPRESSED_FORMATS)
    _choose(section, "quantization_status", ("compressed",), "compressed")
    _choose(section.section("sparsity_config"), "format", ("dense",), "dense")
    if "transform_config" in section and len(section.section("transform_config")):
        raise section.error("transform_config", "left out", "transforms of activations")
    groups = section.section("config_groups")
    found = set()
    for weights in (groups.section(name).section("weights") for name in groups):
        if _choose(weights, "type", ("int", "float"), "int") == "float":
            _choose(weights, "num_bits", (8,))
            _choose(weights, "strategy", ("channel", "tensor", "block"))
            found.add(_fp8(weights, "block_structure"))
            continue
        strategy = _choose(weights, "strategy", ("group", "channel", "tensor"))
        act_orders = (True, False, "group", "dynamic", "weight", "static")
        quantization = Quantization(
            method="compressed-tensors",
            num_bits=int(_choose(weights, "num_bits", (4, 8))),
            group_size=_group_size(weights) if strategy == "group" else 0,
            is_symmetric=weights.flag("symmetric", True),
            has_act_order=_choose(weights, "actorder", act_orders, False) in (True, "group", "dynamic"),
        )
        found.add(quantization)
    if len(found) != 1:
        raise section.error("config_groups", "alike in how their weights are quantized", f"{len(found)} kinds")
    return found.pop()


def _group_size(section: ConfigReader) -> int:
    """The inputs that share a scale; 0 for a whole row, which the config writes as -1."""
    if section.value("group_size") == -1:
        return 0
    return section.positive_int("group_size")


def _fp8(section: ConfigReader, key: str) -> Quantization:
    """FP8 with the block that `key` gives: [rows, columns] or "128x128", by default 128 x 128."""
    value = section.value(key)
    sizes = (128, 128) if value is None else value.split("x") if isinstance(value, str) else value
    try:
        rows, columns = (int(size) for size in sizes)
        if not 0 < rows < 2**31 or not 0 < columns < 2**31:
            raise ValueError
    except (TypeError, ValueError, OverflowError):  # the last one for infinity
        raise section.error(key, "two numbers of rows and columns", value) from None
    return Quantization(method="FP8", group_size=columns, block_rows=rows)


def _choose(section: ConfigReader, key: str, allowed: tuple[Any, ...], default: Any = None) -> Any:
    """The value of a key, which must be among those allowed."""
    value = section.value(key)
    value = default if value is None else value
    if not any(value == each and type(value) is type(each) for each in allowed):
        raise section.error(key, " or ".join(map(str, allowed)), value)
    return value
