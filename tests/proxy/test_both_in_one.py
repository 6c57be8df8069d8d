"""A local model and other servers' models behind one port, from one TOML; and the same mounted in another application.

The other servers are a brlite process, reached over TCP, and an application of brlite's on a Unix socket.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from aiohttp import web

from brlite.app import create_app
from brlite.config.load import load_config
from brlite.config.options import Config, EngineConfig, LimitsConfig, ModelSpec, UpstreamConfig
from brlite.engine.async_engine import EngineLoop
from brlite.engine.engine import Engine
from tests.conftest import Eventually
from tests.fakes import ByteTokenizer, FakeBackend
from tests.limits import PATIENCE_SECONDS
from tests.proxy.conftest import Connect
from tests.proxy.services import GATED, LONG, Gated, Service, ask, free_port, served, write_model

FAR = """
[server]
port = {port}
[[model]]
name = "far"
path = "{path}"
build_seq = 8192
build_batch = 4
"""
BOTH = """
[server]
port = {port}
[[model]]
name = "local"
path = "{path}"
build_seq = 512
build_batch = 4

[[upstream]]
url = "{far}"
models = ["far", "org/renamed"]
rename = {{ "org/renamed" = "far" }}

[[upstream]]
url = "unix:{socket}"
models = ["socket"]

[[upstream]]
url = "http://127.0.0.1:{nobody}"
models = ["absent"]

