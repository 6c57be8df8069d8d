"""Heads are read strictly, cleaned of what is not for the next one, and remembered but for their length."""

from __future__ import annotations

import pytest

from brlite.errors import UpstreamError
from brlite.proxy.wire.heads import Heads, read_answer, read_request, status_line

REQUEST = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n%b\r\n"
ANSWER = b"HTTP/1.1 200 OK\r\n%b\r\n"


def lines_to_upstreams(*fields: bytes, more: tuple[str, ...] = ()) -> bytes:
    head = read_request(REQUEST % b"".join(field + b"\r\n" for field in fields))
    assert head is not None
    return head.lines_for_upstreams("id-1", b"1.1 brlite-x", more)


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
    lines = lines_to_upstreams(field, b"Accept: kept", more=("*",))  # whatever the config says

    assert lines == b"Accept: kept\r\nX-Request-Id: id-1\r\nVia: 1.1 brlite-x\r\n"


@pytest.mark.parametrize(
    "field",
    [
        b"OpenAI-Organization: org-1",
        b"OpenAI-Project: proj-1",
        b"X-Original-URL: /admin",
        b"X-Rewrite-URL: /admin",
        b"X-HTTP-Method-Override: DELETE",
        b"X-Forwarded-Host: evil.example",
        b"X-Forwarded-For: 127.0.0.1",
        b"Forwarded: for=127.0.0.1",
        b"X-Real-IP: 127.0.0.1",
        b"api-key: secret",
        b"x-goog-api-key: secret",
        b"Authorization2: secret",
        b"Origin: https://evil.example",
        b"Sec-Fetch-Site: cross-site",
        b"X-data-parallel-rank: 3",
        b"Range: bytes=0-1",
        b"Acceptor: 1",
        b"X-Accept: 1",
    ],
)
def test_a_header_that_may_steer_an_upstream_stays_here(field):
    assert field.split(b":")[0].lower() not in lines_to_upstreams(field).lower()


@pytest.mark.parametrize(
    "field",
    [
        b"Content-Type: application/json",
        b"ACCEPT: text/event-stream",
        b"traceparent: 00-a-b-01",
        b"tracestate: a=1",
        b"User-Agent: OpenAI/Python 2",
        b"anthropic-version: 2023-06-01",
        b"Anthropic-Beta: a,b",
        b"OpenAI-Beta: assistants=v2",
        b"Idempotency-Key: k",
    ],
)
def test_what_describes_the_request_goes_on(field):
    assert field in lines_to_upstreams(field)


def test_the_config_adds_names_and_beginnings_of_names():
    fields = (b"X-Tenant: 1", b"X-Team-A: 2", b"X-Tenants: 3")

    lines = lines_to_upstreams(*fields, more=("x-tenant", "x-team-*"))

    assert lines.startswith(b"X-Tenant: 1\r\nX-Team-A: 2\r\nX-Request-Id")


def test_a_config_that_lets_other_names_pass_holds_for_heads_that_are_remembered():
    head = read_request(REQUEST % b"X-Tenant: 1\r\n")
    assert head is not None

    seen = [head.lines_for_upstreams("i", b"v", names) for names in ((), ("x-tenant",), ())]

    assert [b"X-Tenant" in lines for lines in seen] == [False, True, False]


def test_what_the_connection_header_names_is_for_one_hop():
    lines = lines_to_upstreams(b"Connection: X-Hop, close", b"X-Hop: 1", b"X-Hopper: 2", more=("x-*",))

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

    assert len(heads._known) <= 256
    assert max(map(len, heads._known)) < 2200


@pytest.mark.parametrize(
    "field",
    [
        b"Connection: keep-alive",
        b"Set-Cookie: a=b",
        b"Set-Cookie2: a=b",
        b"Alt-Svc: h3",
        b"Clear-Site-Data: *",
        b"Strict-Transport-Security: max-age=1",
        b"Refresh: 0; url=https://evil.example",
        b"Link: <https://evil.example>; rel=preload",
        b"Location: https://evil.example",
        b"Content-Security-Policy: x",
        b"Public-Key-Pins: x",
        b"NEL: x",
        b"Report-To: x",
        b"WWW-Authenticate: Basic",
        b"Server: vLLM/0.4",
        b"X-Powered-By: x",
        b"OpenAI-Organization: org-1",
        b"Access-Control-Allow-Origin: *",
        b"Service-Worker-Allowed: /",
    ],
)
def test_what_an_answer_says_to_a_browser_or_of_the_upstream_stays_behind(field):
    head = read_answer(ANSWER % (b"Content-Type: application/json\r\n%b\r\n" % field))

    assert head.lines_for_clients() == b"Content-Type: application/json\r\n"
    assert head.keeps_alive


@pytest.mark.parametrize("field", [b"Retry-After: 1", b"x-ratelimit-remaining-tokens: 3", b"x-should-retry: true"])
def test_what_an_answer_says_to_the_client_comes_back(field):
    assert read_answer(ANSWER % (field + b"\r\n")).lines_for_clients() == field + b"\r\n"


def test_the_config_adds_names_that_come_back_but_never_cookies():
    head = read_answer(ANSWER % b"X-Cost: 1\r\nSet-Cookie: a=b\r\n")

    assert head.lines_for_clients(("*",)) == b"X-Cost: 1\r\n"


@pytest.mark.parametrize(
    ("said", "sent"),
    [
        (b"", b"no-cache, no-transform"),
        (b"Cache-Control: no-store\r\n", b"no-store, no-transform"),
        (b"cache-control: no-cache\r\nCache-Control: private\r\n", b"no-cache, private, no-transform"),
        (b"Cache-Control: No-Transform, no-cache\r\n", b"No-Transform, no-cache"),
        (b"Cache-Control: x-no-transform\r\n", b"x-no-transform, no-transform"),
        (b"Cache-Control:\r\n", b"no-cache, no-transform"),
    ],
)
def test_a_stream_is_never_to_be_transformed(said, sent):
    lines = read_answer(ANSWER % said).lines_of_stream()

    values = [line.partition(b":")[2].strip() for line in lines.splitlines() if line.lower().startswith(b"cache-")]
    assert values == [sent]


def test_the_reason_is_never_the_upstreams():
    assert status_line(503) == b"HTTP/1.1 503 Service Unavailable\r\n"
    assert status_line(599) == b"HTTP/1.1 599 \r\n"


@pytest.mark.parametrize(
    ("version", "framing", "keeps_alive"),
    [
        (b"1.0", b"Content-Length: 1", True),
        (b"1.0", b"Transfer-Encoding: chunked", False),
        (b"1.1", b"Transfer-Encoding: chunked", True),
    ],
)
def test_a_connection_with_chunks_in_http_1_0_is_not_kept(version, framing, keeps_alive):
    data = b"HTTP/%b 200 OK\r\nConnection: keep-alive\r\n%b\r\n\r\n" % (version, framing)

    head, _ = Heads(read_answer).read(data)

    assert head.keeps_alive is keeps_alive
