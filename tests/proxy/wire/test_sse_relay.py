"""Streams arrive byte for byte, however they are cut on their way; what is no event, or half of one, never does."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brlite.errors import UpstreamError
from brlite.proxy.stream_kinds import StreamKind, is_resumed
from brlite.proxy.wire.framing import LAST_CHUNK, ChunkedBody, CloseBody
from brlite.proxy.wire.sse_relay import COMMENT, SseRelay

CUTS = st.lists(st.integers(0, 2000), max_size=20)


def event(text: str = "a", finish: str | None = None, *, index: int = 0, end: bytes = b"\n\n", **more: object) -> bytes:
    choice = {"index": index, "delta": {"content": text}, "finish_reason": finish}
    return b"data: " + json.dumps({"choices": [choice], **more}, separators=(",", ":")).encode() + end


DONE = b"data: [DONE]\n\n"
GOOD = [event("a"), event("b"), event("c", "stop"), DONE]


def chunk(payload: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(payload), payload)


def make_splice(**options: object) -> SseRelay:
    given_options = {"is_chunked": True, "max_event_bytes": 4096, "kind": StreamKind.COMPLETIONS, **options}
    return SseRelay(ChunkedBody(), **given_options)


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
    assert splice.seen.num_events == 3


@given(CUTS, st.sampled_from([b"", b"\xef\xbb\xbf"]), st.booleans())
def test_a_comment_is_never_within_an_event_and_before_no_byte_order_mark(places, mark, is_chunked):
    stream = chunk(mark + GOOD[0]) + b"".join(map(chunk, GOOD[1:])) + LAST_CHUNK
    splice = make_splice(is_chunked=is_chunked)

    sent = [splice.comment()]
    for piece in cut(stream, places):
        sent += [splice.feed(piece), b"" if splice.is_done else splice.comment()]

    payload = b"".join(map(unchunked, filter(None, sent))) if is_chunked else b"".join(sent)
    assert payload.replace(COMMENT, b"") == b"".join(GOOD)
    assert all(part.endswith(b"\n\n") for part in payload.split(COMMENT) if part)
    assert splice.is_done


def test_no_comment_follows_the_last_event_or_the_beginning_of_one_that_is_too_long_to_be_kept():
    splice = make_splice()
    long_event = event("x" * 10_000)

    splice.feed(chunk(long_event[:9000]))
    within = splice.comment()
    splice.feed(chunk(long_event[9000:]))
    between = splice.comment()
    splice.feed(chunk(event("", "stop")) + chunk(DONE))

    assert (within, between, splice.comment()) == (b"", chunk(COMMENT), b"")


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
    stream = b"".join(map(chunk, GOOD))
    cut_stream = stream[: min(length, len(stream) - 1 - len(chunk(DONE)))]
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
        b"x-unknown: 1\ndata: {}\n\n",
        b"data\n\n",
        b"event\nid\nretry\nanything\n\n",
        b"\xef\xbb\xbfdata: {}\n\n",
        b"\xef\xbb\xbf: hello\n\n",
        b"data: {}\r\n\r\n",
        b": \xff\n\n",
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


@pytest.mark.parametrize("ends", [b"\n\n", b"\r\n\r\n", b"\r\r", b"\n\r\n", b"\r\n\n", b"\r\r\n", b"\n\r"], ids=repr)
def test_an_event_ends_with_two_line_ends_of_any_kind(ends):
    splice = SseRelay(CloseBody(), is_chunked=False, max_event_bytes=4096, kind=StreamKind.OTHER)

    assert splice.feed(b'data: {"a": 1}' + ends) == b'data: {"a": 1}' + ends
    assert splice.feed(b'data: {"b": 1}') == b""
    assert splice.seen.num_events == 1


def test_a_byte_order_mark_is_one_at_the_beginning_alone():
    splice = make_splice()

    splice.feed(chunk(b"\xef\xbb\xbfdata: [DONE\n\n"))
    assert splice.error is not None  # it is data

    splice = make_splice()
    splice.feed(chunk(event("a")) + chunk(b"\xef\xbb\xbfdata: no JSON\n\n"))
    assert splice.error is None  # it is a field of another name


def typed(name: str, **more: object) -> bytes:
    return f"event: {name}\ndata: {json.dumps({'type': name, **more})}\n\n".encode()


WHOLE_STREAMS = [
    (StreamKind.COMPLETIONS, GOOD),
    (StreamKind.MESSAGES, [typed("message_start", message={}), typed("ping"), typed("message_stop")]),
    (StreamKind.MESSAGES, [typed("message_start", message={}), typed("error", error={"type": "overloaded_error"})]),
    (StreamKind.RESPONSES, [typed("response.created"), typed("response.completed", response={"error": None})]),
    (StreamKind.RESPONSES, [typed("response.created"), typed("response.failed", response={"error": {"code": "x"}})]),
    (StreamKind.RESPONSES, [typed("response.created"), typed("response.incomplete")]),
    (StreamKind.RESPONSES, [typed("response.created"), typed("error", message="x")]),
]
ENDINGS = ["last chunk", "end", "half a chunk", "garbage", "stall"]


def ended(splice: SseRelay, ending: str) -> bytes:
    """What the client gets for this end of the upstream's connection."""
    if ending == "stall":
        return splice.end_if_whole() or b""
    if ending == "last chunk":
        return splice.feed(LAST_CHUNK)
    sent = splice.feed({"end": b"", "half a chunk": b"50\r\ndata: {", "garbage": b"zz\r\n"}[ending])
    return sent if splice.is_done or splice.error else sent + splice.feed_eof()


