"""The relay of event streams against a line-by-line reader of the HTML Standard's §9.2.6."""

from __future__ import annotations

import json
import re

from hypothesis import strategies as st

from brlite.proxy.stream_kinds import StreamKind
from brlite.proxy.wire.framing import LAST_CHUNK, ChunkedBody, CloseBody
from brlite.proxy.wire.sse_relay import SseRelay
from tests.fuzz.budget import PLACES, cuts, fuzz, mutated

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_events(payload: bytes) -> list[bytes]:
    """The data of the events that are dispatched, one line after the other."""
    events: list[bytes] = []
    data: list[bytes] = []
    lines = re.split(rb"\r\n|\n|\r", payload.removeprefix(BYTE_ORDER_MARK))
    for line in lines[:-1]:  # the last has not ended
        if line:
            name, _, value = line.partition(b":")
            if name == b"data":
                data.append(value.removeprefix(b" "))
        else:
            events.append(b"\n".join(data))
            data = []
    return [event for event in events if event.strip()]


def is_good(event: bytes) -> bool:
    if event.strip() == b"[DONE]":
        return True
    try:
        return isinstance(json.loads(event.decode(), parse_constant=_refuse), object)
    except (ValueError, UnicodeDecodeError):
        return False


def _refuse(text: str) -> object:
    raise ValueError(text)


LINE_ENDS = st.sampled_from([b"\n", b"\n", b"\n", b"\r\n", b"\r"])
DATA = st.sampled_from(
    [
        b"{}",
        b'{"choices":[{"index":0,"finish_reason":null}]}',
        b'{"choices":[{"index":0,"finish_reason":"stop"}]}',
        b'{"choices":[{"index":1}],"usage":{"prompt_tokens":1}}',
        b'{"error":{"message":"x"}}',
        '{"text":"水\u2028🦜"}'.encode(),
        b'{"type":"message_stop"}',
        b'{"type":"response.completed","sequence_number":3}',
        b"[DONE]",
        b"[1,",
        b"no JSON",
        b"",
        b" ",
    ]
)
LINES = st.one_of(
    st.builds(b"data: %b".__mod__, DATA),
    st.builds(b"data:%b".__mod__, DATA),
    st.sampled_from(
        [b": comment", b"event: ping", b"id: 7", b"retry: 1", b"data", b"x-y: 1", b"nothing", b":", b"\xff"]
    ),
    st.binary(max_size=8),
)
EVENTS = st.builds(
    lambda lines, ends, last: b"".join(line + end for line, end in zip(lines, ends, strict=True)) + last,
    st.lists(LINES, min_size=4, max_size=4),
    st.lists(LINE_ENDS, min_size=4, max_size=4),
    LINE_ENDS,
)
PLAIN_EVENTS = st.builds(b"data: %b\n\n".__mod__, DATA)
PAYLOADS = mutated(
    st.builds(
        lambda mark, events: mark + b"".join(events),
        st.sampled_from([b"", b"", BYTE_ORDER_MARK]),
        st.lists(PLAIN_EVENTS | PLAIN_EVENTS | EVENTS, max_size=6),
    )
)
CASES = st.tuples(PAYLOADS, PLACES, PLACES, st.sampled_from(StreamKind), st.booleans(), st.booleans())


def relay(pieces: list[bytes], kind: StreamKind, is_chunked: bool, has_chunks: bool) -> tuple[bytes, SseRelay]:
    body = ChunkedBody() if has_chunks else CloseBody()
    splice = SseRelay(body, is_chunked=is_chunked, max_event_bytes=10**6, kind=kind)
    sent = b""
    for piece in pieces:
        if splice.error is None and not splice.is_done:
            sent += splice.feed(piece)
    if splice.error is None and not splice.is_done:
        sent += splice.feed_eof()
    if is_chunked:
        client = ChunkedBody()
        sent = client.feed(sent if splice.is_done else sent + LAST_CHUNK)
        assert client.is_done, "what is sent is framed"
        assert not client.excess
    return sent, splice


@fuzz(CASES)
def test_whole_events_arrive_as_they_came_and_the_same_however_they_are_cut(
    case: tuple[bytes, list[int], list[int], StreamKind, bool, bool],
) -> None:
    payload, chunk_places, places, kind, is_chunked, has_chunks = case
    wire = payload
    if has_chunks:
        wire = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in cuts(payload, chunk_places)) + LAST_CHUNK

    sent, splice = relay([wire] if wire else [], kind, is_chunked, has_chunks)
    sent_cut, splice_cut = relay(cuts(wire, places), kind, is_chunked, has_chunks)

    assert sent.rstrip(b"\r\n") == sent_cut.rstrip(b"\r\n")
    assert (splice.error, splice.is_done, splice.seen.num_events) == (
        splice_cut.error,
        splice_cut.is_done,
        splice_cut.seen.num_events,
    )
    own = b"data: [DONE]\n\n"
    if splice.is_done and not payload.startswith(sent):
        assert kind is StreamKind.COMPLETIONS
        assert sent.endswith(own)
        sent = sent[: -len(own)]
    assert payload.startswith(sent), "byte for byte"
    expected = read_events(payload)
    events = read_events(sent)
    assert events == expected[: len(events)]
    assert all(map(is_good, events))
    if splice.is_done and splice.error is None and not splice.has_excess:
        assert events == expected, "a whole stream has all of its events"
