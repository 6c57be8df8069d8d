"""Streams arrive byte for byte, however they are cut on their way; what is no event, or half of one, never does."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brlite.proxy.framing import ChunkedBody, CloseBody
from brlite.proxy.splice import LAST_CHUNK, EventSplice

CUTS = st.lists(st.integers(0, 2000), max_size=20)


def event(text: str = "a", finish: str | None = None, *, index: int = 0, end: bytes = b"\n\n", **more: object) -> bytes:
    choice = {"index": index, "delta": {"content": text}, "finish_reason": finish}
    return b"data: " + json.dumps({"choices": [choice], **more}, separators=(",", ":")).encode() + end


DONE = b"data: [DONE]\n\n"
GOOD = [event("a"), event("b"), event("c", "stop"), DONE]


def chunk(payload: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(payload), payload)


def make_splice(**options: object) -> EventSplice:
    given_options = {"is_chunked": True, "max_event_bytes": 4096, "needs_finish": True, **options}
    return EventSplice(ChunkedBody(), **given_options)


def unchunked(data: bytes) -> bytes:
    return ChunkedBody().feed(data)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    borders = [0, *sorted({min(place, len(data)) for place in places}), len(data)]
    return [data[begin:end] for begin, end in pairwise(borders) if end > begin]


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n"])
def test_a_chunk_with_whole_events_goes_on_as_it_came(end):
    splice = make_splice()

    for data in (chunk(event("a", end=end)), chunk(event("b", end=end) + event("c", end=end))):
        assert splice.feed(data) is data


@given(CUTS, st.booleans())
def test_the_payload_is_the_same_however_the_bytes_come(places, is_one_chunk):
    stream = chunk(b"".join(GOOD)) if is_one_chunk else b"".join(map(chunk, GOOD))
    splice = make_splice()

    sent = b"".join(splice.feed(piece) for piece in cut(stream + LAST_CHUNK, places))

    assert unchunked(sent) == b"".join(GOOD)
    assert sent.endswith(LAST_CHUNK)
    assert splice.is_done
    assert splice.error is None
    assert splice.num_events == 3


@given(CUTS)
def test_events_spread_over_chunks_are_sent_once_they_are_whole(places):
    payload = b"".join(GOOD)
    splice = make_splice()

    for piece in cut(payload, places):
        sent = splice.feed(chunk(piece))
        assert not sent or unchunked(sent + LAST_CHUNK).endswith(b"\n\n")

    assert splice.error is None


@given(st.integers(0, 600), CUTS)
def test_a_stream_that_ends_early_is_an_error_and_only_whole_events_were_sent(length, places):
    stream = b"".join(map(chunk, GOOD)) + LAST_CHUNK
    cut_stream = stream[: min(length, len(stream) - 1)]
    splice = make_splice()

    sent = b"".join(splice.feed(piece) for piece in cut(cut_stream, places)) + splice.feed_eof()

    assert splice.error is not None
    assert not splice.is_done
    events = unchunked(sent + LAST_CHUNK)
    assert b"".join(GOOD).startswith(events)
    assert events == b"" or events.endswith(b"\n\n")


@pytest.mark.parametrize(
    "bad",
    [
        b"data: {\xff\xfe}\n\n",
        b'data: {"choices": [{"delta": {"content": "\xff"}}]}\n\n',
        b'data: {"choices": [\n\n',
        b"data: hello\n\n",
        b"<html>\n\n",
        b"data: {} {}\n\n",
        b'data: {"a":\r1}\n\n',
    ],
)
def test_what_is_no_event_ends_the_stream_behind_the_last_whole_one(bad):
    splice = make_splice()

    sent = splice.feed(chunk(event("a")) + chunk(bad))

    assert sent == chunk(event("a"))
    assert splice.error is not None


@pytest.mark.parametrize(
    "harmless",
    [
        b": keep-alive\n\n",
        b"event: ping\ndata: {}\n\n",
        b"id: 7\nretry: 100\n\n",
        b'data: {"choices": [],\ndata: "usage": null}\n\n',
        b"data:{}\n\n",
        b"\n\n",
    ],
)
def test_whatever_else_an_event_may_be_passes(harmless):
    splice = make_splice()

    assert splice.feed(chunk(harmless)) == chunk(harmless)
    assert splice.error is None


@pytest.mark.parametrize(
    ("events", "is_whole"),
    [
        (GOOD, True),
        (GOOD[:-1], True),  # no [DONE], but the answer is at its end
        ([event("a"), DONE], False),
        ([event("a")], False),
        ([DONE], False),
        ([b'data: {"error": {"message": "out of memory"}}\n\n', DONE], True),
        ([event("a", "stop"), event("b", index=1), DONE], False),
        ([event("a", "stop"), event("b", "length", index=1), DONE], True),
        ([b'data: {"text": "no choices"}\n\n', DONE], True),  # of another kind: nobody knows its end
    ],
)
def test_a_completion_is_at_its_end_when_each_choice_has_finished(events, is_whole):
    splice = make_splice()

    splice.feed(b"".join(map(chunk, events)) + LAST_CHUNK)

    assert splice.is_done == is_whole
    assert (splice.error is None) == is_whole


def test_streams_of_other_endpoints_end_as_they_like():
    splice = make_splice(needs_finish=False)

    splice.feed(chunk(b'event: response.completed\ndata: {"type": "response.completed"}\n\n') + LAST_CHUNK)

    assert splice.is_done


def test_an_event_that_never_ends_goes_on_in_parts_and_nothing_can_follow_it():
    splice = make_splice(max_event_bytes=100)

    sent = [splice.feed(chunk(b"data: " + b"x" * 200)), *(splice.feed(chunk(b"x" * 50)) for _ in range(100))]
    end = splice.feed_eof()

    assert all(sent)
    assert splice.is_within_event
    assert end == b""
    assert splice.error is not None


@given(CUTS, st.integers(0, 300))
def test_an_event_too_long_to_be_kept_arrives_as_it_is_however_the_bytes_come(places, size):
    payload = b"".join([event("a"), event("x" * size), event("b"), event("c", "stop"), DONE])
    splice = make_splice(max_event_bytes=100)

    sent = b"".join(splice.feed(chunk(piece)) for piece in cut(payload, places)) + splice.feed(LAST_CHUNK)

    assert unchunked(sent) == payload
    assert (splice.error, splice.is_done, splice.is_within_event, splice.num_events) == (None, True, False, 4)


def test_what_is_wrong_behind_a_long_event_leaves_it_open():
    splice = make_splice(max_event_bytes=100)
    splice.feed(chunk(b"data: " + b"x" * 200))

    splice.feed(chunk(b"x\n\ngarbage\n\n"))

    assert splice.error is not None
    assert splice.is_within_event


def test_choices_without_end_are_an_error():
    splice = make_splice()

    for index in range(2000):
        splice.feed(chunk(event(index=index)))

    assert splice.error == "it has more than 1024 choices"


def test_a_long_event_in_many_pieces_takes_a_time_that_grows_with_its_length():
    splice = EventSplice(CloseBody(), is_chunked=False, max_event_bytes=2**20, needs_finish=False)
    long = event("x" * 2**19)

    sent = b"".join(splice.feed(long[at : at + 4]) for at in range(0, len(long), 4))

    assert sent == long


def test_a_client_without_chunks_gets_bare_events():
    splice = EventSplice(CloseBody(), is_chunked=False, max_event_bytes=4096, needs_finish=True)

    sent = splice.feed(b"".join(GOOD)) + splice.feed_eof()

    assert sent == b"".join(GOOD)
    assert splice.is_done


def test_the_usage_that_an_event_tells_is_kept():
    splice = make_splice()

    splice.feed(chunk(event("a", "stop", usage={"prompt_tokens": 3, "completion_tokens": 5})))

    assert [json.loads(text)["usage"] for text in splice.usage_events] == [{"prompt_tokens": 3, "completion_tokens": 5}]
