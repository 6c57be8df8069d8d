"""Rounding to 4 bits: what `precision = "a_bf16_w_int4"` makes of plain weights, and which inputs it thinks matter."""

from __future__ import annotations

import ctypes
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from brlite.backends.choose import load_backend
from brlite.backends.native import abi
from brlite.backends.native.backend import NativeBackend
from brlite.backends.native.calibration import measure_importance
from brlite.backends.native.library import NativeLibrary, available_isas
from brlite.backends.native.packer import load_weights
from brlite.backends.sizes import measure
from brlite.checkpoint import open_checkpoint
from brlite.checkpoint.load_plan import LoadPlan
from brlite.config.options import EngineConfig, ModelSpec
from brlite.engine.backend import Batch, SamplingInput, ScheduledSeq
from brlite.errors import ModelError
from brlite.sampling_params import SamplingParams
from tests.backends.native_models import EMBEDDING, MAX_CONTEXT, make_checkpoint, make_tensors, random_ids
from tests.load_plans import make_plan
from tests.quantized_files import LAYERS, MIXES, write_quantized

Matrix = npt.NDArray[np.float32]
GROUP = 32


def rounded(library: ctypes.CDLL, weight: Matrix, importance: Matrix | None = None) -> Matrix:
    """The numbers that a matrix [O, I] has after packing."""
    num_outputs, num_inputs = weight.shape
    panels = np.zeros(library.brlite_packed_bytes(abi.INT4_MIN, num_outputs, num_inputs), np.uint8)
    counts = None if importance is None else importance.ctypes.data
    library.brlite_pack_int4(weight.ctypes.data, counts, 0, num_outputs, num_inputs, panels.ctypes.data)
    found = np.empty_like(weight)
    for row, values in enumerate(found):
        library.brlite_unpack_row(abi.INT4_MIN, panels.ctypes.data, row, num_inputs, values.ctypes.data)
    return found


@pytest.fixture(scope="module")
def library(native_library: NativeLibrary) -> ctypes.CDLL:
    return native_library.functions


@pytest.fixture(scope="module")
def weight() -> Matrix:
    return (np.random.default_rng(0).standard_normal((35, 7 * GROUP + 8)) * 0.03).astype(np.float32)


@pytest.mark.parametrize("scale", [2.0**-12, 0.25, 3.0])
def test_numbers_that_four_bits_can_hold_are_kept(library: ctypes.CDLL, scale: float) -> None:
    groups = np.random.default_rng(1).permuted(np.tile(np.arange(16), (40, 2)), axis=1)
    weight = np.float32(scale) * (groups.reshape(20, 64).astype(np.float32) - 5)

    assert np.array_equal(rounded(library, weight), weight)
    assert np.array_equal(rounded(library, weight, np.ones(64, np.float32)), weight)


def test_a_group_of_equal_numbers_is_kept(library: ctypes.CDLL) -> None:
    weight = np.repeat(np.array([[0.0], [-0.5], [3.0], [2.0**-20]], np.float32), GROUP, axis=1)

    assert np.array_equal(rounded(library, weight), weight)


def test_no_number_is_further_away_than_half_a_step_of_its_group(library: ctypes.CDLL, weight: Matrix) -> None:
    """Without importance little is gained by clamping, so that the line covers nearly the whole range."""
    groups = weight[:, : 7 * GROUP].reshape(35, 7, GROUP)
    steps = (groups.max(axis=2) - groups.min(axis=2)) / 15

    errors = np.abs(rounded(library, weight)[:, : 7 * GROUP].reshape(35, 7, GROUP) - groups)

    assert (errors.max(axis=2) <= 1.01 * steps).all()
    assert np.mean(errors.max(axis=2) / steps) < 0.65


def test_the_search_lowers_the_squares_of_the_errors(library: ctypes.CDLL, weight: Matrix) -> None:
    quick, searched = (
        np.square(rounded(library, weight, importance) - weight).sum()
        for importance in (None, np.ones(weight.shape[1], np.float32))
    )

    assert 0.8 * quick < searched < 0.98 * quick


def test_inputs_that_matter_more_get_smaller_errors(library: ctypes.CDLL, weight: Matrix) -> None:
    importance = np.ones(weight.shape[1], np.float32)
    importance[::GROUP] = 1000

    alike, weighted = (
        np.square(rounded(library, weight, each) - weight)[:, ::GROUP].sum()
        for each in (np.ones_like(importance), importance)
    )

    assert weighted < 0.05 * alike


