"""A minute's budget, against the same arithmetic done in whole numbers."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brlite.http.bucket import Bucket


class PlainBucket:
    """Exact and obvious: what is there, brought up to date at each look. Times are whole milliseconds."""

    def __init__(self, per_minute: int, now: int) -> None:
        self.per_minute = per_minute
        self._level = Fraction(per_minute)
        self._seen = now

    def level(self, now: int) -> Fraction:
        self._level = min(
            Fraction(self.per_minute), self._level + Fraction((now - self._seen) * self.per_minute, 60_000)
        )
        self._seen = now
        return self._level

    def take(self, now: int, count: int) -> None:
        self._level = self.level(now) - count


def test_a_whole_minutes_worth_may_be_taken_at_once() -> None:
    bucket = Bucket(7)

    for _ in range(7):
        assert bucket.seconds_until(100.0, 1) == 0
        bucket.take(100.0, 1)

    assert bucket.remaining(100.0) == 0
    assert bucket.seconds_until(100.0, 1) == pytest.approx(60 / 7)


def test_what_was_taken_comes_back_evenly() -> None:
    bucket = Bucket(60)
    bucket.take(0.0, 60)

    remaining = [bucket.remaining(now) for now in (0.0, 0.5, 1.0, 2.5, 30.0, 60.0, 600.0)]

    assert remaining == [0, 0, 1, 2, 30, 60, 60]


def test_a_debt_is_paid_before_anything_is_given() -> None:
    bucket = Bucket(60)
    bucket.take(0.0, 90)

    assert bucket.remaining(29.0) == 0
    assert bucket.seconds_until(0.0, 1) == pytest.approx(31)
    assert bucket.seconds_until_full(0.0) == pytest.approx(90)


@given(
    per_minute=st.integers(1, 10**6),
    start=st.integers(0, 10**9),
    events=st.lists(st.tuples(st.integers(0, 90_000), st.integers(0, 2000)), max_size=40),
)
def test_it_is_the_bucket_of_whole_numbers(per_minute: int, start: int, events: list[tuple[int, int]]) -> None:
    bucket, plain, now = Bucket(per_minute), PlainBucket(per_minute, start), start

    for milliseconds, count in events:
        now += milliseconds
        there = max(0, math.floor(plain.level(now)))
        # Floats may see one a microsecond early, never late.
        assert bucket.remaining(now / 1000) in (there, there + 1)
        assert bucket.seconds_until(now / 1000, 1) == 0 or there == 0
        bucket.take(now / 1000, count)
        plain.take(now, count)

    missing = per_minute - plain.level(now)
    assert bucket.seconds_until_full(now / 1000) == pytest.approx(float(missing * 60 / per_minute), abs=1e-4)