[proxy]
aliases = {{ "gpt-4o" = "far", "gpt-4o-mini" = "socket" }}
fallbacks = {{ "absent" = ["far"] }}
"""


@asynccontextmanager
async def fake_app(name: str, **settings: Any) -> AsyncIterator[web.Application]:
    """An application that serves a fake model of this name, and what else the settings say."""
    backend, config = FakeBackend(), Config(**{"model": (ModelSpec(name=name),), **settings})
    engine = Engine(backend.info, ByteTokenizer(), EngineConfig(), LimitsConfig())
    async with EngineLoop(engine, backend) as async_engine:
        yield create_app(async_engine, config)


@asynccontextmanager
async def listening(root: web.Application, app: web.Application) -> AsyncIterator[str]:
    """The address of an application that has been mounted in another one, while inside."""
    root.add_subapp("/llm/", app)
    runner = web.AppRunner(root, handler_cancellation=True)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        yield f"http://{host}:{port}/llm"
    finally:
        await runner.cleanup()


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    # The path of a Unix socket must be short; pytest's are not.
    with tempfile.TemporaryDirectory(prefix="brlite-") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def far(folder: Path) -> Iterator[Service]:
    with served(folder, "far", FAR, path=write_model(folder / "far", seed=1)) as service:
        yield service


@pytest.fixture(scope="module")
def both(folder: Path, far: Service) -> Iterator[Service]:
    path, socket = write_model(folder / "local", seed=2), folder / "socket"
    with served(folder, "both", BOTH, path=path, far=far.url, socket=socket, nobody=free_port()) as service:
        yield service


@pytest.fixture
async def socket(folder: Path) -> AsyncIterator[None]:
    """The model `socket` on its Unix socket."""
    async with fake_app("socket") as app:
        runner = web.AppRunner(app, handler_cancellation=True)
        await runner.setup()
        try:
            await web.UnixSite(runner, folder / "socket").start()
            yield
        finally:
            await runner.cleanup()


@pytest.fixture
async def mounted(both: Service, folder: Path) -> AsyncIterator[str]:
    """The address under which another application has one that serves `near` and forwards as `both` does."""
    forwarding = load_config(folder / "both.toml")
    async with (
        fake_app("near", upstream=forwarding.upstream, proxy=forwarding.proxy) as app,
        listening(web.Application(), app) as url,
    ):
        yield url


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("is_chat", [False, True])
async def test_one_port_answers_for_local_models_and_others(
    both: Service, far: Service, socket: None, connect: Connect, is_chat: bool, is_stream: bool
) -> None:
    said = {"far": await ask(connect(far.url), "far", is_chat=is_chat)}
    said |= {model: await ask(connect(both.url), model, is_chat=is_chat) for model in ("local", "socket")}

    answers = {model: await ask(connect(both.url), model, is_chat=is_chat, is_stream=is_stream) for model in said}

    assert answers == said
    assert len(set(answers.values())) == 3


async def test_embeddings_come_from_local_models_and_others(
    both: Service, far: Service, socket: None, connect: Connect
) -> None:
    texts = ["The first", "and a second text"]

    direct = await connect(far.url).embeddings.create(model="far", input=texts)
    answers = {
        model: await connect(both.url).embeddings.create(model=model, input=texts)
        for model in ("far", "org/renamed", "local", "socket")
    }

    expected = [item.embedding for item in direct.data]
    assert [item.embedding for item in answers["far"].data] == expected
    assert [item.embedding for item in answers["org/renamed"].data] == expected
    assert [item.embedding for item in answers["local"].data] != expected
    assert len(answers["socket"].data) == 2
    assert {answer.usage.prompt_tokens for answer in answers.values()} == {direct.usage.prompt_tokens}


@pytest.mark.parametrize(
    ("asked", "answering"),
    [("gpt-4o", "far"), ("gpt-4o-mini", "socket"), ("org/renamed", "far"), ("absent", "far")],
    ids=["alias", "alias on a socket", "rename", "fallback"],
)
async def test_a_name_leads_to_the_model_that_is_to_answer(
    both: Service, socket: None, connect: Connect, asked: str, answering: str
) -> None:
    client = connect(both.url)
    said = await ask(client, answering)

    answers = [await ask(client, asked, is_stream=is_stream) for is_stream in (False, True)]

    assert answers == [said, said]


async def test_all_models_are_listed_and_one_that_nobody_has_is_not_found(
    both: Service, socket: None, connect: Connect
) -> None:
    client = connect(both.url)

    end = time.monotonic() + PATIENCE_SECONDS
    while not {"local", "far", "socket", "org/renamed"} <= {model.id for model in (await client.models.list()).data}:
        assert time.monotonic() < end  # on a busy machine a check may have taken an upstream out for a while
        await asyncio.sleep(0.1)
    with pytest.raises(openai.NotFoundError) as caught:
        await ask(client, "unheard-of")

    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("is_chat", [False, True])
async def test_mounted_in_another_application_it_forwards_too(
    far: Service, mounted: str, socket: None, connect: Connect, is_chat: bool, is_stream: bool
) -> None:
    said = {"far": await ask(connect(far.url), "far", is_chat=is_chat)}
    said |= {model: await ask(connect(mounted), model, is_chat=is_chat) for model in ("near", "socket")}

    answers = {model: await ask(connect(mounted), model, is_chat=is_chat, is_stream=is_stream) for model in said}

    assert answers == said
    assert await ask(connect(mounted), "gpt-4o", is_chat=is_chat, is_stream=is_stream) == said["far"]


async def test_mounted_in_another_application_it_says_what_is_wrong(mounted: str, connect: Connect) -> None:
    client = connect(mounted)

    with pytest.raises(openai.NotFoundError) as unknown:
        await ask(client, "unheard-of")
    with pytest.raises(openai.BadRequestError) as far_fault:
        await client.completions.create(model="far", prompt="Hi", top_p=2)
    with pytest.raises(openai.InternalServerError) as unreachable:
        await ask(client, "socket")

    assert unknown.value.code == "model_not_found"
    assert far_fault.value.param == "top_p"
    assert (unreachable.value.status_code, unreachable.value.code) == (503, "upstream_unavailable")


async def test_mounted_in_another_application_its_streams_come_event_by_event(folder: Path, connect: Connect) -> None:
    far = Gated("gated")
    async with (
        far.listening() as address,
        fake_app("near", upstream=(UpstreamConfig(url=address, models=("gated",)),)) as app,
        listening(web.Application(), app) as url,
    ):
        stream = await connect(url).completions.create(model="gated", prompt="Hi", stream=True)
        received = []
        async for event in stream:
            received.append(event.choices[0].text)
            far.gate.release()

    assert received == GATED


async def test_mounted_in_another_application_a_client_that_leaves_aborts_the_far_work(
    far: Service, mounted: str, connect: Connect, eventually: Eventually
) -> None:
    num_generated = far.metric("vllm:generation_tokens_total")

    async with await connect(mounted).completions.create(model="far", stream=True, **LONG) as stream:
        await anext(stream)
    await eventually(lambda: far.metric("vllm:num_requests_running") == 0)
    waiting = asyncio.create_task(connect(mounted).completions.create(model="far", **LONG))
    await eventually(lambda: far.metric("vllm:num_requests_running") > 0)
    waiting.cancel()

    await eventually(lambda: far.metric("vllm:num_requests_running") == 0)
    assert far.metric("vllm:generation_tokens_total") - num_generated < LONG["max_tokens"]