@pytest.mark.parametrize("lost", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_makes_its_group_not_finite(library: ctypes.CDLL, lost: float) -> None:
    weight = np.ones((3, 70), np.float32)
    weight[1, 40] = lost

    found = rounded(library, weight)

    assert not np.isfinite(found[1, 32:64]).any()
    found[1, 32:64] = 1
    assert (found == 1).all()


def int4_plan(name: str = "llama", **fields: object) -> LoadPlan:
    spec = ModelSpec(name=name, precision="a_bf16_w_int4", build_seq=MAX_CONTEXT, build_batch=4, num_blocks=8)
    return make_plan(make_checkpoint(name), spec, EngineConfig(threads=1, max_num_batched_tokens=16), **fields)


def test_squares_are_those_of_a_matrixs_inputs(native_library: NativeLibrary) -> None:
    """The inputs of the first layer: rows of the embedding, normalised. Two steps, of which one has many rows."""
    plan, token_ids = int4_plan(), random_ids(16, seed=3)
    tensors = {name: tensor.numpy().astype(np.float64) for name, tensor in make_tensors("llama").items()}
    rows = tensors[EMBEDDING][token_ids]
    inputs = rows / np.sqrt(np.square(rows).mean(axis=1, keepdims=True) + plan.config.rms_norm_eps)
    inputs *= tensors["model.layers.0.input_layernorm.weight"]
    squares = np.zeros(plan.config.hidden_size)

    addresses = {"layers.0.qkv.weight": squares.ctypes.data}
    with closing(NativeBackend(native_library, plan, squares=addresses)) as backend:
        backend.execute(Batch([ScheduledSeq(0, 0, token_ids[:15], [0])]))
        backend.execute(Batch([ScheduledSeq(0, 15, token_ids[15:], [0])]))

    assert np.allclose(squares, np.square(inputs).sum(axis=0), rtol=1e-3)


def test_importance_has_the_same_bits_on_any_instruction_set_and_threads(native_library: NativeLibrary) -> None:
    found = []
    for isa in available_isas(native_library.functions):
        native, plan = native_library._replace(isa=isa), int4_plan(num_threads=1 + isa % 2)
        with closing(load_weights(native.functions, plan)) as weights:
            found.append(measure_importance(native, plan, weights))

    assert found[0].keys() == {
        f"layers.{i}.{name}.weight" for i in range(2) for name in ("qkv", "o", "gate_up", "down")
    }
    for each in found:
        for name, importance in each.items():
            assert importance.mean() == pytest.approx(1)
            assert np.array_equal(importance, found[0][name])


def test_of_a_quantized_file_only_what_is_rounded_is_measured(tmp_path: Path, native_library: NativeLibrary) -> None:
    """Q4_K_M: v, in one matrix with q and k, and down are Q6_K. The default model has nothing to round."""
    spec = ModelSpec(name="m", precision="a_bf16_w_int4", build_seq=64, build_batch=2)
    found = {}
    for mix in ("q4_k_m", "default"):
        write_quantized(tmp_path / f"{mix}.gguf", MIXES[mix])
        plan = make_plan(open_checkpoint(tmp_path / f"{mix}.gguf"), spec)
        with closing(load_weights(native_library.functions, plan)) as weights:
            found[mix] = set(measure_importance(native_library, plan, weights))

    assert found["q4_k_m"] == {f"layers.{layer}.{name}.weight" for layer in range(LAYERS) for name in ("qkv", "down")}
    assert found["default"] == set()


def test_importance_lowers_the_error_of_what_the_model_computes(native_library: NativeLibrary) -> None:
    """Inputs of very different sizes, as models have them: some channels of the first norm are 30 times as large."""
    tensors = make_tensors("llama")
    for layer in range(2):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"][::24] *= 30
    checkpoint, token_ids = make_checkpoint("llama", **tensors), random_ids(16, seed=4)

    def logits(precision: str, *, measured: bool = True) -> Matrix:
        spec = ModelSpec(name="llama", precision=precision, build_seq=MAX_CONTEXT, build_batch=4, num_blocks=8)  # type: ignore[arg-type]
        plan = make_plan(checkpoint, spec, EngineConfig(threads=1, max_num_batched_tokens=16))
        measure = partial(measure_importance, native_library, plan) if measured else None
        with closing(NativeBackend(native_library, plan, measure=measure)) as backend:
            return backend.logits(token_ids)

    expected = logits("bf16", measured=False)
    alike, weighted = (
        np.linalg.norm(logits("a_bf16_w_int4", measured=measured) - expected) for measured in (False, True)
    )

    assert weighted < 0.8 * alike


def test_a_model_of_sixteen_bits_is_served_in_four(native_library: NativeLibrary) -> None:
    plan = int4_plan("llama-tied")

    with closing(load_backend(plan.checkpoint, plan.model, plan.spec, plan.engine)) as backend:
        [result] = backend.execute(
            Batch([ScheduledSeq(0, 0, [5, 6, 7], [0], SamplingInput(SamplingParams(), 0, 0))])
        ).seqs
        info = backend.info

    assert len(result.tokens) == 1
    assert info.precision == "a_bf16_w_int4"
    assert measure(plan.model, plan.spec, plan.engine).dtype == "int4 and int8"  # int8: the head, here the embedding


def test_a_weight_beyond_half_precision_is_refused_with_its_tensor(native_library: NativeLibrary) -> None:
    """Its scale or minimum would be infinite, and so the model's answers."""
    name = "model.layers.1.mlp.down_proj.weight"
    large = make_tensors("llama")[name]
    large[3, 5] = -70_000
    plan = make_plan(make_checkpoint("llama", **{name: large}), int4_plan().spec)

    with pytest.raises(ModelError, match=rf"{name} has a weight of 70\d+; .* choose another precision"):
        load_weights(native_library.functions, plan)


def test_a_second_load_maps_what_the_first_has_rounded(tmp_path: Path, native_library: NativeLibrary) -> None:
    plan = int4_plan(packed_file=tmp_path / "weights.brlite")
    measure = partial(measure_importance, native_library, plan)
    hashes = []

    def never(weights: object) -> dict[str, Matrix]:
        raise AssertionError("the weights are packed already")

    for each in (measure, never):
        with closing(load_weights(native_library.functions, plan, each)) as weights:
            hashes.append(weights.content_hash)

    assert hashes[0] == hashes[1]
