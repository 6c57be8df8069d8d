"""Native code on quantized files and folders: their own digits, and the same bits in any company.

On any instruction set, on one rank and two.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import closing
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import pytest

from brlite.backends.native import abi
from brlite.backends.native.abi import INT4, INT4_MIN, INT4_ZERO, INT8_F16, IQ4_NL, IQ4_XS, MXFP4, Q4_K, Q6_K
from brlite.backends.native.backend import NativeBackend
from brlite.backends.native.library import NativeLibrary, available_isas
from brlite.backends.native.packer import load_weights
from brlite.backends.sizes import sizes_at
from brlite.checkpoint import Checkpoint, open_checkpoint
from brlite.checkpoint.load_plan import NATIVE_FORMS
from brlite.config.options import EngineConfig, ModelSpec
from brlite.engine.backend import Batch, PoolingInput, ScheduledSeq
from brlite.models.precision import PrecisionOption
from tests.backends.native_models import load_native, random_ids
from tests.backends.rank_threads import load_native_ranks
from tests.backends.schedules import Story, live_alone, make_prompts, run_schedules
from tests.load_plans import make_plan, read_tensors
from tests.quantized_files import HEAD_DIM, HEADS, HIDDEN, KV, KV_HEADS, LAYERS, MIXES, write_quantized
from tests.quantized_folders import CASES, write_folder

NUM_SCHEDULES = 4
OF_BYTES = (
    "q8_0",
    "q4_0",
    "q4_k_m",
    "iq4_xs",
    "iq4_nl",
    "awq",
)  # those that are computed with int8 activations, too: one of each form
FOLDERS = ("gptq", "awq", "fp8-block")  # those that are computed with; of all others only the packed rows are compared


class Quantized(NamedTuple):
    mix: str
    precision: PrecisionOption
    checkpoint: Checkpoint
    backend: NativeBackend
    stories: list[Story]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized")
    for mix, types in MIXES.items():
        write_quantized(folder / f"{mix}.gguf", types)
    for name, case in CASES.items():
        write_folder(folder / name, case)
    return folder


def model_path(folder: Path, mix: str) -> Path:
    return folder / mix if mix in CASES else folder / f"{mix}.gguf"


@pytest.fixture(
    scope="module", params=[*zip([*MIXES, *FOLDERS], repeat("auto")), *zip(OF_BYTES, repeat("a_int8_w_int8"))]
)
def quantized(request: pytest.FixtureRequest, folder: Path, native_library: NativeLibrary) -> Iterator[Quantized]:
    mix, precision = request.param
    checkpoint = open_checkpoint(model_path(folder, mix))
    with closing(load_native(native_library, mix, precision, checkpoint=checkpoint)) as backend:
        stories = [live_alone(backend, prompt, seed) for seed, prompt in enumerate(make_prompts(seed=0))]
        yield Quantized(mix, precision, checkpoint, backend, stories)


def test_rows_have_the_bits_they_have_alone_whatever_the_schedule(quantized: Quantized) -> None:
    assert run_schedules(quantized.backend, quantized.stories, count=NUM_SCHEDULES, seed=1)["compared"] > NUM_SCHEDULES


def test_every_instruction_set_and_two_threads_give_the_same_bits(
    quantized: Quantized, native_library: NativeLibrary
) -> None:
    for isa in available_isas(native_library.functions):
        mix, precision, checkpoint = quantized[:3]
        backend = load_native(native_library, mix, precision, isa=isa, threads=1 + isa % 2, checkpoint=checkpoint)
        with closing(backend):
            assert run_schedules(backend, quantized.stories, count=2, seed=isa)["compared"] > 2


def test_two_ranks_give_the_bits_of_one(quantized: Quantized, native_library: NativeLibrary) -> None:
    mix, precision, checkpoint = quantized[:3]
    with closing(load_native_ranks(native_library, mix, precision, 2, checkpoint=checkpoint)) as ranks:
        assert run_schedules(ranks, quantized.stories, count=2, seed=3)["compared"] > 2


def test_logits_are_those_of_the_dequantized_file(quantized: Quantized) -> None:
    token_ids = random_ids(70, seed=2)
    expected = reference_logits(quantized.checkpoint, token_ids)

    found = quantized.backend.logits(token_ids)

    # Keys and values are bfloat16, which tells least where a token sees only itself.
    is_exact = set(quantized.checkpoint.formats().values()) <= NATIVE_FORMS.keys() | {"F32"}
    errors = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    if quantized.precision == "a_int8_w_int8":
        assert 0.004 < np.median(errors) < 0.04
    else:
        assert errors[0] < (0.004 if is_exact else 0.012)
        assert np.median(errors) < 0.015


@pytest.mark.parametrize("mix", MIXES)
def test_int8_activations_have_a_scale_for_each_32_inputs(
    mix: str, folder: Path, native_library: NativeLibrary
) -> None:
    """The head's product of the hidden state that the backend itself gives, in float64."""
    library, checkpoint = native_library.functions, open_checkpoint(model_path(folder, mix))
    table, token_ids = list(range(8)), random_ids(70, seed=4)
    with closing(load_native(native_library, mix, "a_int8_w_int8", checkpoint=checkpoint)) as backend:
        [pooled] = backend.execute(Batch([ScheduledSeq(0, 0, token_ids, table, pooling=PoolingInput(1))])).seqs
        logits = backend.logits(token_ids)[-1]
    loaded = load_weights(library, make_plan(checkpoint, ModelSpec(name=mix, build_seq=64)))
    with closing(loaded):
        parameters = loaded.layout.tensors
        [head] = parameters.get("head.weight") or parameters["embedding"]
        weights = np.empty((head.num_outputs, head.num_inputs), np.float32)
        for row, values in enumerate(weights):
            address = loaded.part_address(head)
            library.brlite_unpack_row(head.format, address, row, head.num_inputs, values.ctypes.data)

    groups = np.frombuffer(pooled.hidden_total, np.float64).astype(np.float32).reshape(-1, 32)
    peaks = np.abs(groups).max(axis=1, keepdims=True)
    codes, scales = np.rint(groups * (np.float32(127) / peaks)), peaks.astype(np.float64) / 127
    expected = weights.astype(np.float64) @ (codes * scales).reshape(-1)

    assert np.linalg.norm(logits - expected) < 1e-6 * np.linalg.norm(expected)


