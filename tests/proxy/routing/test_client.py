"""What an upstream is asked besides requests: with its own key, bounded in time and length, and never elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from brlite.config.options import ProxyConfig, UpstreamConfig
from brlite.errors import UpstreamError, UpstreamTimeout
from brlite.proxy.routing.client import UpstreamClient
from brlite.proxy.routing.upstream import Upstream
from tests.proxy.get_server import Answer, GetServer

ENDLESS = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhelloXX"  # after which no chunk can come


def make_upstream(url: str, **options: str) -> Upstream:
    return Upstream(UpstreamConfig(url=url, models=("m",), **options), ProxyConfig())


async def test_it_is_asked_with_its_own_key_for_a_path_under_its_base() -> None:
    async with (
        GetServer({"/base/v": Answer(body=b"hello")}) as server,
        UpstreamClient(make_upstream(f"{server.url}/base/v1", api_key="own"), 5) as client,
    ):
        body = await client.read("/v", 100)

    (request,) = server.asked
    assert body == b"hello"
    assert request.headers["Authorization"] == "Bearer own"
    assert request.headers["Host"] == f"127.0.0.1:{server.port}"


async def test_a_unix_socket_is_asked_like_any_other(tmp_path: Path) -> None:
    async with (
        GetServer(unix_path=str(tmp_path / "socket")) as server,
        UpstreamClient(make_upstream(server.url), 5) as client,
    ):
        status = await client.status("/health")

    assert status == 200


async def test_a_redirect_is_not_followed() -> None:
    async with (
        GetServer() as elsewhere,
        GetServer({"/m": Answer(307, headers={"Location": elsewhere.url})}) as server,
        UpstreamClient(make_upstream(server.url), 5) as client,
    ):
        status = await client.status("/m")
        with pytest.raises(UpstreamError, match="answered 307"):
            await client.read("/m", 100)

    assert status == 307
    assert elsewhere.asked == []


async def test_no_more_is_read_than_was_allowed() -> None:
    async with (
        GetServer({"/m": Answer(body=b"x" * 101)}) as server,
        UpstreamClient(make_upstream(server.url), 5) as client,
    ):
        with pytest.raises(UpstreamError, match="more than 100 bytes"):
            await client.read("/m", 100)


@pytest.fixture
async def raw_url() -> AsyncIterator[Callable[[bytes], str]]:
    """`raw_url(data)` is the address of a server that says these bytes to everybody, and no more."""
    answers: dict[str, bytes] = {}
    writers: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answers["data"])

    listener = await asyncio.start_server(serve, "127.0.0.1", 0)

    def say(data: bytes) -> str:
        answers["data"] = data
        return f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"

    yield say
    listener.close()
    for writer in writers:
        writer.transport.abort()


@pytest.mark.parametrize("data", [b"", ENDLESS, ENDLESS[:-4]], ids=["nothing", "a broken chunk", "half a chunk"])
async def test_an_answer_that_never_ends_is_given_up_in_time(raw_url: Callable[[bytes], str], data: bytes) -> None:
    async with UpstreamClient(make_upstream(raw_url(data)), 0.05) as client:
        with pytest.raises(UpstreamError):
            await client.read("/m", 100)


async def test_silence_is_a_time_out(raw_url: Callable[[bytes], str]) -> None:
    async with UpstreamClient(make_upstream(raw_url(b"")), 0.05) as client:
        with pytest.raises(UpstreamTimeout, match=r"did not answer GET /m within 0\.05 s"):
            await client.status("/m")


@pytest.mark.parametrize(
    "data", [b"garbage\nand more\r\n\r\n", b"HTTP/1.1 200 OK\r\nno header\r\n\r\n"], ids=["not HTTP", "a bad header"]
)
async def test_what_is_no_answer_is_an_error_of_one_line(raw_url: Callable[[bytes], str], data: bytes) -> None:
    async with UpstreamClient(make_upstream(raw_url(data)), 5) as client:
        with pytest.raises(UpstreamError) as caught:
            await client.status("/m")

    assert "\n" not in str(caught.value)


async def test_an_upstream_that_cannot_be_reached_is_an_error() -> None:
    async with UpstreamClient(make_upstream("http://127.0.0.1:1"), 5) as client:
        with pytest.raises(UpstreamError):
            await client.status("/m")
