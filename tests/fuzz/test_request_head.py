"""Heads of requests: what the fast path reads, aiohttp's parser reads alike; and a cut changes nothing."""

from __future__ import annotations

import asyncio
import re
from typing import cast

from aiohttp import HttpVersion10
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http import RawRequestMessage
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.http_parser import HttpRequestParser
from hypothesis import strategies as st

from brlite.config.options import LimitsConfig
from brlite.http.body import BodyBudget
from brlite.http.connection import Connection
from brlite.http.keys import ApiKeys
from brlite.http.origin_policy import OriginPolicy
from brlite.proxy.attempt import Downstream
from brlite.proxy.exchange import Exchange
from brlite.proxy.fast_path import FastPaths
from brlite.proxy.forwarder import Forwarder
from brlite.proxy.request_model import Inbound
from brlite.proxy.routing.route_table import Route
from brlite.proxy.wire.framing import FramingError, LengthBody, body_of
from brlite.proxy.wire.heads import END_OF_HEAD, Heads, num_whole_lines_bytes, read_request
from tests.fuzz.budget import PLACES, cuts, fuzz, mutated

METHODS = st.sampled_from([b"POST", b"POST", b"GET", b"HEAD", b"OPTIONS", b"PUT", b"post", b"PRI", b"CONNECT"])
TARGETS = st.sampled_from(
    [
        b"/v1/chat/completions",
        b"/v1/completions?a=b",
        b"/health",
        b"*",
        b"/",
        b"http://x/health",
        b"//x",
        b"/%00",
        b"/a#b",
    ]
)
VERSIONS = st.sampled_from([b"1.1", b"1.1", b"1.1", b"1.0", b"1.2", b"2.0", b"0.9"])
FIELDS = st.lists(
    st.sampled_from(
        [
            b"Host: a",
            b"Host: a",
            b"host:b:80",
            b"Content-Length: 13",
            b"content-length:0",
            b"Content-Length: +1",
            b"Content-Length: 1, 1",
            b"Transfer-Encoding: chunked",
            b"transfer-encoding: gzip, chunked",
            b"Content-Type: application/json",
            b"Content-Type: text/plain",
            b"Connection: close",
            b"Connection: keep-alive, X-Hop",
            b"Connection: Upgrade",
            b"Upgrade: h2c",
            b"Expect: 100-continue",
            b"Authorization: Bearer k",
            b"X-Empty:",
            b"X-Tab:\ta\t",
            b"X-Folded: a\r\n b",
            b"X-Bytes: \xe6\xb0\xb4",
            b"X Space: 1",
            b"X-Space : 1",
            b"Sec-Fetch-Site: cross-site",
            b"Accept: a",
            b"Accept: b",
        ]
    ),
    max_size=6,
)
HEADS = st.builds(
    lambda method, target, version, fields: (
        b"%b %b HTTP/%b\r\n%b\r\n" % (method, target, version, b"".join(field + b"\r\n" for field in fields))
    ),
    METHODS,
    TARGETS,
    VERSIONS,
    FIELDS,
)


def parse(data: bytes) -> RawRequestMessage | HttpProcessingError | None:
    """What aiohttp's parser makes of bytes: its message, None as long as there is none, or the error."""
    loop = asyncio.new_event_loop()
    try:
        sizes = {"max_line_size": 2**14, "max_field_size": 2**14, "max_headers": 100}
        messages, _, _ = HttpRequestParser(BaseProtocol(loop), loop, 2**16, **sizes).feed_data(data)
        return messages[0][0] if messages else None
    except HttpProcessingError as error:
        return error
    finally:
        loop.close()


@fuzz(mutated(HEADS))
def test_what_the_fast_path_reads_means_the_same_to_aiohttp(data: bytes) -> None:
    end = data.find(END_OF_HEAD) + len(END_OF_HEAD)
    head, length = Heads(read_request).read(data[:end]) if end >= len(END_OF_HEAD) else (None, None)
    if head is None:
        return
    try:
        body_of(head.fields, length, without=LengthBody(0))
    except FramingError:
        return

    message = parse(data[:end])

    assert isinstance(message, RawRequestMessage), message
    assert (message.method, message.path) == (head.method.decode(), head.target.decode())
    assert (message.version == HttpVersion10) is head.is_http_1_0
    fields: dict[bytes, bytes] = {}
    for name, value in message.raw_headers:
        joined = fields.get(name.lower())
        fields[name.lower()] = value.strip() if joined is None else joined + b", " + value.strip()
    sent_length = fields.pop(b"content-length", None)
    assert length == (None if sent_length is None else int(sent_length))
    assert fields == head.fields
    if b"upgrade" not in head.fields:
        assert head.keeps_alive is not message.should_close


