"""The plain C interface of the native kernels as ctypes sees it: `src/brlite.h`, field by field.

The header says what the fields mean. Pointers are addresses; code that sets one must keep the memory alive.
"""

from __future__ import annotations

import ctypes
import re
from ctypes import c_double, c_float, c_int32, c_size_t, c_uint64, c_void_p
from pathlib import Path
from typing import Any

from brlite.models.shards import LANES as LANES

ABI_VERSION = 16

MAX_HEAD_DIM = 256
MAX_SIZE = 2**30  # of a matrix's rows and columns, which int32 holds, also rounded up to whole panels and groups
HEAD_ROWS = 32

# The index is the number in C++. Of two that a processor has, the later one is faster.
ISAS = ("generic", "avx2", "avx_vnni", "avx512", "avx512_vnni", "avx512_bf16", "neon", "neon_dotprod", "neon_i8mm")

INT8, BF16, INT8_F16, INT4, INT4_MIN, INT4_ZERO, Q4_K, Q6_K, IQ4_NL, IQ4_XS, MXFP4 = range(11)

LOST_RANK = 8  # `brlite_run` returns this after a rank was lost

EMBED, NORM, LINEAR, ADD, ROPE, ATTEND, QUANTIZE, SILU, GATE = range(9)


_DRAW_FIELDS = re.findall(
    r"^(FIELD|PARAMETER)\((.+), (\w+)\)",
    (Path(__file__).parent / "src" / "draw_fields.h").read_text(encoding="utf-8"),
    re.MULTILINE,
)
_CTYPES: dict[str, Any] = {
    "int32_t": c_int32,
    "float": c_float,
    "double": c_double,
    "const int32_t*": c_void_p,
    "const float*": c_void_p,
    "float*": c_void_p,
    "const uint8_t*": c_void_p,
}
DRAW_PARAMETERS = tuple(
    name for kind, _, name in _DRAW_FIELDS if kind == "PARAMETER"
)  # names of fields of `SamplingParams`, too


class NativeOperation(ctypes.Structure):
    _fields_ = [
        ("kind", c_int32),
        ("format", c_int32),
        ("num_outputs", c_int32),
        ("num_inputs", c_int32),
        ("row_size", c_int32),
        ("is_table", c_int32),
        ("window", c_int32),
        ("epsilon", c_float),
        ("first", c_int32),
        ("count", c_int32),
        ("output_row_size", c_int32),
        ("meets", c_int32),
        ("is_part", c_int32),
        ("has_int8_rows", c_int32),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("input", c_void_p),
        ("output", c_void_p),
        ("pages", c_void_p),
        ("squares", c_void_p),
    ]


class Attention(ctypes.Structure):
    _fields_ = [
        ("num_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("rotary_dim", c_int32),
        ("is_interleaved", c_int32),
        ("kv_format", c_int32),
        ("pages_per_block", c_int32),
        ("max_positions", c_int32),
        ("softmax_scale", c_float),
        ("reserved", c_int32),
        ("cos", c_void_p),
        ("sin", c_void_p),
    ]


class NativeSpan(ctypes.Structure):
    _fields_ = [
        ("start", c_int32),
        ("first_row", c_int32),
        ("num_rows", c_int32),
        ("reserved", c_int32),
        ("block_table", c_void_p),
    ]


class Draw(ctypes.Structure):
    _fields_ = [(name, _CTYPES[type_name]) for _, type_name, name in _DRAW_FIELDS]


class Drawn(ctypes.Structure):
    _fields_ = [
        ("token", c_int32),
        ("logprob", c_float),
        ("top_ids", c_void_p),
        ("top_logprobs", c_void_p),
    ]


class Plan(ctypes.Structure):
    _fields_ = [
        ("body", c_void_p),
        ("num_operations", c_int32),
        ("max_rows", c_int32),
        ("vocab_size", c_int32),
        ("max_blocks", c_int32),
        ("attention", Attention),
        ("norm", NativeOperation),
        ("head", NativeOperation),
        ("logits", c_void_p),
        ("meeting", c_void_p),
        ("num_ranks", c_int32),
        ("rank", c_int32),
    ]


class Pooling(ctypes.Structure):
    _fields_ = [
        ("first_row", c_int32),
        ("num_rows", c_int32),
        ("total", c_void_p),
    ]


class NativeBatch(ctypes.Structure):
    _fields_ = [
        ("num_rows", c_int32),
        ("num_spans", c_int32),
        ("num_draws", c_int32),
        ("num_threads", c_int32),
        ("token_ids", c_void_p),
        ("spans", c_void_p),
        ("draws", c_void_p),
        ("drawn", c_void_p),
        ("poolings", c_void_p),
        ("num_poolings", c_int32),
        ("reserved", c_int32),
    ]


STRUCTS = (
    NativeOperation,
    Attention,
    NativeSpan,
    Draw,
    Drawn,
    Plan,
    NativeBatch,
    Pooling,
)  # in the order of `brlite_struct_size`

# Argument types and result type of each function.
FUNCTIONS: dict[str, tuple[tuple[Any, ...], Any]] = {
    "brlite_abi_version": ((), c_int32),
    "brlite_kernel_version": ((), c_int32),
    "brlite_struct_size": ((c_int32,), c_size_t),
    "brlite_isa_available": ((c_int32,), c_int32),
    "brlite_self_test": ((c_int32, c_int32), c_uint64),
    "brlite_allocate": ((c_size_t,), c_void_p),
    "brlite_release": ((c_void_p, c_size_t), None),
    "brlite_packed_bytes": ((c_int32, c_int32, c_int32), c_size_t),
    "brlite_pack": ((c_int32, c_void_p, c_int32, c_int32, c_int32, c_void_p), None),
    "brlite_pack_int4": ((c_void_p, c_void_p, c_int32, c_int32, c_int32, c_void_p), None),
    "brlite_pack_codes": ((c_int32, *(c_void_p,) * 3, *(c_int32,) * 3, c_void_p), None),
    "brlite_pack_blocks": ((c_int32, c_void_p, *(c_int32,) * 3, c_void_p), None),
    "brlite_unpack_row": ((c_int32, c_void_p, c_int32, c_int32, c_void_p), None),
    "brlite_page_bytes": ((c_int32, c_int32), c_size_t),
    "brlite_checksum": ((c_void_p, c_void_p, c_size_t), c_uint64),
    "brlite_meeting_bytes": ((), c_size_t),
    "brlite_end_meeting": ((c_void_p,), None),
    "brlite_create": ((c_void_p, c_int32, c_int32), c_void_p),
    "brlite_destroy": ((c_void_p,), None),
    "brlite_run": ((c_void_p, c_void_p), c_int32),
    "brlite_last_time": ((c_void_p, c_void_p), None),
    "brlite_draw_rows": ((c_int32, c_void_p, c_void_p, c_int32, c_int32, c_void_p), c_int32),
}
