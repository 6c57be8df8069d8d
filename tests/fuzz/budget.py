"""How long the fuzz targets of this folder run: 120 examples of each in CI, BRLITE_FUZZ_SECONDS of each by hand.

CI has always the same examples: a change must not fail for what another one brought.

BRLITE_FUZZ_SECONDS=600 pytest tests/fuzz -o timeout=0
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from typing import TypeVar

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

T = TypeVar("T")

SECONDS = float(os.environ.get("BRLITE_FUZZ_SECONDS", "0"))
NUM_EXAMPLES = 120

_SETTINGS = settings(
    derandomize=not SECONDS,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)


def fuzz(
    inputs: st.SearchStrategy[T], *, examples: int = NUM_EXAMPLES
) -> Callable[[Callable[[T], None]], Callable[[], None]]:
    """Makes a test of a function of one input."""

    def make(check: Callable[[T], None]) -> Callable[[], None]:
        run = settings(_SETTINGS, max_examples=5000 if SECONDS else examples)(given(inputs)(check))

        def test() -> None:
            until = time.monotonic() + SECONDS
            run()
            while time.monotonic() < until:
                run()

        test.__name__, test.__doc__ = check.__name__, check.__doc__
        return test

    return make


def cuts(data: bytes, places: list[int]) -> list[bytes]:
    """The data in pieces, none of them empty. Places count from 0 and are taken modulo the length."""
    borders = sorted({place % len(data) for place in places} | {0, len(data)}) if data else [0]
    return [data[begin:end] for begin, end in itertools.pairwise(borders)]


PLACES = st.lists(st.integers(0, 4000), max_size=12)


def mutated(whole: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """Some as they are, some with a few bytes changed, put in or left out."""
    edit = st.tuples(st.integers(0, 4000), st.integers(0, 3), st.sampled_from(ODD_BYTES) | st.binary(max_size=3))
    return st.tuples(whole, st.just([]) | st.lists(edit, max_size=3)).map(_edited)


ODD_BYTES = [
    b"\r",
    b"\n",
    b"\r\n",
    b"\n\n",
    b"\0",
    b" ",
    b"\t",
    b":",
    b";",
    b"0",
    b"\x7f",
    b"\x80",
    b"\xff",
    b'"',
    b"\\",
]


def _edited(case: tuple[bytes, list[tuple[int, int, bytes]]]) -> bytes:
    data, edits = case
    for place, length, new in edits:
        at = place % (len(data) + 1)
        data = data[:at] + new + data[at + length :]
    return data
