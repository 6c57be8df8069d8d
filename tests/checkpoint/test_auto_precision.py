"""What `auto` comes to, and how the log and `brlite check` say it."""

from __future__ import annotations

import pytest

from brlite.checkpoint.checked_model import describe_precision, settle_precision
from brlite.precision import PRECISIONS, STORED

PLAIN = {"norm": "F32", "a": "BF16", "b": "F16"}
MIXED = {"norm": "F32", "a": "Q4_K", "b": "Q4_K", "c": "Q6_K"}


def test_what_no_file_has_quantised_is_bfloat16() -> None:
    assert settle_precision("auto", PLAIN) == PRECISIONS["bf16"]
    assert describe_precision("auto", PLAIN, is_native=True) == "bf16, as no matrix of the files is quantised (auto)"


@pytest.mark.parametrize(
    ("is_native", "text"),
    [
        (True, "the file's own: Q4_K is kept, Q6_K is rounded to int8 (auto)"),
        (False, "bf16: torch widens the file's Q4_K, Q6_K (auto)"),
    ],
)
def test_a_quantised_file_is_kept_and_every_change_is_said(is_native: bool, text: str) -> None:
    assert settle_precision("auto", MIXED) == STORED
    assert describe_precision("auto", MIXED, is_native=is_native) == text


@pytest.mark.parametrize("name", PRECISIONS)
def test_a_precision_with_a_name_means_the_same_for_every_file(name) -> None:
    assert settle_precision(name, MIXED) == settle_precision(name, PLAIN) == PRECISIONS[name]
    assert describe_precision(name, MIXED, is_native=True) == f"{name}, set by precision"