@pytest.mark.parametrize("mix", [*MIXES, *CASES])
def test_packed_rows_are_the_files_numbers_exactly(mix: str, folder: Path, native_library: NativeLibrary) -> None:
    """Of those formats that are kept; others are rounded."""
    library = native_library.functions
    checkpoint = open_checkpoint(model_path(folder, mix))
    plan = make_plan(checkpoint, ModelSpec(name=mix, build_seq=64))
    loaded = load_weights(library, plan)
    with closing(loaded):
        for name, values in read_tensors(checkpoint).items():
            target, stored_as = plan.model.targets[name], checkpoint.formats()[name]
            if stored_as not in NATIVE_FORMS:
                continue
            parts = loaded.layout.tensors[target.parameter]
            part = next(part for part in reversed(parts) if part.first_row <= target.start)
            out = np.empty(values.shape, np.float32)
            for row in range(len(values)):
                library.brlite_unpack_row(
                    *(part.format, loaded.part_address(part), target.start - part.first_row + row),
                    *(part.num_inputs, out[row].ctypes.data),
                )
            assert part.format in (INT8_F16, INT4, INT4_MIN, INT4_ZERO, Q4_K, Q6_K, IQ4_NL, IQ4_XS, MXFP4)
            assert np.array_equal(out, values), name


