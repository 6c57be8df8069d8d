"""Bodies end where their framing says, however their bytes are cut; what is framed wrongly is refused."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brlite.proxy.wire.framing import ChunkedBody, CloseBody, FramingError, LengthBody, body_of

PIECES = st.lists(st.binary(min_size=1, max_size=40), max_size=8)
CUTS = st.lists(st.integers(0, 400), max_size=12)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    """The data in pieces, cut at these places."""
    borders = [0, *sorted({min(place, len(data)) for place in places}), len(data)]
    return [data[begin:end] for begin, end in pairwise(borders)]


def chunked(pieces: list[bytes], trailer: bytes = b"") -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n" + trailer + b"\r\n"


@given(PIECES, CUTS, st.sampled_from([b"", b"X-A: 1\r\nX-B: 2\r\n"]))
def test_chunks_give_their_payload_however_their_bytes_come(pieces, places, trailer):
    body = ChunkedBody()

    payload = b"".join(body.feed(piece) for piece in cut(chunked(pieces, trailer), places))

    assert payload == b"".join(pieces)
    assert body.is_done
    assert body.excess == b""
    body.feed_eof()


@given(PIECES, st.integers(0, 400))
def test_chunks_that_are_cut_are_never_taken_for_whole(pieces, place):
    data = chunked(pieces)
    body = ChunkedBody()
    body.feed(data[: min(place, len(data) - 1)])

    with pytest.raises(FramingError):
        body.feed_eof()


@given(st.binary(max_size=50), st.binary(max_size=20), CUTS)
def test_what_follows_a_body_is_not_of_it(payload, behind, places):
    body = LengthBody(len(payload))

    taken = b"".join(body.feed(piece) for piece in cut(payload + behind, places))

    assert taken == payload
    assert body.is_done
    assert body.excess == behind


@pytest.mark.parametrize(
    "data",
    [
        b"zz\r\n",
        b"-1\r\nx",
        b"+3\r\nabc\r\n",
        b"0x3\r\nabc\r\n",
        b"1_0\r\n",
        b" 3\r\nabc\r\n",
        b"3 \r\nabc\r\n",
        b"3\nabc\n",
        b"\r\n",
        b"3\r\nabcd\r\n",
        b"3\r\nabc\n\n",
        b"3;a=\x00\r\nabc\r\n",
        b"fffffffff\r\n",
        b"1" * 2000,
        b"0\r\n" + b"A: b\r\n" * 3000,
        b"1;%b\r\na\r\n0\r\n\r\n" % (b"x" * 2000),
        b"0\r\nA: b\n\r\n",
        b"0\r\nA: b\n\n",
        b"0\r\nA\r\n\r\n",
        b"0\r\n: b\r\n\r\n",
        b"0\r\nA : b\r\n\r\n",
        b"0\r\nA: b\r\n folded\r\n\r\n",
        b"0\r\nA: \x00\r\n\r\n",
        b"0\r\nA: b\rB: c\r\n\r\n",
        b"0\r\nGET /x HTTP/1.1\r\n\r\n",
        b"0\r\n\n",
        b"0\r\n\r\r\n",
    ],
)
def test_chunks_framed_in_any_other_way_are_refused(data):
    with pytest.raises(FramingError):
        ChunkedBody().feed(data)


@pytest.mark.parametrize("data", [b"{", b"\r", b"zz", b"-", b" ", b"0x", b"5\rx", b"123456789", b"5" + b" " * 2000])
def test_what_can_never_become_a_chunk_is_refused_at_once(data):
    with pytest.raises(FramingError):
        ChunkedBody().feed(data)


def test_a_body_until_the_end_of_its_connection_has_all_that_comes():
    body = CloseBody()

    assert body.feed(b"a") + body.feed(b"b") == b"ab"
    assert not body.is_done
    body.feed_eof()
    assert body.is_done


def test_a_length_that_is_not_reached_is_no_end():
    body = LengthBody(3)
    body.feed(b"ab")

    with pytest.raises(FramingError):
        body.feed_eof()


@pytest.mark.parametrize("coding", [b"chunked, identity", b"gzip, chunked", b"identity", b"xchunked", b"", b"chunked,"])
def test_no_transfer_coding_but_chunked_is_known(coding):
    with pytest.raises(FramingError):
        body_of({b"transfer-encoding": coding}, None, without=LengthBody(0))


def test_a_length_beside_chunks_is_refused():
    with pytest.raises(FramingError):
        body_of({b"transfer-encoding": b"chunked"}, 3, without=LengthBody(0))
