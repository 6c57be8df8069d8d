"""The whole application on a real socket, with a fake model behind it."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
import anthropic
import openai
import pytest
from aiohttp import web

from brlite.app import create_app
from brlite.config.options import Config, EngineConfig, KeyConfig, LimitsConfig, ModelSpec, ServerConfig
from brlite.engine.async_engine import EngineLoop
from brlite.engine.engine import Engine
from brlite.engine.scoring import ScoringHead
from brlite.http.listen import HttpServer
from brlite.llm import AsyncEngine
from brlite.server.model_manager import GIB, ModelManager, OnProgress
from brlite.server.served_model import ModelTable, ServedModel
from tests.api_clients import NO_CERTIFICATES, openai_client
from tests.fakes import ByteTokenizer, FakeBackend
from tests.limits import PATIENCE_SECONDS

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


MakeClient = Callable[..., Awaitable[Client]]


@pytest.fixture
async def make_client() -> AsyncIterator[MakeClient]:
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
async def client(make_client: MakeClient) -> Client:
    return await make_client()


@pytest.fixture
async def api(client: Client) -> AsyncIterator[openai.AsyncOpenAI]:
    """OpenAI's client of the fake model, whose steps wait for `client.backend.gate`."""
    client.backend.gate = threading.Event()
    async with openai_client(client.url) as api:
        yield api
    client.backend.gate.set()  # else the end of the test waits for the step


def on_demand(*names: str, **fields: Any) -> list[ModelSpec]:
    return [ModelSpec(name=name, load="on_demand", build_seq=64, **fields) for name in names]


class FakeLoader:
    """Loads fakes. A model waits for its gate, if it has one, and fails with its errors, one at a time."""

    def __init__(self, sizes: dict[str, int]) -> None:
        self.known, self.unknown = sizes, dict[str, int]()
        self.gates: dict[str, asyncio.Event] = {}
        self.downloads: dict[str, asyncio.Event] = {}  # each ends when it is set
        self.errors: dict[str, list[Exception]] = {}
        self.backends: dict[str, FakeBackend] = {}
        self.loads: Counter[str] = Counter()
        self.cancelled: list[str] = []

    async def known_bytes(self, spec: ModelSpec) -> int | None:
        return self.known.get(spec.name)

    async def is_here(self, spec: ModelSpec) -> bool:
        return spec.name not in self.downloads

    async def fetch(self, spec: ModelSpec, report: OnProgress) -> None:
        report("downloading", 0.2)
        await self.downloads[spec.name].wait()

    async def measure(self, spec: ModelSpec, report: OnProgress) -> int:
        return self.unknown[spec.name]

    async def load(self, spec: ModelSpec, report: OnProgress) -> EngineLoop:
        self.loads[spec.name] += 1
        report("reading the weights", 0.4)
        try:
            await self.gates[spec.name].wait() if spec.name in self.gates else await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.cancelled.append(spec.name)
            raise
        if self.errors.get(spec.name):
            raise self.errors[spec.name].pop(0)
        backend = self.backends[spec.name] = SlowToClose()
        engine = EngineLoop(Engine(backend.info, ByteTokenizer(), EngineConfig(), LimitsConfig()), backend)  # type: ignore[arg-type]
        await engine.start()
        return engine

    def collect_garbage(self) -> None:
        """Nothing is left of a fake."""

    def release_memory(self) -> None:
        """Nothing is left of a fake."""


class SlowToClose(FakeBackend):
    """A backend whose closing waits for a gate, if there is one."""

    closing_gate: threading.Event | None = None

    def close(self) -> None:
        if self.closing_gate is not None:
            self.closing_gate.wait(timeout=PATIENCE_SECONDS)
        super().close()


