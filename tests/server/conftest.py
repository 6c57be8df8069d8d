"""The whole application on a real socket, with a fake model behind it."""

from __future__ import annotations

import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
import openai
import pytest

from brlite.app import create_app
from brlite.config.options import Config, EngineConfig, LimitsConfig, ModelSpec
from brlite.engine.async_engine import EngineLoop
from brlite.engine.engine import Engine
from brlite.engine.scoring import ScoringHead
from brlite.http.listen import HttpServer
from tests.api_clients import openai_client
from tests.fakes import ByteTokenizer, FakeBackend

MODEL = "fake"


class Client:
    """Talks to one server; `engine` and `backend` are what stands behind it."""

    def __init__(self, session: aiohttp.ClientSession, server: HttpServer, engine: EngineLoop, backend: FakeBackend):
        self.session, self.server, self.url, self.engine, self.backend = session, server, server.url, engine, backend

    @property
    def unsent_bytes(self) -> int:
        """What the server holds for clients that do not read."""
        wires = [connection._wire for connection in self.server._connections._members]  # type: ignore[attr-defined]
        return sum(wire.get_write_buffer_size() for wire in wires)

    async def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **headers}
        async with self.session.post(self.url + path, data=data, headers=headers) as response:
            return response.status, await response.json()

    async def get(self, path: str) -> tuple[int, Any]:
        async with self.session.get(self.url + path) as response:
            return response.status, await response.json()

    async def chat(self, content: Any = "hello", **fields: Any) -> Any:
        status, answer = await self.post("/v1/chat/completions", chat_body(content, **fields))
        assert status == 200, answer
        return answer

    async def complete(self, prompt: Any = "hello", **fields: Any) -> Any:
        status, answer = await self.post("/v1/completions", completion_body(prompt, **fields))
        assert status == 200, answer
        return answer

    async def stream(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """The events of a stream, which must end with [DONE]."""
        async with self.session.post(self.url + path, json={**body, "stream": True}) as response:
            assert response.status == 200, await response.text()
            lines = [line.decode().strip() async for line in response.content]
        events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        assert events[-1] == "[DONE]"
        return [json.loads(event) for event in events[:-1]]


def chat_body(content: Any = "hello", **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": content}]
    return {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 8, **fields}


def completion_body(prompt: Any = "hello", **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": 8, **fields}


@pytest.fixture
async def make_client() -> AsyncIterator[Callable[..., Awaitable[Client]]]:
    """`await make_client(limits={…}, tokenizer=…, config={…}, next_token=…)` starts a server for the test."""
    async with AsyncExitStack() as stack:

        async def start(
            *,
            limits: dict[str, Any] | None = None,
            config: dict[str, Any] | None = None,
            tokenizer: ByteTokenizer | None = None,
            sampling_defaults: dict[str, Any] | None = None,
            scoring_head: ScoringHead | None = None,
            draft_backend: FakeBackend | None = None,
            **backend_options: Any,
        ) -> Client:
            backend = FakeBackend(**backend_options)
            settings = Config(
                **{"model": (ModelSpec(name=MODEL),), "limits": LimitsConfig(**(limits or {})), **(config or {})}
            )
            engine = Engine(
                backend.info,
                tokenizer or ByteTokenizer(),  # type: ignore[arg-type]
                EngineConfig(),
                settings.limits,
                sampling_defaults=sampling_defaults,
                scoring_head=scoring_head,
                draft_backend=draft_backend,
            )
            async_engine = await stack.enter_async_context(EngineLoop(engine, backend))
            app = create_app(async_engine, settings)
            server = HttpServer(app, "127.0.0.1", 0, settings.limits, grace_seconds=0.2)
            await stack.enter_async_context(server)
            session = await stack.enter_async_context(aiohttp.ClientSession())
            return Client(session, server, async_engine, backend)

        yield start


@pytest.fixture
async def client(make_client: Callable[..., Awaitable[Client]]) -> Client:
    return await make_client()


@pytest.fixture
async def api(client: Client) -> AsyncIterator[openai.AsyncOpenAI]:
    """OpenAI's client of the fake model, whose steps wait for `client.backend.gate`."""
    client.backend.gate = threading.Event()
    async with openai_client(client.url) as api:
        yield api
    client.backend.gate.set()  # else the end of the test waits for the step
