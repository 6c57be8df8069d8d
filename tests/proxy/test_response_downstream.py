"""The downstream of a request that aiohttp has, fed by hand."""

from __future__ import annotations

import asyncio
from typing import cast

import aiohttp
import pytest
from aiohttp import web

from brlite.config.options import LimitsConfig
from brlite.http.keys import ApiKeys
from brlite.http.listen import HttpServer
from brlite.http.middlewares import add_middlewares
from brlite.proxy.exchange import Exchange
from brlite.proxy.middleware import ResponseDownstream
from tests.limits import PATIENCE_SECONDS


class ScriptedExchange:
    """Begins an answer, writes these parts and ends, all in one later turn of the loop."""

    def __init__(self, downstream: ResponseDownstream, *parts: bytes) -> None:
        self._downstream = downstream
        self._parts = parts

    def start(self) -> None:
        asyncio.get_running_loop().call_soon(self._answer)

    def _answer(self) -> None:
        self._downstream.begin(200, b"Content-Type: text/event-stream\r\n", None)
        for part in self._parts:
            self._downstream.write(part)
        self._downstream.ended()

    def resume(self) -> None: ...


@pytest.mark.parametrize("parts", [(b"",), (b"", b""), (b"", b"data: [DONE]\n\n", b"")])
async def test_an_empty_part_does_not_keep_an_answer_from_its_end(parts: tuple[bytes, ...]) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        downstream = ResponseDownstream(request)
        exchange = ScriptedExchange(downstream, *parts)
        return await downstream.respond(cast(Exchange, exchange))

    app = web.Application()
    app.router.add_get("/", answer)
    add_middlewares(app, keys=ApiKeys(), open_paths=frozenset())
    async with HttpServer(app, "127.0.0.1", 0, LimitsConfig(), 1.0) as server, aiohttp.ClientSession() as session:
        response = await asyncio.wait_for(session.get(server.url), PATIENCE_SECONDS)
        body = await asyncio.wait_for(response.read(), PATIENCE_SECONDS)

    assert body == b"".join(parts)