class House:
    """A server of several models that come and go, and a client of it."""

    def __init__(self, models: ModelTable, manager: ModelManager, loader: FakeLoader, session: aiohttp.ClientSession):
        self.models, self.manager, self.loader, self.session = models, manager, loader, session
        self.time = 1000.0

    def hold_closing(self, model: str) -> threading.Event:
        """The closing of a loaded model waits for the event."""
        backend = self.loader.backends[model]
        assert isinstance(backend, SlowToClose)
        backend.closing_gate = threading.Event()
        return backend.closing_gate

    async def ask(self, model: str, **fields: Any) -> tuple[int, Any]:
        async with self.session.post("/v1/chat/completions", json={**chat_body(**fields), "model": model}) as response:
            answer = await response.json()
            return response.status, answer | {"retry_after": response.headers.get("Retry-After")}

    async def get(self, path: str) -> tuple[int, Any]:
        async with self.session.get(path) as response:
            return response.status, await response.json(content_type=None)

    async def lines(self, model: str, **fields: Any) -> list[str]:
        """The lines of a stream that are not empty."""
        async with self.session.post(
            "/v1/chat/completions", json={**chat_body(**fields), "model": model, "stream": True}
        ) as response:
            assert response.status == 200, await response.text()
            return [line.decode().strip() async for line in response.content if line.strip()]

    def asks(self, model: str, **fields: Any) -> asyncio.Task[tuple[int, Any]]:
        return asyncio.create_task(self.ask(model, **fields))

    async def statuses(self) -> dict[str, str]:
        _, answer = await self.get("/v1/models")
        return {card["id"]: card["status"] for card in answer["data"]}

    def num_waiting(self, model: str) -> int:
        return self.models.find(model).num_requests

    def progress(self, model: str) -> str:
        return self.models.find(model).loading.describe()


MakeHouse = Callable[..., Awaitable[House]]


@pytest.fixture
async def make_house() -> AsyncIterator[MakeHouse]:
    """`await make_house(specs, sizes={…}, budget=…, limits={…})`: sizes and budget in bytes."""
    async with AsyncExitStack() as stack:

        async def start(
            specs: list[ModelSpec],
            *,
            sizes: dict[str, int] | None = None,
            budget: int = 0,
            limits: dict[str, Any] | None = None,
            is_strict: bool = False,
            max_downloads: int = 4,
            prepare: Callable[[FakeLoader], None] = lambda loader: None,
        ) -> House:
            config = Config(
                model=tuple(specs), limits=LimitsConfig(**(limits or {})), server=ServerConfig(strict=is_strict)
            )
            loader = FakeLoader(sizes or {})
            prepare(loader)

            def clock() -> float:
                house.time += 1e-9  # no two events are at the same time
                return house.time

            engine = EngineConfig(memory_gib=budget / GIB, max_downloads=max_downloads)
            models = ModelTable(ServedModel(spec, clock=clock) for spec in specs)
            manager = ModelManager(models, loader, engine, clock=clock)
            app = create_app(models, config)
            app.on_shutdown.append(lambda _: manager.close())
            server = HttpServer(app, "127.0.0.1", 0, config.limits, 0.2)
            await stack.enter_async_context(manager)
            await stack.enter_async_context(server)
            session = await stack.enter_async_context(aiohttp.ClientSession(server.url))
            house = House(models, manager, loader, session)
            await manager.start()
            return house

        yield start


ServeToy = Callable[..., Awaitable[anthropic.AsyncAnthropic]]


@pytest.fixture
def toy_apps() -> list[web.Application]:
    """The applications that `serve_toy` has started."""
    return []


@pytest.fixture
async def serve_toy(toy_apps: list[web.Application]) -> AsyncIterator[ServeToy]:
    """`await serve_toy(keys=…, limits=…, OPTION_OF_THE_MODEL=…)` serves the toy, and returns Anthropic's client."""
    async with AsyncExitStack() as stack:

        async def start(
            keys: tuple[KeyConfig, ...] = (),
            limits: dict[str, Any] | None = None,
            engine: dict[str, Any] | None = None,
            **options: Any,
        ) -> anthropic.AsyncAnthropic:
            spec = ModelSpec(**{"name": "toy", "path": None, "build_seq": 4096, "reasoning_parser": "think", **options})
            config = Config(
                model=(spec,),
                engine=EngineConfig(name="toy", options=engine or {}),
                limits=LimitsConfig(**(limits or {})),
                key=keys,
            )
            loop = await stack.enter_async_context(AsyncEngine.from_config(config))
            toy_apps.append(create_app(loop, config))
            server = HttpServer(toy_apps[-1], "127.0.0.1", 0, config.limits, grace_seconds=0.2)
            await stack.enter_async_context(server)
            client = anthropic.AsyncAnthropic(
                base_url=server.url,
                api_key="none",
                max_retries=0,
                timeout=PATIENCE_SECONDS,
                http_client=anthropic.DefaultAsyncHttpxClient(verify=NO_CERTIFICATES),
            )
            return await stack.enter_async_context(client)

        yield start
