"""Names of requests: those that clients sent, where they are harmless, or new ones."""

from __future__ import annotations

import re

import pytest

from brlite.http.request_id import IDS_AT_ONCE, client_request_id, request_ids


def test_no_id_is_given_twice_however_many_are_asked_for() -> None:
    ids = request_ids()

    given = [next(ids) for _ in range(3 * IDS_AT_ONCE + 1)]

    assert len(set(given)) == len(given)
    assert all(re.fullmatch("[0-9a-f]{32}", each) for each in given)


def test_a_harmless_id_that_was_sent_is_kept() -> None:
    assert client_request_id("trace-1.A_b") == "trace-1.A_b"


@pytest.mark.parametrize("sent", [None, "", "a b", "a\r\nX: 1", "x" * 129, "é"])
def test_any_other_is_none(sent: str | None) -> None:
    assert client_request_id(sent) is None
