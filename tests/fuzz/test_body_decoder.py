"""Bodies: chunks against aiohttp's own parser, and what is read of JSON against Python's."""

from __future__ import annotations

import asyncio
import json
import re
from typing import NamedTuple

from aiohttp.base_protocol import BaseProtocol
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.http_parser import HttpRequestParser
from hypothesis import strategies as st

from brlite.errors import InvalidRequest
from brlite.proxy.request_model import peek, replace_model
from brlite.proxy.wire.framing import ChunkedBody, FramingError
from tests.fuzz.budget import PLACES, cuts, fuzz, mutated

SPACE_BEFORE_EXTENSION = re.compile(rb"[ \t];")  # RFC 9112 §7.1.1 wants it read; aiohttp refuses it
HEAD = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"


class Read(NamedTuple):
    """What a decoder makes of bytes. `verdict` is whole, cut or refused."""

    verdict: str
    payload: bytes
    excess: bytes = b""


def read(pieces: list[bytes]) -> Read:
    body, payload = ChunkedBody(), b""
    for index, piece in enumerate(pieces):
        try:
            payload += body.feed(piece)
        except FramingError as error:
            return Read("refused", payload + error.payload)
        if body.is_done:
            return Read("whole", payload, body.excess + b"".join(pieces[index + 1 :]))
    return Read("cut", payload)


def read_by_aiohttp(data: bytes) -> Read:
    loop = asyncio.new_event_loop()
    try:
        parser = HttpRequestParser(BaseProtocol(loop), loop, 2**20)
        try:
            messages, _, _ = parser.feed_data(HEAD + data)
        except HttpProcessingError:
            return Read("refused", b"")
        stream = messages[0][1]
        if stream.exception() is not None:
            return Read("refused", b"")
        payload = stream.read_nowait() if stream.is_eof() or stream.total_bytes else b""
        return Read("whole" if stream.is_eof() else "cut", payload)
    finally:
        loop.close()


EXTENSIONS = st.sampled_from(
    [b"", b"", b"", b";a", b";a=b;c", b";a=", b";", b" ;a", b"\t;b=c", b';a="b\\"; c"', b";\x80", b" ", b";\x00"]
)
CHUNKS = st.builds(
    lambda part, extension, zeros: b"%b%x%b\r\n%b\r\n" % (zeros, len(part), extension, part),
    st.binary(min_size=1, max_size=20),
    EXTENSIONS,
    st.sampled_from([b"", b"", b"0", b"000"]),
)
TRAILERS = st.lists(
    st.sampled_from(
        [b"A: b\r\n", b"X-Sum:1\r\n", b"A: b\n", b"no colon\r\n", b" folded\r\n", b": x\r\n", b"A : b\r\n"]
    ),
    max_size=2,
)
LASTS = st.builds(lambda extension, trailers: b"0%b\r\n%b\r\n" % (extension, b"".join(trailers)), EXTENSIONS, TRAILERS)
BEHIND = st.sampled_from([b"", b"", b"x", b"GET / HTTP/1.1\r\n"])
BODIES = mutated(
    st.builds(lambda parts, last, behind: b"".join(parts) + last + behind, st.lists(CHUNKS, max_size=4), LASTS, BEHIND)
)


@fuzz(st.tuples(BODIES, PLACES))
def test_chunks_mean_the_same_however_they_are_cut_and_nothing_that_aiohttp_refuses(
    case: tuple[bytes, list[int]],
) -> None:
    data, places = case

    ours = read([data])
    ours_cut = read(cuts(data, places))

    assert ours_cut == ours
    if ours.verdict == "whole" and not SPACE_BEFORE_EXTENSION.search(data):
        theirs = read_by_aiohttp(data[: len(data) - len(ours.excess)])
        assert (theirs.verdict, theirs.payload) == ("whole", ours.payload)


NAMES = st.sampled_from(["model", "model", "Model", "MODEL", "mod\\u0065l", "stream", "user", "messages", "x", ""])
LEAVES = st.sampled_from(
    [
        '"a"',
        '"b\\n\\u00e9"',
        "null",
        "true",
        "1",
        "-0.5e3",
        "1e999",
        "1" * 400,
        '""',
        '"model"',
        "水".join('""'),
        "NaN",
        "01",
    ]
)


def nested(values: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    arrays = st.lists(values, max_size=3).map(lambda each: f"[{','.join(each)}]")
    return arrays | st.lists(st.tuples(NAMES, values), max_size=3).map(lambda each: _object(each, ""))


SPACES = st.sampled_from(["", "", " ", "\n\t", "\r\n"])


def _object(members: list[tuple[str, str]], space: str) -> str:
    return "{" + ",".join(f'{space}"{name}"{space}:{space}{value}{space}' for name, value in members) + "}"


VALUES = LEAVES | nested(LEAVES | nested(LEAVES))
OBJECTS = st.builds(_object, st.lists(st.tuples(NAMES, VALUES | LEAVES), max_size=4), SPACES).map(str.encode)
JSON_BODIES = mutated(OBJECTS | OBJECTS | VALUES.map(str.encode))


def _refuse(text: str) -> object:
    raise ValueError(text)


def members(body: bytes) -> list[tuple[str, object]] | None:
    """The top-level members of a JSON object, doubled ones too; None for what is none."""
    try:
        pairs = json.loads(
            body.decode(), object_pairs_hook=_Pairs, parse_int=str, parse_float=str, parse_constant=_refuse
        )
    except (ValueError, UnicodeDecodeError, RecursionError):
        return None
    return list(pairs) if isinstance(pairs, _Pairs) else None


class _Pairs(list[tuple[str, object]]):
    """An object's members in their order."""


@fuzz(JSON_BODIES)
def test_a_body_is_taken_for_one_model_only_if_it_names_one(body: bytes) -> None:
    found = members(body)
    models = [(name, value) for name, value in found or () if name.lower() == "model"]

    try:
        seen = peek(body)
    except InvalidRequest:
        return  # who is in doubt refuses: Python takes lone surrogates and floats out of range

    assert found is not None
    assert len(models) <= 1
    assert [("model", seen.model)] == (models or [("model", None)])
    if not models:
        return
    replaced = replace_model(body, 'other "水"')
    assert dict(members(replaced) or ()) == {**dict(found), "model": 'other "水"'}


@fuzz(OBJECTS)
def test_a_good_body_is_taken(body: bytes) -> None:
    found = members(body)
    models = [(name, value) for name, value in found or () if name.lower() == "model"]
    is_plain = found is not None and models in ([], [("model", "a")], [("model", None)])

    try:
        peek(body)
        is_taken = True
    except InvalidRequest:
        is_taken = False

    assert is_taken or not is_plain
