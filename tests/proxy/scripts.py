"""What upstreams may send: good answers in every form that HTTP and server-sent events allow, and all kinds of garbage.

Each script says what a client must get for it: the very same payload, a clear error, or an error event in the stream.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from tests.proxy.raw_client import DONE, Verdict
from tests.proxy.scripted import Step

HELD_BYTES = 64 * 1024  # the proxy's `held_bytes` in these tests

ERROR = ("error",)
EVENT = ("error_event",)
WHOLE = ("whole",)


class Script(NamedTuple):
    """Steps for plain requests and streams, the payload that a client may see of each, and what it must come to.

    `beside`: the same where a good replica stands beside. Without `stream` the plain step is for both, without `plain`
    the script is for streams alone. `is_slow`: the proxy's time limits have to end it.
    """

    plain: Step | None
    stream: Step | None = None
    plain_verdicts: tuple[Verdict, ...] = WHOLE
    stream_verdicts: tuple[Verdict, ...] = WHOLE
    beside: tuple[Verdict, ...] | None = None
    plain_payload: bytes = b""
    stream_payload: bytes = b""
    status: int = 200
    is_slow: bool = False
    big_request: bool = False


def event(text: str, finish: str | None = None, *, spaced: bool = False) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    data = msgspec.json.encode({"id": "x", "object": "chat.completion.chunk", "choices": [choice]})
    if spaced:
        data = msgspec.json.format(data, indent=1).replace(b"\n", b"")
    return b"data: %b\n\n" % data


TOKENS = [event("A token"), event(" or two, 水は丸い 🦜🦜"), event(' with \\n and "quotes"\n'), event("", "stop")]
EVENTS = b"".join(TOKENS) + DONE
PLAIN = msgspec.json.encode(
    {
        "object": "chat.completion",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "水 🦜"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7},
    }
)
OK = b"HTTP/1.1 200 OK\r\nDate: Thu, 01 Jan 1970 00:00:00 GMT\r\n"
JSON_HEAD = OK + b"Content-Type: application/json\r\n"
SSE_HEAD = OK + b"Content-Type: text/event-stream; charset=utf-8\r\nCache-Control: no-cache\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
UPSTREAM_ERROR = b'{"error":{"message":"out of memory","type":"server_error","param":null,"code":null}}'


def length(body: bytes) -> bytes:
    return b"Content-Length: %d\r\n\r\n%b" % (len(body), body)


def chunks(*parts: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + end


def answer(status: bytes, body: bytes, kind: bytes = b"application/json", *headers: bytes) -> bytes:
    lines = b"".join(header + b"\r\n" for header in headers)
    return b"HTTP/1.1 %b\r\nContent-Type: %b\r\n%b%b" % (status, kind, lines, length(body))


def plain_chunked(data: bytes) -> bytes:
    return JSON_HEAD + CHUNKED + b"\r\n" + data


def sse(data: bytes) -> bytes:
    return SSE_HEAD + CHUNKED + b"\r\n" + data


def cut(data: bytes, size: int) -> Iterable[bytes]:
    return (data[at : at + size] for at in range(0, len(data), size))


GOOD_PLAIN = JSON_HEAD + length(PLAIN)
GOOD_STREAM = sse(chunks(*TOKENS, DONE))
GOOD = Script(Step(GOOD_PLAIN), Step(GOOD_STREAM), plain_payload=PLAIN, stream_payload=EVENTS)


def good(
    plain: bytes = GOOD_PLAIN,
    stream: bytes = GOOD_STREAM,
    *,
    then: str = "keep",
    plain_payload: bytes = PLAIN,
    stream_payload: bytes = EVENTS,
    piece: int = 0,
    pause: float = 0.0,
) -> Script:
    """A script whose answers must arrive."""
    steps = (Step(data, then, piece=piece, pause=pause) for data in (plain, stream))  # type: ignore[arg-type]  # a Literal
    return Script(*steps, plain_payload=plain_payload, stream_payload=stream_payload)


def good_stream(stream: bytes, payload: bytes, **options: object) -> Script:
    step = Step(stream, **options)  # type: ignore[arg-type]  # Step checks none of them, the tests show
    return Script(None, step, stream_payload=payload)


def bad(data: bytes, then: str = "close", *, is_slow: bool = False) -> Script:
    """A script that begins no answer, whatever was asked."""
    step = Step(data, then)  # type: ignore[arg-type]  # a Literal
    return Script(step, step, ERROR, ERROR, is_slow=is_slow)


def bad_stream(data: bytes, then: str = "keep", *, is_slow: bool = False, payload: bytes = EVENTS) -> Script:
    """A script whose stream begins well."""
    step = Step(data, then)  # type: ignore[arg-type]  # a Literal
    return Script(None, step, stream_verdicts=EVENT, stream_payload=payload, is_slow=is_slow)


def bad_chunks(size_line: bytes) -> Script:
    """A script whose second chunk begins with this line."""
    plain = plain_chunked(chunks(PLAIN[:20], end=b"") + size_line + PLAIN[20:] + b"\r\n0\r\n\r\n")
    stream = sse(chunks(*TOKENS[:2], end=b"") + size_line + TOKENS[2] + b"\r\n0\r\n\r\n")
    return Script(Step(plain), Step(stream), ERROR, EVENT, stream_payload=EVENTS)


def refused(data: bytes) -> Script:
    """A script after which another replica may be asked."""
    step = Step(data, is_work=False)
    return Script(step, step, ERROR, ERROR, beside=WHOLE, plain_payload=PLAIN, stream_payload=EVENTS)


def redirect(status: bytes, canary: int) -> Script:
    return bad(answer(status, b"", b"text/html", b"Location: http://127.0.0.1:%d/v1/chat/completions" % canary))


_AT_ACCEPT = {
    "closes at accept": Step(b"", "close", when="accept", is_work=False),
    "resets at accept": Step(b"", "reset", when="accept", is_work=False),
    "sends an SSH banner at accept": Step(b"SSH-2.0-OpenSSH_9.6\r\n", "stall", when="accept", is_work=False),
}
_LONG = msgspec.json.encode({"text": "x" * (4 * HELD_BYTES)})
_LONG_EVENT = event("y" * (HELD_BYTES // 2))
_BIG_EVENTS = b"".join([*TOKENS[:2], _LONG_EVENT, *TOKENS[2:]]) + DONE
_HUGE_EVENTS = b"".join([*TOKENS[:2], event("z" * (3 * HELD_BYTES)), *TOKENS[2:]]) + DONE
_ENDLESS = b"data: " + b"x" * 199_999
_MANY_CHOICES = [b'data: {"choices":[{"index":%d,"delta":{},"finish_reason":null}]}\n\n' % n for n in range(2000)]
_CRLF_EVENTS = EVENTS.replace(b"\n\n", b"\r\n\r\n")
_COMMENTED = b": hello\n\n" + b"".join(b"event: message\nid: 7\n%b: ping\n\n" % token for token in TOKENS) + DONE
_FIELDS_AFTER = b"".join(token[:-1] + b"id: 7\n\n" for token in TOKENS) + DONE
_PRETTY = b"".join(
    b"".join(b"data: %b\n" % line for line in msgspec.json.format(token[6:-2]).split(b"\n")) + b"\n" for token in TOKENS
)
_SPACED = [event(text, spaced=True) for text in "abc"]
_TWO_CHOICES = [
    b'data: {"choices":[{"index":0,"delta":{"content":"x"},"finish_reason":null}]}\n\n',
    b'data: {"choices":[{"index":1,"delta":{"content":"y"},"finish_reason":null}]}\n\n',
    b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n',
]
_EARLY = b"HTTP/1.1 413 Content Too Large\r\nContent-Type: application/json\r\n" + length(UPSTREAM_ERROR)

SCRIPTS: dict[str, Script] = {
    # Good ones.
    "a plain answer, a chunked stream": GOOD,
    "chunked answer of many small chunks": good(plain_chunked(chunks(*cut(PLAIN, 3)))),
    "bytes one by one": good(plain_chunked(chunks(*cut(PLAIN, 5))), sse(chunks(*cut(EVENTS, 7))), piece=1),
    "several events in a chunk": good_stream(sse(chunks(b"".join(TOKENS[:3]), TOKENS[3] + DONE)), EVENTS),
    "all events in one chunk": good_stream(sse(chunks(EVENTS)), EVENTS),
    "an event over several chunks": good_stream(sse(chunks(*cut(EVENTS, 11))), EVENTS),
    "chunks that end within events": good_stream(
        sse(chunks(TOKENS[0] + TOKENS[1][:9], TOKENS[1][9:], *TOKENS[2:], DONE)), EVENTS
    ),
    "events with CR LF": good_stream(sse(chunks(*cut(_CRLF_EVENTS, 13))), _CRLF_EVENTS),
    "events with CR LF, a chunk each": good_stream(
        sse(chunks(*(e + b"\r\n\r\n" for e in _CRLF_EVENTS.split(b"\r\n\r\n")[:-1]))), _CRLF_EVENTS
    ),
    "comments, event and id lines": good_stream(sse(chunks(_COMMENTED)), _COMMENTED),
    "id lines after the data": good_stream(
        sse(chunks(*(e + b"\n\n" for e in _FIELDS_AFTER.split(b"\n\n")[:-1]))), _FIELDS_AFTER
    ),
    "data over several lines": good_stream(sse(chunks(_PRETTY, DONE)), _PRETTY + DONE),
    "data over several lines, a chunk each": good_stream(
        sse(chunks(*(e + b"\n\n" for e in _PRETTY.split(b"\n\n")[:-1]), DONE)), _PRETTY + DONE
    ),
    "no space after data": good_stream(
        sse(chunks(EVENTS.replace(b"data: ", b"data:"))), EVENTS.replace(b"data: ", b"data:")
    ),
    "no [DONE]": good_stream(sse(chunks(*TOKENS)), EVENTS),
    "no [DONE], until the end of the connection": good_stream(
        SSE_HEAD + b"\r\n" + b"".join(TOKENS), EVENTS, then="close"
    ),
    "lines that are no fields": good_stream(
        sse(chunks(*TOKENS[:2], b"\x00\xff\xfe garbage\n\n", *TOKENS[2:], DONE)),
        b"".join(TOKENS[:2]) + b"\x00\xff\xfe garbage\n\n" + b"".join(TOKENS[2:]) + DONE,
    ),
    "unknown fields and fields without a colon": good_stream(
        sse(chunks(*(b"x-trace: 1\ndata\nretry\n" + token for token in TOKENS), DONE)),
        b"".join(b"x-trace: 1\ndata\nretry\n" + token for token in TOKENS) + DONE,
    ),
    "a byte order mark": good_stream(
        sse(chunks(b"\xef\xbb\xbf" + TOKENS[0], *TOKENS[1:], DONE)), b"\xef\xbb\xbf" + EVENTS
    ),
    "CR LF and LF by turns": good_stream(
        sse(chunks(*(token[:-2] + b"\n\r\n" for token in TOKENS), DONE)),
        b"".join(token[:-2] + b"\n\r\n" for token in TOKENS) + DONE,
    ),
    "no chunk after [DONE]": good_stream(sse(chunks(*TOKENS, DONE, end=b"")), EVENTS, then="close"),
    "a reset after [DONE]": good_stream(sse(chunks(*TOKENS, DONE, end=b"")), EVENTS, then="reset"),
    "garbage after [DONE]": good_stream(sse(chunks(*TOKENS, DONE, end=b"zz\r\n")), EVENTS, then="close"),
    "no end after [DONE]": good_stream(sse(chunks(*TOKENS, DONE, end=b"")), EVENTS, then="stall")._replace(
        is_slow=True
    ),
    "100 Continue first": good(
        b"HTTP/1.1 100 Continue\r\n\r\n" + GOOD_PLAIN, b"HTTP/1.1 100 Continue\r\n\r\n" + GOOD_STREAM
    ),
    "103 Early Hints, byte by byte": good(
        b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" * 2 + GOOD_PLAIN,
        b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" * 2 + GOOD_STREAM,
        piece=1,
    ),
    "HTTP/1.0 until the connection ends": good(
        b"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n" + PLAIN,
        b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + EVENTS,
        then="close",
    ),
    "until the connection ends": good(
        JSON_HEAD + b"Connection: close\r\n\r\n" + PLAIN,
        SSE_HEAD + b"Connection: close\r\n\r\n" + EVENTS,
        then="close",
        piece=17,
    ),
    "a stream with a Content-Length": good_stream(SSE_HEAD + length(EVENTS), EVENTS, piece=19),
    "Connection: close": good(JSON_HEAD + b"Connection: close\r\n" + length(PLAIN), then="close"),
    "closes after the answer without a word": good(then="close"),
    "the length in capitals between spaces": good(
        JSON_HEAD + b"CONTENT-LENGTH: \t%d \t\r\n\r\n%b" % (len(PLAIN), PLAIN),
        SSE_HEAD + b"content-length:%d \r\n\r\n%b" % (len(EVENTS), EVENTS),
    ),
    "trailers": good(
        plain_chunked(chunks(PLAIN, end=b"0\r\nX-Sum: 1\r\nX-Other: 2\r\n\r\n")),
        sse(chunks(*TOKENS, DONE, end=b"0\r\nX-Sum: 1\r\n\r\n")),
    ),
    "chunk extensions": good(
        plain_chunked(b'%x;a=b;c="d"\r\n%b\r\n0;last\r\n\r\n' % (len(PLAIN), PLAIN)),
        sse(b"%x ;a\r\n%b\r\n0\r\n\r\n" % (len(EVENTS), EVENTS)),
    ),
    "sizes in capitals with zeros before": good(
        plain_chunked(b"%08X\r\n%b\r\n000\r\n\r\n" % (len(PLAIN), PLAIN)),
        sse(b"%06X\r\n%b\r\n0\r\n\r\n" % (len(EVENTS), EVENTS)),
    ),
    "a slow but steady drip": Script(
        Step(GOOD_PLAIN, piece=60, pause=0.1),
        Step(GOOD_STREAM, piece=200, pause=0.1),
        plain_payload=PLAIN,
        stream_payload=EVENTS,
        is_slow=True,
    ),
    "gzip, though nobody asked for it": Script(
        Step(JSON_HEAD + b"Content-Encoding: gzip\r\n" + length(gzip.compress(PLAIN, mtime=0))),
        Step(SSE_HEAD + b"Content-Encoding: gzip\r\n" + CHUNKED + b"\r\n" + chunks(gzip.compress(EVENTS, mtime=0))),
        stream_verdicts=ERROR,
        plain_payload=gzip.compress(PLAIN, mtime=0),
    ),
    "a long answer": Script(Step(JSON_HEAD + length(_LONG)), plain_payload=_LONG),
    "a long answer in chunks": Script(Step(plain_chunked(chunks(*cut(_LONG, 9999)))), plain_payload=_LONG),
    "a long answer until the connection ends": Script(Step(JSON_HEAD + b"\r\n" + _LONG, "close"), plain_payload=_LONG),
    "a long event": good_stream(sse(chunks(*cut(_BIG_EVENTS, 9999))), _BIG_EVENTS),
    "an event that is too long to be kept": good_stream(sse(chunks(*cut(_HUGE_EVENTS, 9999))), _HUGE_EVENTS),
    "an event that is too long to be kept, in one chunk": good_stream(sse(chunks(_HUGE_EVENTS)), _HUGE_EVENTS),
    "JSON for a stream": Script(Step(GOOD_PLAIN), Step(GOOD_PLAIN), plain_payload=PLAIN, stream_payload=PLAIN),
    "a stream for a plain request": Script(Step(GOOD_STREAM), plain_payload=EVENTS),
    "an error event, then [DONE]": good_stream(
        sse(chunks(TOKENS[0], b"data: %b\n\n" % UPSTREAM_ERROR, DONE)),
        TOKENS[0] + b"data: %b\n\n" % UPSTREAM_ERROR + DONE,
    ),
    "excess bytes": good(GOOD_PLAIN + b"more", GOOD_STREAM + b"more"),
    "another answer behind the answer": good(GOOD_PLAIN + GOOD_PLAIN, GOOD_STREAM + GOOD_STREAM),
    "204": Script(Step(b"HTTP/1.1 204 No Content\r\n\r\n"), Step(b"HTTP/1.1 204 No Content\r\n\r\n"), status=204),
    "an error of the client's": Script(
        Step(answer(b"422 Unprocessable", UPSTREAM_ERROR)),
        Step(answer(b"422 Unprocessable", UPSTREAM_ERROR)),
        plain_payload=UPSTREAM_ERROR,
        stream_payload=UPSTREAM_ERROR,
        status=422,
    ),
    "an answer before the body was read": Script(
        Step(_EARLY, "close", when="head", pause=0.05, is_work=False),
        plain_verdicts=("whole", "error"),
        plain_payload=UPSTREAM_ERROR,
        status=413,
        big_request=True,
    ),
    # No answer, or what is none.
    **{name: Script(step, step, ERROR, ERROR, ("whole", "error"), PLAIN, EVENTS) for name, step in _AT_ACCEPT.items()},
    # Whether such an answer came before the request or after it, nobody can tell.
    "answers at accept, unasked": Script(
        Step(GOOD_PLAIN, "stall", when="accept", is_work=False),
        plain_verdicts=("whole", "error"),
        plain_payload=PLAIN,
        is_slow=True,  # it does not answer those that come later
    ),
    "closes after the request": bad(b""),
    "resets after the request": bad(b"", "reset"),
    "never answers": bad(b"", "stall", is_slow=True),
    "half a head": bad(GOOD_PLAIN[:30]),
    "half a head, then a reset": bad(GOOD_PLAIN[:30], "reset"),
    "stalls in the head": bad(GOOD_PLAIN[:30], "stall", is_slow=True),
    "stalls after 100 Continue": bad(b"HTTP/1.1 100 Continue\r\n\r\n", "stall", is_slow=True),
    "interim answers for ever": bad(b"HTTP/1.1 102 Processing\r\n\r\n" * 50_000, "stall"),
    "500 in JSON": bad(answer(b"500 Internal Server Error", UPSTREAM_ERROR)),
    "500 in HTML": bad(answer(b"500 Internal Server Error", b"<h1>Sorry</h1>", b"text/html")),
    "500 without a body": bad(b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n"),
    "500 as a stream": bad(answer(b"500 Oops", EVENTS, b"text/event-stream")),
    "502 of a proxy": bad(answer(b"502 Bad Gateway", b"<html>nginx</html>", b"text/html"), "keep"),
    "503": refused(answer(b"503 Service Unavailable", UPSTREAM_ERROR)),
    "503 in HTML": refused(answer(b"503 Service Unavailable", b"<p>", b"text/html", b"Retry-After: 3")),
    "503 until tomorrow": refused(
        answer(b"503 Service Unavailable", b"", b"text/plain", b"Retry-After: Fri, 31 Dec 1999 23:59:59 GMT")
    ),
    "429": refused(answer(b"429 Too Many Requests", UPSTREAM_ERROR, b"application/json", b"Retry-After: 2")),
    "429, and a long number": refused(
        answer(b"429 Too Many Requests", UPSTREAM_ERROR, b"application/json", b"Retry-After: " + b"9" * 9999)
    ),
    "200 in HTML": bad(answer(b"200 OK", b"<h1>Welcome</h1>", b"text/html")),
    "200 in plain text": bad(answer(b"200 OK", b"ok", b"text/plain")),
    "200 and an empty stream": Script(Step(SSE_HEAD + length(b"")), Step(SSE_HEAD + length(b"")), EVENT, EVENT),
    "200 and nothing": bad(JSON_HEAD + length(b"")),
    "200, nothing, and no type": bad(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"),
    "200, and the connection ends": bad(b"HTTP/1.1 200 OK\r\n\r\n"),
    "200, and a stream of nothing": Script(Step(sse(chunks())), Step(sse(chunks())), EVENT, EVENT),
    "200 and half of the JSON": bad(JSON_HEAD + length(PLAIN[:-9])),
    "200 and invalid UTF-8": bad(JSON_HEAD + length(PLAIN.replace("水".encode(), b"\xe6\xb0"))),
    "another protocol": bad(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", "stall"),
    "no HTTP": bad(b"hello, this is no HTTP\r\n", "stall"),
    "no HTTP, but a head's end": bad(b"hello\r\n\r\nthere", "stall"),
    "an SSH banner": bad(b"SSH-2.0-OpenSSH_9.6\r\n", "stall"),
    "TLS": bad(b"\x15\x03\x01\x00\x02\x02\x28"),
    "HTTP/2": bad(b"\x00\x00\x12\x04\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00\x64", "stall"),
    "HTTP/0.9": bad(PLAIN),
    "HTTP/2 in words": bad(GOOD_PLAIN.replace(b"HTTP/1.1", b"HTTP/2.0")),
    "a status of two digits": bad(GOOD_PLAIN.replace(b"200 OK", b"20 OK")),
    "status 999": bad(GOOD_PLAIN.replace(b"200 OK", b"999 OK")),
    "a status line of its own": bad(GOOD_PLAIN.replace(b"HTTP/1.1 200", b"HTTP/1.1  200")),
    "bare line feeds": bad(GOOD_PLAIN.replace(b"\r\n", b"\n")),
    "a huge header": bad(OK + b"X-Big: %b\r\n" % (b"x" * 100_000) + length(PLAIN), "stall"),
    "a header without an end": bad(OK + b"X-Big: %b" % (b"x" * 100_000), "stall"),
    "two hundred headers": bad(OK + b"".join(b"X-%d: y\r\n" % n for n in range(200)) + length(PLAIN)),
    "a folded header": bad(OK + b"X-A: b\r\n c\r\n" + length(PLAIN)),
    "a space before the colon": bad(OK + b"X-A : b\r\n" + length(PLAIN)),
    "NUL in a header": bad(OK + b"X-A: \0\r\n" + length(PLAIN)),
    "CR in a header": bad(OK + b"X-A: b\rX-C: d\r\n" + length(PLAIN)),
    "two lengths": bad(JSON_HEAD + b"Content-Length: 3\r\n" + length(PLAIN)),
    "the same length twice": bad(JSON_HEAD + b"Content-Length: %d\r\n" % len(PLAIN) + length(PLAIN)),
    "a length and chunks": bad(JSON_HEAD + CHUNKED + length(chunks(PLAIN))),
    "chunks after gzip": bad(JSON_HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + chunks(PLAIN)),
    "an unknown coding": bad(JSON_HEAD + b"Transfer-Encoding: identity\r\n" + length(PLAIN)),
    **{
        f"length {value!r}": bad(JSON_HEAD + b"Content-Length: %b\r\n\r\n" % value + PLAIN)
        for value in (b"-5", b"+5", b"5, 5", b"5 5", b"0x10", b"1_0", b"", b"1e3", b"9" * 30, "٣".encode())
    },
    # Answers that end early or badly.
    "a body shorter than its length": Script(
        Step(JSON_HEAD + length(PLAIN)[:-9], "close"),
        Step(SSE_HEAD + length(EVENTS)[:-5], "close"),
        ERROR,
        EVENT,
        stream_payload=EVENTS,
    ),
    "a body that stalls": Script(
        Step(JSON_HEAD + length(PLAIN)[:-9], "stall"),
        Step(sse(chunks(*TOKENS[:2], end=b"")), "stall"),
        ERROR,
        EVENT,
        stream_payload=EVENTS,
        is_slow=True,
    ),
    "chunks without an end": Script(
        Step(plain_chunked(chunks(PLAIN, end=b"")), "close"),
        Step(sse(chunks(*TOKENS[:3], end=b"")), "close"),
        ERROR,
        EVENT,
        stream_payload=EVENTS,
    ),
    "all but the last chunk": Script(
        Step(plain_chunked(chunks(PLAIN, end=b"0\r\n")), "close"),
        Step(sse(chunks(*TOKENS, DONE, end=b"0\r\n")), "close"),
        ERROR,
        WHOLE,
        stream_payload=EVENTS,
    ),
    "JSON cut by the end of the connection": bad(JSON_HEAD + b"\r\n" + PLAIN[:-2]),
    "a long answer that is cut": Script(
        Step(JSON_HEAD + length(_LONG)[:-9], "close"), plain_verdicts=("cut",), plain_payload=_LONG
    ),
    "a long answer in chunks that is cut": Script(
        Step(plain_chunked(chunks(*cut(_LONG, 9999), end=b"")), "close"), plain_verdicts=("cut",), plain_payload=_LONG
    ),
    # The pause is time to read the answer before the reset, which drops what was not read.
    "a long answer until a reset": Script(
        Step(JSON_HEAD + b"\r\n" + _LONG, "reset", pause=0.1), plain_verdicts=("cut", "error"), plain_payload=_LONG
    ),
    "other media until a reset": Script(
        Step(OK + b"Content-Type: audio/mpeg\r\n\r\n" + _LONG[:999], "reset", pause=0.1),
        plain_verdicts=("cut", "error"),
        plain_payload=_LONG[:999],
    ),
    "JSON until a reset": Script(Step(JSON_HEAD + b"\r\n" + PLAIN, "reset", pause=0.1), plain_verdicts=ERROR),
    "a long answer with a bad chunk": Script(
        Step(plain_chunked(chunks(*cut(_LONG[:-9], 9999), end=b"zz\r\n"))), plain_verdicts=("cut",), plain_payload=_LONG
    ),
    "a long answer that stalls": Script(
        Step(JSON_HEAD + length(_LONG)[:-9], "stall"), plain_verdicts=("cut",), plain_payload=_LONG, is_slow=True
    ),
    **{
        f"chunk size {line!r}": bad_chunks(line)
        for line in (
            *(b"zz\r\n", b"-5\r\n", b"+5\r\n", b"0x5\r\n", b"5_0\r\n", b" 5\r\n", b"\r\n", b"5\n", b"5\r5\r\n"),
            *(b"5,5\r\n", b"fffffffff\r\n", b"5;\0\r\n", b"5" + b" " * 2000, "٣\r\n".encode()),
        )
    },
    "a chunk longer than its size": Script(
        Step(plain_chunked(b"5\r\n%b\r\n0\r\n\r\n" % PLAIN)),
        Step(sse(chunks(*TOKENS[:2], end=b"") + b"5\r\n%b\r\n0\r\n\r\n" % TOKENS[2])),
        ERROR,
        EVENT,
        stream_payload=EVENTS,
    ),
    "an endless trailer": Script(
        Step(plain_chunked(chunks(PLAIN, end=b"0\r\n" + b"X-T: y\r\n" * 9999)), "stall"),
        Step(sse(chunks(*TOKENS, DONE, end=b"0\r\n" + b"X-T: y\r\n" * 9999)), "stall"),
        ERROR,
        WHOLE,
        stream_payload=EVENTS,
    ),
    "a stream cut within an event": bad_stream(sse(chunks(*TOKENS[:2], TOKENS[2][:20])), "close"),
    "a stream cut within a chunk": bad_stream(sse(chunks(*TOKENS, DONE))[:-120], "close"),
    "a stream cut between events": bad_stream(sse(chunks(*TOKENS[:2], end=b"")), "close"),
    "a stream reset between events": bad_stream(sse(chunks(*TOKENS[:2], end=b"")), "reset"),
    "a stream that ends early": bad_stream(sse(chunks(*TOKENS[:2]))),
    "a stream that ends early with the connection": bad_stream(SSE_HEAD + b"\r\n" + b"".join(TOKENS[:2]), "close"),
    "half an event, then nothing": bad_stream(sse(chunks(*TOKENS[:2], TOKENS[2][:20], end=b"")), "stall", is_slow=True),
    "half a chunk, then nothing": bad_stream(sse(chunks(*TOKENS[:2], end=b"50\r\ndata: {")), "stall", is_slow=True),
    "nothing after the head": bad_stream(sse(b""), "stall", is_slow=True),
    "HTML in the stream": bad_stream(
        sse(chunks(*TOKENS[:2], b"<html>502 Bad Gateway</html>\n\n")),
        payload=b"".join(TOKENS[:2]) + b"<html>502 Bad Gateway</html>\n\n",
    ),
    "bare JSON in the stream": bad_stream(
        sse(chunks(*TOKENS[:2], b'{"error": "x"}\n\n', DONE)), payload=b"".join(TOKENS[:2]) + b'{"error": "x"}\n\n'
    ),
    "a stream of JSON lines": bad_stream(sse(chunks(*(token[6:-1] for token in TOKENS)))),
    "invalid UTF-8 in an event": bad_stream(
        sse(chunks(TOKENS[0], TOKENS[1].replace("水".encode(), b"\xe6\xb0"), *TOKENS[2:], DONE))
    ),
    "cut JSON in an event": bad_stream(sse(chunks(*TOKENS[:2], TOKENS[2][:-20] + b"\n\n", TOKENS[3], DONE))),
    "text in an event": bad_stream(sse(chunks(*TOKENS[:2], b"data: Internal Server Error\n\n", DONE))),
    "an endless line": Script(
        None,
        Step(sse(chunks(*TOKENS[:2], *[_ENDLESS[:9999]] * 20, end=b"")), "stall"),
        stream_verdicts=("cut",),
        stream_payload=b"".join(TOKENS[:2]) + _ENDLESS[:9999] * 20,
        is_slow=True,
    ),
    "an endless line in one chunk": Script(
        None,
        Step(sse(chunks(*TOKENS[:2], end=b"ffffff\r\n") + _ENDLESS), "stall"),
        stream_verdicts=("cut",),
        stream_payload=b"".join(TOKENS[:2]) + _ENDLESS,
        is_slow=True,
    ),
    "an endless line that is no event": bad_stream(sse(chunks(*TOKENS[:2], *[b"x" * 9999] * 20, end=b"")), "stall"),
    "more choices than can be remembered": bad_stream(sse(chunks(*_MANY_CHOICES)), payload=b"".join(_MANY_CHOICES)),
    "an early [DONE]": bad_stream(sse(chunks(*TOKENS[:2], DONE))),
    "an early [DONE] between spaces": bad_stream(sse(chunks(*_SPACED, DONE)), payload=b"".join(_SPACED)),
    "an early [DONE] for one of two choices": bad_stream(
        sse(chunks(*_TWO_CHOICES, DONE)), payload=b"".join(_TWO_CHOICES)
    ),
    "[DONE] and nothing else": bad_stream(sse(chunks(DONE)), payload=b""),
    "events after [DONE]": bad_stream(sse(chunks(*TOKENS[:3], DONE, TOKENS[3])), payload=b"".join(TOKENS[:3])),
    "a bad stream after a good half": bad_stream(sse(chunks(*TOKENS[:2]) + b"garbage")),
    "a stream framed twice": bad(SSE_HEAD + CHUNKED + length(chunks(EVENTS))),
}
