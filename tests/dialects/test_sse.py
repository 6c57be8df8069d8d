"""The text of events: golden bytes."""

from __future__ import annotations

from brlite.dialects.sse import frame


def test_an_event_without_a_name_is_one_line_of_data() -> None:
    assert frame('{"a":"\u2028"}'.encode()) == b'data: {"a":"\\u2028"}\n\n'


def test_the_name_of_an_event_stands_before_its_data() -> None:
    assert frame(b'{"type":"ping"}', "ping") == b'event: ping\ndata: {"type":"ping"}\n\n'
