"""A model whose processes are gone, as clients and probes see it: errors, 503, and what the config wants afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any, Literal

import aiohttp
import pytest

from brlite.app import create_app
from brlite.config.options import Config, EngineConfig, LimitsConfig, ModelSpec
from brlite.engine.async_engine import EngineLoop
from brlite.engine.engine import Engine
from brlite.errors import BackendLost, ModelError
from brlite.http.listen import HttpServer
from brlite.server.model_manager import ModelManager, OnProgress
from brlite.server.served_model import ModelTable, ServedModel
from tests.conftest import Eventually
from tests.engine.test_lost_backend import MortalBackend
from tests.fakes import ByteTokenizer
from tests.limits import PATIENCE_SECONDS
from tests.server.conftest import chat_body

CHAT = "/v1/chat/completions"


class Loader:
    """Loads mortal models, each when its gate is open; `error` is what the next load fails of."""

    def __init__(self) -> None:
        self.backends: list[MortalBackend] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.error: Exception | None = None

    async def known_bytes(self, spec: ModelSpec) -> int | None:
        return 1

    async def is_here(self, spec: ModelSpec) -> bool:
        return True

    async def fetch(self, spec: ModelSpec, report: OnProgress) -> None:
        """Everything is here."""

    async def measure(self, spec: ModelSpec, report: OnProgress) -> int:
        return 1

    async def load(self, spec: ModelSpec, report: OnProgress) -> EngineLoop:
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        backend = MortalBackend()
        self.backends.append(backend)
        engine = EngineLoop(Engine(backend.info, ByteTokenizer(), EngineConfig(), LimitsConfig()), backend)
        await engine.start()
        return engine

    def collect_garbage(self) -> None:
        """Nothing is left of a fake."""

    def release_memory(self) -> None:
        """Nothing is left of a fake."""


class House:
    def __init__(self, loader: Loader, manager: ModelManager, session: aiohttp.ClientSession) -> None:
        self.loader, self.manager, self._session = loader, manager, session

    async def ask(self) -> int:
        async with self._session.post(CHAT, json={**chat_body(), "model": "a"}) as response:
            return response.status

    async def status(self, path: str) -> int:
        async with self._session.get(path) as response:
            return response.status


MakeHouse = Callable[..., Awaitable[House]]


@pytest.fixture
async def make_house() -> AsyncIterator[MakeHouse]:
    async with AsyncExitStack() as stack:

        async def start(
            on_rank_failure: Literal["restart", "exit"] = "restart",
            load: Literal["start", "on_demand"] = "start",
            num_ranks: int = 2,
        ) -> House:
            devices = tuple(range(num_ranks))
            spec = ModelSpec(name="a", build_seq=64, tensor_parallel=num_ranks, devices=devices, load=load)
            engine = EngineConfig(on_rank_failure=on_rank_failure)
            models, loader = ModelTable([ServedModel(spec)]), Loader()
            manager = await stack.enter_async_context(ModelManager(models, loader, engine))
            config = Config(model=(spec,), engine=engine)
            server: Any = HttpServer(create_app(models, config), "127.0.0.1", 0, config.limits, 0.1)
            await stack.enter_async_context(server)
            await manager.start()
            session = await stack.enter_async_context(aiohttp.ClientSession(server.url))
            return House(loader, manager, session)

        yield start


async def test_a_lost_model_is_loaded_anew_and_meanwhile_the_server_is_alive_but_not_ready(
    make_house: MakeHouse, eventually: Eventually
) -> None:
    house = await make_house()
    before = [await house.status("/ready"), await house.ask()]
    house.loader.gate.clear()

    house.loader.backends[0].die()
    await eventually(lambda: house.loader.backends[0].is_closed)
    meanwhile = [await house.status("/ready"), await house.ask(), await house.status("/health")]
    house.loader.gate.set()
    await eventually(lambda: len(house.loader.backends) == 2)

    assert before == [200, 200]
    assert meanwhile == [503, 503, 200]
    assert [await house.status("/ready"), await house.ask()] == [200, 200]


async def test_a_model_on_demand_waits_for_the_next_request(make_house: MakeHouse, eventually: Eventually) -> None:
    house = await make_house(load="on_demand")
    assert await house.ask() == 200

    house.loader.backends[0].die()
    await eventually(lambda: house.loader.backends[0].is_closed)

    assert len(house.loader.backends) == 1
    assert await house.ask() == 200
    assert len(house.loader.backends) == 2


async def test_where_the_config_wants_it_the_server_has_to_end(make_house: MakeHouse) -> None:
    house = await make_house("exit")

    house.loader.backends[0].die()
    error = await asyncio.wait_for(house.manager.failure(), PATIENCE_SECONDS)

    assert str(error) == 'model a is lost, and engine.on_rank_failure is "exit"'
    assert await house.status("/ready") == 503
    assert len(house.loader.backends) == 1


async def test_a_restart_that_fails_ends_the_server_too(make_house: MakeHouse) -> None:
    house = await make_house()
    house.loader.error = ModelError("/models/a: model.safetensors is missing")

    house.loader.backends[0].die()
    error = await asyncio.wait_for(house.manager.failure(), PATIENCE_SECONDS)

    assert str(error) == "model a could not be restarted: /models/a: model.safetensors is missing"


async def test_a_model_may_be_lost_again_and_again(make_house: MakeHouse, eventually: Eventually) -> None:
    house = await make_house()

    for number in range(3):
        house.loader.backends[number].die()
        await eventually(lambda expected=number + 2: len(house.loader.backends) == expected)
        assert await house.ask() == 200


async def test_a_model_of_one_process_whose_card_fails_in_a_step_is_loaded_anew_too(
    make_house: MakeHouse, eventually: Eventually
) -> None:
    house = await make_house(num_ranks=1)
    house.loader.backends[0].lost = BackendLost("the device failed: CUDA error: an illegal memory access")

    failed = await house.ask()
    await eventually(lambda: len(house.loader.backends) == 2)

    assert failed == 500
    assert await house.ask() == 200


@pytest.mark.parametrize("num_turns", range(-4, 5))
async def test_a_model_may_be_lost_as_it_is_unloaded(num_turns: int, eventually: Eventually) -> None:
    model, loader = ServedModel(ModelSpec(name="a", build_seq=64)), Loader()
    async with ModelManager([model], loader, EngineConfig()) as manager:
        await manager.start()
        for _ in range(4):
            await asyncio.sleep(0)  # the manager waits for a change
        first, second = loader.backends[0].die, model.dismiss
        if num_turns < 0:
            first, second = second, first

        first()
        for _ in range(abs(num_turns)):
            await asyncio.sleep(0)
        second()
        await eventually(lambda: loader.backends[0].is_closed and model.takes_requests)
        with model.in_use(max_waiting=1):
            asked, failing = asyncio.create_task(model.loaded(PATIENCE_SECONDS)), asyncio.create_task(manager.failure())
            await asyncio.wait([asked, failing], return_when=asyncio.FIRST_COMPLETED)
            failures = [str(failing.result())] if failing.done() else []
            asked.cancel()
            failing.cancel()

        assert failures == []
        assert len(loader.backends) == 2


@pytest.mark.parametrize("num_turns", range(5))
async def test_a_model_lost_once_its_unload_has_begun_does_not_end_the_server(
    num_turns: int, eventually: Eventually
) -> None:
    model, loader = ServedModel(ModelSpec(name="a", build_seq=64)), Loader()
    async with ModelManager([model], loader, EngineConfig(on_rank_failure="exit")) as manager:
        await manager.start()
        for _ in range(4):
            await asyncio.sleep(0)  # the manager waits for a change

        model.dismiss()
        for _ in range(num_turns):
            await asyncio.sleep(0)
        loader.backends[0].die()
        await eventually(lambda: loader.backends[0].is_closed)

        assert manager._failure is None