@fuzz(st.tuples(mutated(HEADS), st.integers(1, 400)))
def test_the_fast_path_waits_for_no_first_line_that_aiohttp_refuses_already(case: tuple[bytes, int]) -> None:
    data, place = case
    beginning = data[:place]
    if END_OF_HEAD in beginning or num_whole_lines_bytes(beginning, 0) is None:
        return

    refusal = parse(beginning)

    # What fields mean, and whether one stands twice, is seen with the whole head.
    has_such_fields = re.search(rb"\n(?:content-length|transfer-encoding):", beginning.lower())
    assert has_such_fields or not isinstance(refusal, HttpProcessingError) or "Duplicate" in str(refusal)


class FakeWire:
    """A client's connection, whose aiohttp answers each request that it is passed at once."""

    def __init__(self) -> None:
        self.log: list[tuple[object, ...]] = []
        self.lanes: list[object] = []
        self.is_draining = False

    def pass_on(self, data: bytes) -> None:
        if self.log and self.log[-1][0] == "aiohttp":
            data = cast(bytes, self.log.pop()[1]) + data
        self.log.append(("aiohttp", data))

    def nothing(self) -> None: ...

    bytes_came = body_began = request_began = request_ended = pause_reading = resume_reading = close = nothing

    def is_closing(self) -> bool:
        return False

    def write(self, data: bytes) -> None:
        pass

    def get_extra_info(self, name: str) -> None:
        return None


class FakeForwarder:
    """Takes requests for the model `m` and answers each before it is told that it may begin."""

    def __init__(self, wire: FakeWire) -> None:
        self._wire = wire
        self.table = self
        self.upstreams = (object(),)
        self.model = "m"

    def find(self, model: str | None) -> FakeForwarder | None:
        return self if model == "m" else None

    def forward(self, inbound: Inbound, route: Route, downstream: Downstream) -> Exchange:
        self._wire.log.append(("forwarded", inbound.head.target, inbound.body))
        return cast(Exchange, _Answered(downstream))


class _Answered:
    def __init__(self, downstream: Downstream) -> None:
        self._downstream = downstream

    def start(self) -> None:
        self._downstream.answer(200, b"", b"{}")
        self._downstream.ended()


BODY = b'{"model":"m"}'
JSON = b"Content-Type: application/json\r\n"
REQUESTS = st.sampled_from(
    [
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\n%bContent-Length: 13\r\n\r\n%b" % (JSON, BODY),
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"6\r\n%b\r\n7;a=b\r\n%b\r\n0\r\nA: b\r\n\r\n" % (BODY[:6], BODY[6:]),
        b'POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 13\r\n\r\n{"model":"n"}',
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n",
        b"\x16\x03\x01",
    ]
)


def run_fast_path(pieces: list[bytes]) -> list[tuple[object, ...]]:
    """What becomes of the bytes of one connection: what is forwarded, and what aiohttp gets."""

    async def run() -> list[tuple[object, ...]]:
        wire = FakeWire()
        forwarder = cast(Forwarder, FakeForwarder(wire))
        shared = FastPaths(
            forwarder, ApiKeys(), LimitsConfig(), bodies=BodyBudget(2**26), policy=OriginPolicy(), access_log=False
        )
        fast_path = shared(cast(Connection, wire), cast(asyncio.Transport, wire))
        assert fast_path is not None
        for piece in pieces:
            fast_path.data_received(piece)
            for _ in range(8):  # a request in each turn of the loop
                fast_path.request_ended()
                await asyncio.sleep(0)
        return wire.log

    return asyncio.run(run())


@fuzz(st.tuples(mutated(st.lists(REQUESTS, min_size=1, max_size=3).map(b"".join)), PLACES))
def test_a_connection_is_read_the_same_however_its_bytes_are_cut(case: tuple[bytes, list[int]]) -> None:
    data, places = case

    whole = run_fast_path([data] if data else [])
    in_pieces = run_fast_path(cuts(data, places))

    # Of a request that never becomes whole, aiohttp may have got a part already, or none.
    forwarded = [entry for entry in whole if entry[0] == "forwarded"]
    assert [entry for entry in in_pieces if entry[0] == "forwarded"] == forwarded
    passed, passed_in_pieces = (
        b"".join(cast(bytes, entry[1]) for entry in log if entry[0] == "aiohttp") for log in (whole, in_pieces)
    )
    assert passed.startswith(passed_in_pieces) or passed_in_pieces.startswith(passed)
