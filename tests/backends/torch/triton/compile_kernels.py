"""Compile kernels for cards that need not be there: `compile_kernels.py CAPABILITY:NAME …`, such as 90:merge.

Prints how often the code of each has some instructions, and its bytes of shared memory, as JSON. Not for Triton's
interpreter.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from brlite.backends.torch.graph_memory import MIN_SPLIT
from brlite.backends.torch.triton.attention import attention_kernel, merge_kernel
from brlite.backends.torch.triton.multiply import gated_kernel, multiply_kernel
from brlite.backends.torch.triton.rope import store_heads_kernel
from brlite.backends.torch.triton.rows import add_norm_kernel, take_draws_kernel

SHARED_MEMORY = {80: 166_912, 86: 101_376, 90: 232_448}  # bytes that a program may have, by compute capability
INSTRUCTIONS = ("wgmma.mma_async", "mma.sync", "fma.rn.bf16x2")
# What arguments are, by their names; a kernel's other arguments are constants, None where they are not given.
POINTERS = {
    "*bf16": "x bias query",
    "*fp32": "scales up_scales hidden product weight qkv query_norm key_norm cos sin key_scales value_scales parts "
    "part_best part_weight",
    "*i64": "drawn",
    "*i32": "token_ids sources positions slots tables tile_seqs tile_firsts starts lengths first_rows",
}
ALIGNED = {"num_outputs": "i32", "num_inputs": "i32", "stride": "i32", "segment": "i32", "size": "i32"}
NUMBERS = {"num_rows": "i32", "num_singles": "i32", "table_width": "i32", "epsilon": "fp32", "softmax_scale": "fp32"}

FEW_ROWS = {"IS_EVEN": True, "BLOCK_OUTPUTS": 64, "BLOCK_ROWS": 16, "BLOCK_INPUTS": 128, "STAGES": 4}
MANY_ROWS = {"IS_EVEN": True, "BLOCK_OUTPUTS": 128, "BLOCK_ROWS": 128, "BLOCK_INPUTS": 64, "STAGES": 3}
PART = {"IS_PART": True, "HAS_SEGMENTS": False}
SEGMENTS = {"IS_PART": False, "HAS_SEGMENTS": True}
HEADS = {"NUM_HEADS": 32, "NUM_KV_HEADS": 8, "HEAD_DIM": 128, "BLOCK_DIM": 128}
ATTENTION = {**HEADS, "WINDOW": 0, "BLOCK_SIZE": 16, "BLOCK_KEYS": 64, "SPLIT": MIN_SPLIT, "STAGES": 2}
LARGE_HEADS = {**ATTENTION, "HEAD_DIM": 256, "BLOCK_DIM": 256, "BLOCK_KEYS": 32, "STAGES": 1}  # where 64 do not fit
MANY_GATED = {**MANY_ROWS, "BLOCK_OUTPUTS": 64, "BLOCK_ROWS": 256, "HAS_BIAS": True}
STORED = {**HEADS, "NUM_PARTS": 2, "ROTARY_DIM": 128, "IS_INTERLEAVED": False, "HAS_BIAS": False, "HAS_NORM": True}
NO_SCALES = {"scales": None}
WORDS = {"values": "*i32", "up_values": "*i32"}
HALVES = {"scales": "*i32", "up_scales": "*i32"}  # pairs of numbers in half precision
MATRIX = {"values": "*bf16", "out": "*fp32"}
INT8_PAGES = {"keys": "*i8", "values": "*i8"}

# Of each: the kernel, types of arguments that its other uses have otherwise, its constants, its warps.
KERNELS: dict[str, tuple[Any, dict[str, str], dict[str, Any], int]] = {
    "multiply few": (multiply_kernel, MATRIX, {**FEW_ROWS, **PART, **NO_SCALES, "FORM": "bfloat16"}, 4),
    "multiply many": (multiply_kernel, MATRIX, {**MANY_ROWS, **SEGMENTS, **NO_SCALES, "FORM": "bfloat16"}, 4),
    "multiply few int8": (multiply_kernel, {**MATRIX, **WORDS}, {**FEW_ROWS, **PART, "FORM": "int8"}, 4),
    "multiply few int4": (
        multiply_kernel,
        {**MATRIX, **WORDS, **HALVES},
        {**FEW_ROWS, **PART, "FORM": "int4_zero"},
        4,
    ),
    "gated int4": (
        gated_kernel,
        {**WORDS, **HALVES, "out": "*bf16"},
        {**FEW_ROWS, "STAGES": 3, "FORM": "int4_min", "HAS_BIAS": True},
        4,
    ),
    "gated int8": (
        gated_kernel,
        {**WORDS, "out": "*bf16"},
        {**FEW_ROWS, "STAGES": 3, "FORM": "int8", "HAS_BIAS": True},
        4,
    ),
    "store heads int8": (store_heads_kernel, INT8_PAGES, {**STORED, "bias": None, "IS_INT8": True}, 1),
    "attention part int8": (
        attention_kernel,
        {**INT8_PAGES, "out": "*fp32"},
        {**ATTENTION, "IS_PART": True, "IS_INT8": True, "BLOCK_ROWS": 16},
        4,
    ),
    "attention int8": (
        attention_kernel,
        {**INT8_PAGES, "out": "*bf16"},
        {**ATTENTION, "IS_PART": False, "IS_INT8": True, "BLOCK_ROWS": 128, "part_best": None, "part_weight": None},
        8,
    ),
    "attention of large heads": (
        attention_kernel,
        {"keys": "*bf16", "values": "*bf16", "out": "*bf16"},
        {
            **LARGE_HEADS,
            **dict.fromkeys(("key_scales", "value_scales", "part_best", "part_weight")),
            "IS_PART": False,
            "IS_INT8": False,
            "BLOCK_ROWS": 128,
        },
        8,
    ),
    "gated many": (
        gated_kernel,
        {"values": "*bf16", "up_values": "*bf16", "out": "*bf16"},
        {**MANY_GATED, **NO_SCALES, "up_scales": None, "FORM": "bfloat16"},
        8,
    ),
    "take draws": (take_draws_kernel, {}, {"BLOCK": 256}, 4),
    "merge": (merge_kernel, {"out": "*bf16"}, {**HEADS, "WINDOW": 0, "SPLIT": MIN_SPLIT}, 1),
    "add norm": (
        add_norm_kernel,
        {"out": "*bf16"},
        {"NUM_PARTS": 4, "HAS_BIAS": True, "HAS_NORM": True, "BLOCK": 4096},
        8,
    ),
}


def compiled_for(capability: int, name: str) -> dict[str, int]:
    """How often the code of a kernel has each of `INSTRUCTIONS`, and its bytes of shared memory."""
    kernel, own_types, constants, num_warps = KERNELS[name]
    known = {argument: kind for kind, names in POINTERS.items() for argument in names.split()}
    types = {**known, **ALIGNED, **NUMBERS, **own_types}
    signature = {argument: "constexpr" if argument in constants else types[argument] for argument in kernel.arg_names}
    aligned = [
        index
        for index, (argument, kind) in enumerate(signature.items())
        if kind.startswith("*") or (argument in ALIGNED and kind != "constexpr")
    ]
    source = ASTSource(
        kernel,
        signature,
        constexprs={argument: constants[argument] for argument in kernel.arg_names if argument in constants},
        attrs={(index,): [["tt.divisibility", 16]] for index in aligned},
    )
    options = {"num_warps": num_warps, "enable_fp_fusion": False}
    compiled = compile_kernel(source, target=GPUTarget("cuda", capability, 32), options=options)
    counts = {instruction: compiled.asm["ptx"].count(instruction) for instruction in INSTRUCTIONS}
    return {**counts, "shared": compiled.metadata.shared}


if __name__ == "__main__":
    wanted = (argument.partition(":") for argument in sys.argv[1:])
    print(json.dumps([compiled_for(int(capability), name) for capability, _, name in wanted]))
