"""The precisions that a model may be served in."""

from __future__ import annotations

from typing import get_args

from brlite.models.precision import PRECISIONS, WEIGHTS_NAMES, PrecisionOption


def test_every_name_of_a_precision_has_its_numbers() -> None:
    assert ("auto", *PRECISIONS) == get_args(PrecisionOption)


def test_precisions_with_the_same_weights_share_packed_weights() -> None:
    names = [WEIGHTS_NAMES[precision.weights] for precision in PRECISIONS.values()]

    assert names == ["bf16", "a_bf16_w_int8", "a_bf16_w_int8", "a_bf16_w_int8", "a_bf16_w_int4"]
