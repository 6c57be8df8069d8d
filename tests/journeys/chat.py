"""A streaming chat over a real socket, with a fake model behind it: what the two journeys of a chat record."""

from __future__ import annotations

import asyncio
import json
from contextlib import AbstractContextManager

from brlite.app import create_app
from brlite.config.options import Config, ModelSpec
from brlite.engine.async_engine import EngineLoop
from brlite.engine.engine import Engine
from brlite.http.listen import HttpServer
from tests.fakes import ByteTokenizer, FakeBackend
from tests.journeys.recorder import Journey

BODY = {
    "model": "fake",
    "messages": [{"role": "user", "content": "hi there"}],
    "stream": True,
    "max_tokens": 6,
    "temperature": 0.7,
}


def run_chat(recording: AbstractContextManager[Journey]) -> Journey:
    """Send two chats on one connection and record during the second: nothing is made or imported for the first time."""
    return asyncio.run(_run_chat(recording))


async def _run_chat(recording: AbstractContextManager[Journey]) -> Journey:
    config = Config(model=(ModelSpec(name="fake", path="x", build_seq=64),))
    backend = FakeBackend()
    body = json.dumps(BODY).encode()
    request = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    engine = EngineLoop(Engine(backend.info, ByteTokenizer(), config.engine, config.limits), backend)  # type: ignore[arg-type]
    async with engine, HttpServer(create_app(engine, config), "127.0.0.1", 0, config.limits) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(request)
        await reader.readuntil(b"\r\n0\r\n\r\n")
        with recording as journey:
            writer.write(request)
            await reader.readuntil(b"\r\n0\r\n\r\n")
        writer.close()
        await writer.wait_closed()
    return journey