@pytest.mark.parametrize("name", ["IQ4_NL", "IQ4_XS", "MXFP4"])
def test_any_block_of_a_table_is_the_files_numbers(name: str, native_library: NativeLibrary) -> None:
    """Also in the last panel, which has 5 of 16 rows, and for scales of any size. MXFP4's two smallest count as 0."""
    generator, num_inputs = np.random.default_rng(1), 768 if name == "IQ4_XS" else 736
    block_inputs, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    blocks = generator.integers(0, 256, (37, num_inputs // block_inputs, block_bytes), dtype=np.uint8)
    if name == "MXFP4":
        exponents = np.arange(blocks[..., 0].size) % 252  # with more the largest number is beyond float32
        blocks[..., 0] = exponents.reshape(blocks.shape[:2])
    else:
        blocks[..., 1] &= 0xBB  # finite
    expected = gguf.quants.dequantize(blocks.reshape(37, -1), gguf.GGMLQuantizationType[name])
    if name == "MXFP4":
        expected.reshape(37, -1, 32)[blocks[..., 0] < 2] = 0

    format_, library = getattr(abi, name), native_library.functions
    panels = np.zeros(library.brlite_packed_bytes(format_, 37, num_inputs), np.uint8)
    library.brlite_pack_blocks(format_, blocks.ctypes.data, 0, 37, num_inputs, panels.ctypes.data)
    found = np.empty_like(expected)
    for row, values in enumerate(found):
        library.brlite_unpack_row(format_, panels.ctypes.data, row, num_inputs, values.ctypes.data)

    assert np.isfinite(expected).all()
    assert np.array_equal(found, expected)


def test_a_matrix_of_several_tensors_has_a_part_for_each_format(folder: Path, native_library: NativeLibrary) -> None:
    checkpoint = open_checkpoint(folder / "q4_k_m.gguf")
    loaded = load_weights(native_library.functions, make_plan(checkpoint, ModelSpec(name="m", build_seq=64)))
    with closing(loaded):
        parts = loaded.layout.tensors["layers.0.qkv.weight"]

    assert [(part.format, part.first_row, part.num_outputs) for part in parts] == [
        (Q4_K, 0, HIDDEN + KV),
        (Q6_K, HIDDEN + KV, KV),
    ]


def test_sizes_are_told_before_anything_is_read(quantized: Quantized) -> None:
    told = sizes_at(quantized.checkpoint.path, ModelSpec(name="m", build_seq=64), EngineConfig(backend="native"))

    held = quantized.backend.info.weight_bytes
    assert held * 0.93 < told.weight_bytes <= held  # each tensor begins at a page of memory


@pytest.mark.parametrize(
    ("mix", "precision"),
    [
        *(
            ("q4_k_m", "a_bf16_w_int4"),
            ("iq4_xs", "a_bf16_w_int4"),
            ("q8_0", "a_bf16_w_int8"),
            ("default", "a_bf16_w_int4"),
        ),
        *(("awq", "a_bf16_w_int4"), ("fp8-block", "a_bf16_w_int8")),
    ],
)
def test_a_precision_is_named_by_what_is_kept(
    mix: str, precision: str, folder: Path, native_library: NativeLibrary
) -> None:
    for option, name in (("auto", precision), ("a_int8_w_int8", precision.replace("a_bf16", "a_int8"))):
        checkpoint = open_checkpoint(model_path(folder, mix))
        with closing(load_native(native_library, mix, option, checkpoint=checkpoint)) as backend:
            assert backend.info.precision == name


def test_six_bits_are_named_where_no_matrix_has_less(folder: Path) -> None:
    plan = make_plan(open_checkpoint(folder / "q4_k_m.gguf"), ModelSpec(name="m", build_seq=64))

    assert plan.precision_name_of({"q6_k", "int8"}) == "a_bf16_w_int6"


def test_packed_weights_are_mapped_at_the_next_start(
    folder: Path, tmp_path: Path, native_library: NativeLibrary, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = open_checkpoint(folder / "q4_k_m.gguf")
    plan = make_plan(checkpoint, ModelSpec(name="m", build_seq=64), packed_file=tmp_path / "m.brlite")
    hashes = []
    for _ in range(2):
        loaded = load_weights(native_library.functions, plan)
        loaded.close()
        hashes.append(loaded.content_hash)
    is_kept = (tmp_path / "m.brlite").stat().st_size > loaded.layout.num_bytes

    assert is_kept
    assert hashes[0] == hashes[1]
    assert "is not used" not in caplog.text


def reference_logits(checkpoint: Checkpoint, token_ids: list[int]) -> np.ndarray[Any, Any]:
    """The logits [T, V] of a Llama in float64, from the numbers that the file holds."""
    weights = {
        name.removeprefix("model.").removesuffix(".weight"): values.astype(np.float64)
        for name, values in read_tensors(checkpoint).items()
    }
    hidden = weights["embed_tokens"][token_ids]
    for layer in range(LAYERS):
        at = {name.removeprefix(f"layers.{layer}."): values for name, values in weights.items()}
        normed = norm(hidden, at["input_layernorm"])
        q, k, v = (
            (normed @ at[f"self_attn.{each}_proj"].T).reshape(len(token_ids), -1, HEAD_DIM).swapaxes(0, 1)
            for each in "qkv"
        )
        q, k, v = rotate(q), rotate(k).repeat(HEADS // KV_HEADS, axis=0), v.repeat(HEADS // KV_HEADS, axis=0)
        scores = q @ k.swapaxes(1, 2) / math.sqrt(HEAD_DIM) + np.triu(np.full((len(token_ids),) * 2, -np.inf), 1)
        weighted = np.exp(scores - scores.max(axis=-1, keepdims=True))
        attended = (weighted / weighted.sum(axis=-1, keepdims=True)) @ v
        hidden = hidden + attended.swapaxes(0, 1).reshape(len(token_ids), -1) @ at["self_attn.o_proj"].T
        normed = norm(hidden, at["post_attention_layernorm"])
        gate, up = normed @ at["mlp.gate_proj"].T, normed @ at["mlp.up_proj"].T
        hidden = hidden + (gate / (1 + np.exp(-gate)) * up) @ at["mlp.down_proj"].T
    return norm(hidden, weights["norm"]) @ weights.get("lm_head", weights["embed_tokens"]).T


def norm(x: np.ndarray[Any, Any], weight: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + 1e-5) * weight


def rotate(heads: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """[H, T, D], the first half against the second."""
    half = HEAD_DIM // 2
    angles = np.arange(heads.shape[1])[:, None] * 50000.0 ** (-np.arange(half) / half)
    first, second = heads[..., :half], heads[..., half:]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
