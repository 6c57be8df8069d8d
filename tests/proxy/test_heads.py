"""Heads are read strictly, cleaned of what is not for the next one, and remembered but for their length."""

from __future__ import annotations

import pytest

from brlite.errors import UpstreamError
from brlite.proxy.heads import Heads, read_answer, read_request, status_line

REQUEST = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n%b\r\n"
ANSWER = b"HTTP/1.1 200 OK\r\n%b\r\n"


def lines_to_upstreams(*fields: bytes) -> bytes:
    head = read_request(REQUEST % b"".join(field + b"\r\n" for field in fields))
    assert head is not None
    return head.lines_for_upstreams("id-1", b"1.1 brlite-x")


@pytest.mark.parametrize(
    "field",
    [
        b"Authorization: Bearer secret",
        b"X-Api-Key: secret",
        b"Cookie: a=b",
        b"Connection: close",
        b"Keep-Alive: timeout=5",
        b"Proxy-Authorization: Basic eA==",
        b"TE: trailers",
        b"Transfer-Encoding: chunked",
        b"Expect: 100-continue",
        b"Accept-Encoding: gzip",
        b"X-Request-Id: theirs",
    ],
)
def test_what_is_between_the_client_and_us_stays_here(field):
    lines = lines_to_upstreams(field, b"X-Other: kept")

    assert field not in lines
    assert lines == b"X-Other: kept\r\nX-Request-Id: id-1\r\nVia: 1.1 brlite-x\r\n"


def test_what_the_connection_header_names_is_for_one_hop():
    lines = lines_to_upstreams(b"Connection: X-Hop, close", b"X-Hop: 1", b"X-Hopper: 2")

    assert b"X-Hop:" not in lines
    assert b"X-Hopper: 2\r\n" in lines


def test_a_via_that_came_is_continued():
    assert lines_to_upstreams(b"Via: 1.0 nginx").endswith(b"Via: 1.0 nginx, 1.1 brlite-x\r\n")


@pytest.mark.parametrize(
    "head",
    [
        b"POST /v1/completions HTTP/1.1\r\n\r\n",  # no host
        b"POST http://other/v1/completions HTTP/1.1\r\nHost: a\r\n\r\n",
        b"CONNECT other:443 HTTP/1.1\r\nHost: a\r\n\r\n",
        b"POST /v1/completions HTTP/2.0\r\nHost: a\r\n\r\n",
        b"POST  /v1/completions HTTP/1.1\r\nHost: a\r\n\r\n",
        REQUEST % b"A: 1\r\n folded\r\n",
        REQUEST % b"A : 1\r\n",
        REQUEST % b": 1\r\n",
        REQUEST % b"A: \x00\r\n",
        REQUEST % b"A: 1\rB: 2\r\n",
        REQUEST % b"no colon\r\n",
        REQUEST % b"Host: b\r\n",
        REQUEST % b"Content-Type: application/json\r\nContent-Type: text/plain\r\n",
        REQUEST % (b"A: 1\r\n" * 200),
    ],
)
def test_an_odd_request_is_not_read(head):
    assert read_request(head) is None


@pytest.mark.parametrize(
    "fields",
    [
        b"Content-Length: 3\r\nContent-Length: 4\r\n",
        b"Content-Length: 3\r\nContent-Length: 3\r\n",
        b"Content-Length: +3\r\n",
        b"Content-Length: 3, 3\r\n",
        b"Content-Length: 3 \r\nX: 1\r\ncontent-length: 4\r\n",
        b"CONTENT-LENGTH: 3\r\nContent-Length: 4\r\n",
    ],
)
def test_a_length_that_can_mean_two_things_is_none(fields):
    head, _ = Heads(read_request).read(REQUEST % fields)

    assert head is None


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 abc\r\n\r\n",
        b"HTTP/1.1 99 Low\r\n\r\n",
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n folded: 1\r\n\r\n",
        ANSWER % b"Content-Length: 3\r\nContent-Length: 4\r\n",
        ANSWER % (b"A: 1\r\n" * 200),
    ],
)
def test_an_odd_answer_is_the_upstreams_fault(head):
    with pytest.raises(UpstreamError):
        Heads(read_answer).read(head)


def test_heads_that_differ_in_length_only_are_one():
    heads = Heads(read_request)

    first, length = heads.read(REQUEST % b"Content-Length: 3\r\nX-A: 1\r\n")
    second, other_length = heads.read(REQUEST % b"content-length: 44\r\nX-A: 1\r\n")

    assert first is second
    assert (length, other_length) == (3, 44)


def test_what_is_remembered_is_bounded():
    heads = Heads(read_request)
    for number in range(2000):
        heads.read(REQUEST % (b"X-Trace: %d\r\n" % number))
    heads.read(REQUEST % (b"X-Long: %b\r\n" % (b"x" * 5000)))

    assert len(heads) <= 256
    assert max(map(len, heads)) < 2200


def test_what_an_answer_says_for_us_or_against_the_client_is_left_out():
    fields = (
        b"Content-Type: application/json\r\nConnection: keep-alive\r\nSet-Cookie: a=b\r\nAlt-Svc: h3\r\nX-Kept: 1\r\n"
    )

    head = read_answer(ANSWER % fields)

    assert head.lines == b"Content-Type: application/json\r\nX-Kept: 1\r\n"
    assert head.keeps_alive


def test_the_reason_is_never_the_upstreams():
    assert status_line(503) == b"HTTP/1.1 503 Service Unavailable\r\n"
    assert status_line(599) == b"HTTP/1.1 599 \r\n"