@pytest.mark.parametrize(("kind", "events"), WHOLE_STREAMS)
@pytest.mark.parametrize("ending", ENDINGS)
def test_after_its_last_event_a_stream_is_whole_however_its_connection_ends(kind, events, ending):
    splice = make_splice(kind=kind)

    sent = splice.feed(b"".join(map(chunk, events)))
    sent += ended(splice, ending)

    assert unchunked(sent) == b"".join(events)
    assert sent.endswith(LAST_CHUNK)
    assert splice.is_done
    assert splice.error is None
    assert splice.has_excess is (ending != "last chunk")  # the connection is not to be used again


@pytest.mark.parametrize(("kind", "events"), WHOLE_STREAMS)
@pytest.mark.parametrize("ending", ENDINGS)
def test_before_its_last_event_a_stream_is_cut_however_its_connection_ends(kind, events, ending):
    splice = make_splice(kind=kind)

    sent = splice.feed(b"".join(map(chunk, events[:1])))
    sent += ended(splice, ending)

    assert not splice.is_done
    assert unchunked(sent + LAST_CHUNK) == events[0]
    assert splice.error is not None or ending == "stall"


@pytest.mark.parametrize(
    ("path", "fields", "expected"),
    [
        (b"/v1/chat/completions", {}, False),
        (b"/v1/chat/completions", {b"last-event-id": b"0"}, False),  # the first request for a stream with numbers
        (b"/v1/chat/completions", {b"last-event-id": b"10"}, True),
        (b"/v1/responses/resp_1?stream=true&starting_after=3", {}, True),
        (b"/v1/responses/starting_after=3?stream=true", {}, False),
    ],
)
def test_a_request_resumes_a_stream_by_the_event_that_it_names(
    path: bytes, fields: dict[bytes, bytes], expected: bool
) -> None:
    assert is_resumed(path, fields) == expected


@pytest.mark.parametrize("kind", StreamKind)
def test_a_resumed_stream_may_have_no_event_left(kind):
    splice = make_splice(kind=kind, is_resumed=True)

    sent = splice.feed(LAST_CHUNK)

    assert (sent, splice.error, splice.is_done) == (LAST_CHUNK, None, True)


def test_a_resumed_stream_may_have_only_done_left():
    splice = make_splice(is_resumed=True)

    sent = splice.feed(chunk(DONE) + LAST_CHUNK)

    assert (sent, splice.error, splice.is_done) == (chunk(DONE) + LAST_CHUNK, None, True)


def test_a_resumed_stream_that_ends_with_its_connection_may_be_cut():
    splice = SseRelay(CloseBody(), is_chunked=True, max_event_bytes=4096, kind=StreamKind.COMPLETIONS, is_resumed=True)

    splice.feed_eof()

    assert splice.error == "it ends early"


@pytest.mark.parametrize("kind", [StreamKind.MESSAGES, StreamKind.RESPONSES])
def test_done_is_no_end_where_the_kind_has_another(kind):
    splice = make_splice(kind=kind)

    splice.feed(chunk(typed("ping")) + chunk(DONE) + LAST_CHUNK)

    assert splice.error is not None


@pytest.mark.parametrize("body", [ChunkedBody, CloseBody])
@pytest.mark.parametrize("is_chunked", [False, True])
@pytest.mark.parametrize("last", [event("c", "stop"), b'data: {"error": {"message": "out of memory"}}\n\n'])
def test_a_completion_that_is_whole_without_done_gets_one(body, is_chunked, last):
    splice = SseRelay(body(), is_chunked=is_chunked, max_event_bytes=4096, kind=StreamKind.COMPLETIONS)
    events = [event("a"), last]

    if body is ChunkedBody:
        sent = splice.feed(b"".join(map(chunk, events)) + LAST_CHUNK)
    else:
        sent = splice.feed(b"".join(events)) + splice.feed_eof()

    assert (unchunked(sent) if is_chunked else sent) == b"".join([*events, DONE])
    assert splice.is_done


