"""Two real models, tiny ones, in one server whose memory holds only one of them: through `brlite serve`'s own parts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import aiohttp
import msgspec
import pytest

from brlite.app import create_app
from brlite.backends.sizes import known_sizes
from brlite.commands.serve import ModelLoader
from brlite.config.options import Config, EngineConfig, ModelSpec
from brlite.config.warnings import GIB
from brlite.http.listen import HttpServer
from brlite.server.model_manager import ModelManager
from brlite.server.served_model import ModelTable, ServedModel
from tests.tiny_models import write_byte_tokenizer, write_tiny_model

pytestmark = pytest.mark.torch

ENGINE = EngineConfig(backend="torch", device="cpu", dtype="float32", threads=1)


@pytest.fixture
def specs(tmp_path: Path) -> tuple[ModelSpec, ...]:
    paths = {name: write_tiny_model(tmp_path / name, name) for name in ("llama", "qwen2")}
    for path in paths.values():
        write_byte_tokenizer(path)
    return tuple(
        ModelSpec(name=name, path=str(path), build_seq=64, build_batch=2, load="on_demand")
        for name, path in paths.items()
    )


@pytest.fixture
async def session(specs: tuple[ModelSpec, ...]) -> AsyncIterator[aiohttp.ClientSession]:
    sizes = [known_sizes(spec, ENGINE) for spec in specs]
    budget = 1.5 * max(size.num_bytes for size in sizes if size is not None)
    config = Config(model=specs, engine=msgspec.structs.replace(ENGINE, memory_gib=budget / GIB))
    models = ModelTable(ServedModel(spec) for spec in specs)
    async with AsyncExitStack() as stack:
        manager = await stack.enter_async_context(ModelManager(models, ModelLoader(config), config.engine))
        server = HttpServer(create_app(models, config), "127.0.0.1", 0, config.limits, 0.2)
        await stack.enter_async_context(server)
        await manager.start()
        yield await stack.enter_async_context(aiohttp.ClientSession(server.url))


async def complete(session: aiohttp.ClientSession, model: str) -> str:
    body = {"model": model, "prompt": "abc", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    async with session.post("/v1/completions", json=body) as response:
        answer = await response.json()
        assert response.status == 200, answer
        text: str = answer["choices"][0]["text"]
        return text


async def loaded_models(session: aiohttp.ClientSession) -> set[str]:
    async with session.get("/v1/models") as response:
        return {card["id"] for card in (await response.json())["data"] if card["status"] == "ready"}


async def test_two_models_take_turns_in_memory_for_one(session: aiohttp.ClientSession) -> None:
    seen = [await loaded_models(session)]
    texts = []
    for name in ("llama", "qwen2", "llama"):
        texts.append(await complete(session, name))
        seen.append(await loaded_models(session))

    assert seen == [set(), {"llama"}, {"qwen2"}, {"llama"}]
    assert texts[0] == texts[2] != texts[1]


async def test_requests_for_both_at_once_are_all_answered(session: aiohttp.ClientSession) -> None:
    names = ["llama", "qwen2"] * 4

    texts = await asyncio.gather(*(complete(session, name) for name in names))

    assert len(set(texts)) == 2
    assert [texts.index(text) for text in texts] == [names.index(name) for name in names]


async def test_a_stream_begins_before_its_model_is_there(session: aiohttp.ClientSession) -> None:
    body = {"model": "qwen2", "prompt": "abc", "max_tokens": 8, "temperature": 0, "ignore_eos": True, "stream": True}

    async with session.post("/v1/completions", json=body) as response:
        text = await response.text()

    assert text.startswith(": loading ")
    assert text.count('"finish_reason":"length"') == 1
    assert text.endswith("data: [DONE]\n\n")
