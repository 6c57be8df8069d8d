"""Products with rows, against torch's in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from brlite.backends.torch.graph_memory import MAX_PARTS
from brlite.backends.torch.parameters import GroupedLinear, Linear, Parameters
from brlite.backends.torch.quantize import quantize_weight, random_codes, store_codes_
from brlite.backends.torch.triton.multiply import (
    FEW_GATED_INT4,
    MAX_NARROW_ROWS,
    SEGMENT_STEP,
    Matrix,
    choose_tile,
    multiply,
    multiply_gated,
    multiply_in_tiles,
    num_parts,
    segment_size,
)
from brlite.models.precision import MatrixForm
from tests.backends.torch.triton.interpreter import BFLOAT16_STEP, to_bfloat16

# Rows, outputs and inputs: each kind of tile; sizes that fill no tile, no group and no segment; up to four segments.
SHAPES = [
    (1, 70, 40),
    (3, 130, 300),
    (5, 64, 512),
    (17, 64, 256),
    (33, 70, 480),
    (70, 70, 40),
    (70, 200, 264),
    (130, 10, 128),
]


SOME = [(3, 130, 300), (33, 70, 480), (70, 70, 40)]  # the forms of weights differ in how one tile is read
FORMS: list[MatrixForm] = ["bfloat16", "int8", "int8_f16", "int4", "int4_min", "int4_zero"]


def random_rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def make_linear(form: MatrixForm, num_outputs: int, num_inputs: int, bias: Tensor | None = None) -> GroupedLinear:
    """A matrix with the codes of a file."""
    num_groups = -(-num_inputs // 32)
    is_int4 = form != "int8_f16"
    weight = torch.zeros(
        (num_outputs, num_groups * (16 if is_int4 else 32)), dtype=torch.uint8 if is_int4 else torch.int8
    )
    scales = torch.zeros((num_outputs, num_groups, 2), dtype=torch.float16)
    coded = random_codes(form, (num_outputs, num_inputs), torch.Generator().manual_seed(3))
    store_codes_(Parameters({"w": weight, "w.scales": scales}, {}), "w", 0, coded)
    return GroupedLinear(weight, bias, form=form, scales=scales)


def make_matrix(
    num_outputs: int, num_inputs: int, *, form: MatrixForm, has_bias: bool = False
) -> tuple[Matrix, Tensor]:
    """A matrix, and the weights that it stands for as they are multiplied, in float64."""
    weight = random_rows(num_outputs, num_inputs, seed=1)
    bias = random_rows(num_outputs, seed=2) if has_bias else None
    if form == "bfloat16":
        return Matrix.of(Linear(weight, bias), num_inputs), weight.double()
    if form != "int8":
        linear = make_linear(form, num_outputs, num_inputs, bias)
        widened = linear.dequantized(slice(None), torch.float32)
        return Matrix.of(linear, num_inputs), to_bfloat16(widened)[:, :num_inputs].double()
    levels, scales = quantize_weight(weight)
    levels = functional.pad(levels, (0, -num_inputs % 32))
    widened = levels.view(*scales.shape, 32).float() * scales.float().unsqueeze(-1)
    matrix = Matrix.of(GroupedLinear(levels, bias, form="int8", scales=scales.float()), num_inputs)
    return matrix, to_bfloat16(widened).flatten(1)[:, :num_inputs].double()


@pytest.mark.parametrize(
    ("form", "shape"),
    [("bfloat16", shape) for shape in SHAPES] + [(form, shape) for form in ("int8", "int4_min") for shape in SOME],
)
def test_a_product_is_the_sum_of_its_parts(form: MatrixForm, shape: tuple[int, int, int]) -> None:
    num_rows, num_outputs, num_inputs = shape
    matrix, weight = make_matrix(num_outputs, num_inputs, form=form)
    x = random_rows(num_rows, num_inputs)

    parts = multiply(x, matrix)

    assert len(parts) == num_parts(num_outputs, num_inputs)  # there is one tile, or two
    torch.testing.assert_close(parts.double().sum(dim=0), x.double() @ weight.T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("form", ["bfloat16", "int8", "int4_min"])
def test_parts_add_up_to_the_bits_of_a_product_in_one(form: MatrixForm) -> None:
    matrix, _ = make_matrix(40, 480, form=form)
    x = random_rows(5, 480)
    tile = choose_tile(5, matrix)

    parts = multiply_in_tiles(x, matrix, tile, is_split=True)
    (total,) = multiply_in_tiles(x, matrix, tile, is_split=False)

    assert len(parts) == 4
    assert torch.equal(((parts[0] + parts[1]) + parts[2]) + parts[3], total)


def test_a_matrix_is_not_split_for_rows_that_fill_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, weight = make_matrix(130, 256, form="bfloat16")
    x = random_rows(129, 256)
    assert len(multiply(x[:3], matrix)) == 2
    monkeypatch.setattr("brlite.backends.torch.triton.multiply._WANTED_PROGRAMS", 6)  # of a card that 4 fill

    whole = multiply(x, matrix)  # 2 tiles of rows by 2 of outputs

    assert len(multiply(x[:3], matrix)) == 2
    assert len(whole) == 1
    torch.testing.assert_close(whole[0].double(), x.double() @ weight.T, rtol=1e-5, atol=1e-4)


def test_a_part_is_the_product_of_its_segment() -> None:
    matrix, weight = make_matrix(70, 300, form="int8")
    x = random_rows(2, 300)

    parts = multiply(x, matrix)

    assert len(parts) == 3
    for part, start in zip(parts, range(0, 300, segment_size(300, 3)), strict=True):
        segment = slice(start, start + 128)
        torch.testing.assert_close(part.double(), x[:, segment].double() @ weight[:, segment].T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("form", ["bfloat16", "int8", "int4_zero"])
@pytest.mark.parametrize(("num_rows", "has_bias"), [(3, False), (20, True), (40, False), (70, True)])
def test_gate_and_up_make_one_activation(num_rows: int, has_bias: bool, form: MatrixForm) -> None:
    matrix, weight = make_matrix(2 * 70, 72, form=form, has_bias=has_bias)
    x = random_rows(num_rows, 72)
    gate, up = functional.linear(x.double(), weight, None if matrix.bias is None else matrix.bias.double()).chunk(
        2, dim=-1
    )

    found = multiply_gated(x, matrix)

    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), functional.silu(gate) * up, rtol=BFLOAT16_STEP, atol=1e-4)


@pytest.mark.parametrize("num_rows", [1, 16])
def test_gate_and_up_of_4_bits_are_read_in_narrower_tiles(num_rows: int) -> None:
    matrix, _ = make_matrix(2 * 70, 256, form="int4_zero")
    x = random_rows(num_rows, 256)
    tile = choose_tile(num_rows, matrix, is_gated=True)
    wider = tile._replace(inputs=128, stages=3)

    assert tile == FEW_GATED_INT4
    assert choose_tile(num_rows, matrix) == wider._replace(stages=4)
    assert choose_tile(17, matrix, is_gated=True).inputs == 128
    torch.testing.assert_close(
        multiply_gated(x, matrix).double(), multiply_gated(x, matrix, wider).double(), rtol=BFLOAT16_STEP, atol=1e-4
    )  # numpy's products in the interpreter have other bits in other tiles


def test_the_segments_of_a_matrix_hold_all_its_inputs_and_none_is_empty() -> None:
    for num_outputs in (1, 64, 300, 2048, 4096, 30_000, 200_000):
        for num_inputs in (32, 40, 127, 128, 129, 576, 1536, 4096, 14_336):
            parts = num_parts(num_outputs, num_inputs)
            size = segment_size(num_inputs, parts)

            assert 1 <= parts <= MAX_PARTS
            assert (parts - 1) * size < num_inputs <= parts * size


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_inputs", [40, 64, 512])
def test_no_tile_takes_inputs_of_two_segments(num_inputs: int, form: MatrixForm) -> None:
    matrix, _ = make_matrix(64, num_inputs, form=form)

    for is_gated in (False, True):
        for num_rows in (1, 16, 17, 32, 33, 64, 65, 128, 129, 2048):
            assert SEGMENT_STEP % choose_tile(num_rows, matrix, is_gated=is_gated).inputs == 0


@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize("num_rows", [3, 40])
def test_weights_in_groups_give_the_bits_of_the_same_weights_in_bfloat16(num_rows: int, form: MatrixForm) -> None:
    matrix, weight = make_matrix(70, 256, form=form)
    x = random_rows(num_rows, 256)

    found = multiply(x, matrix)

    assert torch.equal(found, multiply(x, Matrix.of(Linear(weight.bfloat16()), 256)))


@pytest.mark.parametrize("form", ["bfloat16", "int8", "int4_zero"])
def test_a_row_has_the_same_bits_beside_others(form: MatrixForm) -> None:
    matrix, _ = make_matrix(40, 160, form=form)
    x = random_rows(16, 160)  # numpy's products in the interpreter have other bits in other tiles

    alone = multiply(x[:1], matrix)

    assert torch.equal(multiply(x, matrix)[:, :1], alone)


@pytest.mark.parametrize("form", FORMS[2:])
def test_many_rows_are_multiplied_by_widened_weights(form: MatrixForm) -> None:
    matrix, weight = make_matrix(70, 96, form=form)
    x = random_rows(MAX_NARROW_ROWS + 1, 96)

    (found,) = multiply(x, matrix)

    torch.testing.assert_close(found.double(), x.double() @ weight.T, rtol=1e-5, atol=1e-4)


def test_codes_of_both_ends_with_scales_of_both_signs_are_exact() -> None:
    codes = torch.arange(16, dtype=torch.uint8).repeat(2, 2)  # [2, 32]
    packed = codes[:, :16] | codes[:, 16:] << 4
    scales = torch.tensor([[[0.25, 3.0]], [[-65504.0, 65504.0]]], dtype=torch.float16)  # [2, 1, 2]
    x = torch.eye(32).bfloat16()

    found = {
        form: multiply(x, Matrix.of(GroupedLinear(packed, form=form, scales=scales), 32))[0].T.double()
        for form in ("int4_min", "int4_zero")
    }

    scale, offset = scales.double().split(1, dim=-1)
    for form, exact in (
        ("int4_min", codes * scale[:, 0] + offset[:, 0]),
        ("int4_zero", (codes - offset[:, 0]) * scale[:, 0]),
    ):
        torch.testing.assert_close(found[form], exact, rtol=BFLOAT16_STEP, atol=0)