@pytest.mark.parametrize(
    ("kind", "begin"),
    [
        (StreamKind.COMPLETIONS, b'data: {"error":{"message":"it broke'),
        (StreamKind.OTHER, b'data: {"error":{"message":"it broke'),
        (StreamKind.MESSAGES, b'event: error\ndata: {"type":"error","error":{"type":"api_error","message":"it broke'),
        (
            StreamKind.RESPONSES,
            b'event: error\ndata: {"type":"error","sequence_number":7,"code":"upstream_error","message":"it broke',
        ),
    ],
)
def test_an_error_is_said_in_the_streams_own_words_on_one_line(kind, begin):
    splice = make_splice(kind=kind)
    splice.feed(chunk(typed("response.created", sequence_number=6)))

    said = unchunked(splice.error_event(UpstreamError("it broke\u2028\x85")))

    assert said.startswith(begin + b"\\u2028\\u0085")
    assert said.endswith(DONE) is (kind in (StreamKind.COMPLETIONS, StreamKind.OTHER))


@given(CUTS)
def test_what_is_good_arrives_however_it_is_cut_before_what_is_not(places):
    stream = chunk(event("a") + event("b") + b"data: no JSON\n\n" + event("c", "stop"))
    splice = make_splice()

    sent = b"".join(splice.feed(piece) for piece in cut(stream, places) if splice.error is None)

    assert unchunked(sent + LAST_CHUNK) == event("a") + event("b")
    assert splice.error is not None


def test_streams_of_other_endpoints_end_as_they_like():
    splice = make_splice(kind=StreamKind.OTHER)

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
    assert (splice.error, splice.is_done, splice.is_within_event, splice.seen.num_events) == (None, True, False, 4)


def test_what_is_wrong_behind_a_long_event_comes_after_its_end():
    splice = make_splice(max_event_bytes=100)
    sent = splice.feed(chunk(b"data: " + b"x" * 200))

    sent += splice.feed(chunk(b"x\n\ndata: garbage\n\n"))

    assert splice.error is not None
    assert not splice.is_within_event
    assert unchunked(sent + LAST_CHUNK) == b"data: " + b"x" * 201 + b"\n\n"


def test_choices_without_end_are_an_error():
    splice = make_splice()

    for index in range(2000):
        splice.feed(chunk(event(index=index)))

    assert splice.error == "it has more than 1024 choices"


def test_a_long_event_in_many_pieces_takes_a_time_that_grows_with_its_length():
    splice = SseRelay(CloseBody(), is_chunked=False, max_event_bytes=2**20, kind=StreamKind.OTHER)
    long = event("x" * 2**19)

    sent = b"".join(splice.feed(long[at : at + 4]) for at in range(0, len(long), 4))

    assert sent == long


def test_a_client_without_chunks_gets_bare_events():
    splice = SseRelay(CloseBody(), is_chunked=False, max_event_bytes=4096, kind=StreamKind.COMPLETIONS)

    sent = splice.feed(b"".join(GOOD)) + splice.feed_eof()

    assert sent == b"".join(GOOD)
    assert splice.is_done


def test_the_usage_that_an_event_tells_is_kept():
    splice = make_splice()

    splice.feed(chunk(event("a", "stop", usage={"prompt_tokens": 3, "completion_tokens": 5})))

    assert [json.loads(text)["usage"] for text in splice.seen.parts] == [{"prompt_tokens": 3, "completion_tokens": 5}]


@pytest.mark.parametrize("size", [1, 1000])
def test_logprobs_are_no_text(size):
    splice = make_splice(max_event_bytes=10**6)
    logprobs = {"content": [{"token": "x" * size, "logprob": -1.0}]}
    texts = ["", "some", " text", ""]

    for text in texts:
        choice = {"index": 0, "delta": {"content": text}, "logprobs": logprobs if text else None}
        splice.feed(chunk(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"))

    assert splice.seen.num_text_bytes == len("".join(texts))


@pytest.mark.parametrize("size", [1, 1000])
def test_a_response_with_its_tools_is_no_text(size):
    splice = make_splice(kind=StreamKind.RESPONSES, max_event_bytes=10**6)
    deltas = [{"type": "response.output_text.delta", "delta": text, "logprobs": []} for text in ("ab", "a", "abc")]

    for each in [{"type": "response.created", "response": {"tools": ["x" * size]}}, *deltas]:
        splice.feed(chunk(b"data: " + json.dumps(each).encode() + b"\n\n"))

    assert splice.seen.num_text_bytes == 1 + 0 + 2
    assert splice.seen.num_events == 4


@pytest.mark.parametrize("size", [1, 1000])
def test_an_event_that_repeats_a_text_is_no_more_text(size):
    splice = make_splice(kind=StreamKind.RESPONSES, max_event_bytes=10**6)
    part = {"type": "output_text", "text": "x" * size, "logprobs": [{"token": "x", "logprob": -1.0}] * size}
    repeats = [
        {"type": "response.output_text.done", "text": part["text"], "logprobs": part["logprobs"]},
        {"type": "response.content_part.done", "part": part},
        {"type": "response.output_item.done", "item": {"type": "message", "content": [part]}},
    ]
    deltas = [{"type": "response.output_text.delta", "delta": text} for text in ("a", "x" * size)]

    for each in (*deltas, *repeats):
        splice.feed(chunk(b"data: " + json.dumps(each).encode() + b"\n\n"))

    assert splice.seen.num_text_bytes == size - 1
