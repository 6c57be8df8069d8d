"""Keys beside each other: what one may see and find of another, and what its many requests cost the others."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import aiohttp
import pytest

from brlite.app import create_app
from brlite.config.options import Config, EngineConfig, KeyConfig, KeysConfig, LimitsConfig, ModelSpec, ServerConfig
from brlite.engine.async_engine import EngineLoop
from brlite.engine.engine import Engine
from brlite.engine.fair_thread import FairThread
from brlite.errors import EngineError, InvalidRequest, NotReady, QueueFull
from brlite.http.listen import HttpServer
from brlite.server.load_state import LoadState
from brlite.server.served_model import ModelTable, ServedModel
from brlite.tokenizer.tokenizer import LONG_TEXT
from tests.conftest import Eventually
from tests.fakes import ByteTokenizer, FakeBackend
from tests.limits import PATIENCE_SECONDS
from tests.server.conftest import completion_body

NAMED = (
    KeyConfig(name="team-a", key="sk-a", models=("one",)),
    KeyConfig(name="team-b", key="sk-b"),
    KeyConfig(name="operator", key="sk-operator", admin=True),
)
PLAIN = KeysConfig(keys=("sk-plain",))
OPEN_METRICS = ServerConfig(metrics_need_key=False)


@asynccontextmanager
async def serving(config: Config, **backend_options: Any) -> AsyncIterator[tuple[aiohttp.ClientSession, FakeBackend]]:
    """A server of two models, `one` on a fake engine and `two` that is not loaded."""
    backend = FakeBackend(max_model_len=512, num_blocks=1024, **backend_options)
    engine = EngineLoop(Engine(backend.info, ByteTokenizer(), config.engine, config.limits), backend)  # type: ignore[arg-type]
    two = ServedModel(ModelSpec(name="two", load="on_demand"))
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(engine)
        app = create_app(ModelTable([ServedModel(ModelSpec(name="one"), engine), two]), config)
        server = await stack.enter_async_context(HttpServer(app, "127.0.0.1", 0, config.limits))
        yield await stack.enter_async_context(aiohttp.ClientSession(server.url)), backend


def shown(key: str | None) -> dict[str, str]:
    return {} if key is None else {"Authorization": f"Bearer {key}"}


async def complete(session: aiohttp.ClientSession, key: str, **fields: Any) -> tuple[int, Any]:
    body = {**completion_body(), "model": "one", **fields}
    async with session.post("/v1/completions", json=body, headers=shown(key)) as response:
        return response.status, await response.json()


@pytest.mark.parametrize(
    ("config", "key", "names"),
    [
        (Config(), None, {"one", "two"}),
        (Config(key=NAMED), None, None),
        (Config(key=NAMED), "sk-wrong", None),
        (Config(keys=PLAIN), None, None),
        (Config(keys=PLAIN), "sk-plain", {"one", "two"}),
        (Config(key=NAMED), "sk-a", {"one"}),
        (Config(key=NAMED), "sk-b", {"one", "two"}),
    ],
)
async def test_ready_names_to_nobody_what_their_key_may_not_use(
    config: Config, key: str | None, names: set[str] | None
) -> None:
    async with serving(config) as (session, _):
        async with session.get("/ready", headers=shown(key)) as response:
            answer, text = await response.json(), await response.text()
        async with session.get("/health", headers=shown(key)) as response:
            health = await response.json()

    assert (response.status, health) == (200, {"status": "alive"})
    if names is None:
        assert answer == {"status": "ready"}
    else:
        assert {each["model"] for each in answer["models"]} == names
    assert "team-" not in text


@pytest.mark.parametrize(
    ("config", "key", "sees_all"),
    [
        (Config(key=NAMED, server=OPEN_METRICS), None, False),
        (Config(key=NAMED, server=OPEN_METRICS), "sk-operator", True),
        (Config(key=NAMED), "sk-a", False),
        (Config(key=NAMED), "sk-b", False),
        (Config(key=NAMED), "sk-operator", True),
        (Config(key=NAMED, keys=PLAIN), "sk-plain", False),
        (Config(key=NAMED, keys=KeysConfig(keys=("sk-plain",), admin=True)), "sk-plain", True),
        (Config(keys=PLAIN, server=OPEN_METRICS), None, True),
        (Config(keys=PLAIN), "sk-plain", True),
        (Config(), None, True),
    ],
)
async def test_beside_named_keys_only_an_operators_sees_models_keys_and_upstreams_in_the_metrics(
    config: Config, key: str | None, sees_all: bool
) -> None:
    async with serving(config) as (session, _):
        async with session.get("/metrics", headers=shown(key)) as response:
            text = await response.text()
        async with session.get("/metrics?upstream=all", headers=shown(key)) as response:
            status = response.status

    assert "process_cpu_seconds_total" in text
    assert ('model_name="two"' in text) == sees_all
    assert ("team-b" in text) == (sees_all and bool(config.key))
    assert "sk-" not in text
    assert status == (400 if sees_all else 403)  # there are no upstreams


@pytest.mark.parametrize("config", [Config(keys=PLAIN), Config(key=NAMED), Config(key=NAMED, keys=PLAIN)])
@pytest.mark.parametrize("key", [None, "sk-wrong", ""])
@pytest.mark.parametrize("path", ["/metrics", "/metrics/", "/metrics?upstream=all"])
async def test_metrics_tell_a_client_without_a_key_nothing(config: Config, key: str | None, path: str) -> None:
    async with serving(config) as (session, _), session.get(path, headers=shown(key)) as response:
        text = await response.text()

    assert response.status == 401
    assert not any(word in text for word in ("one", "two", "team-", "vllm:", "brlite:"))


@pytest.mark.parametrize("is_shared", [False, True])
async def test_another_keys_prompt_does_not_show_as_cached(is_shared: bool) -> None:
    config = Config(key=NAMED, keys=KeysConfig(keys=("p-1", "p-2")), engine=EngineConfig(share_prefix_cache=is_shared))
    prompt = "a beginning that is long enough to be cached, word for word"
    cached = []

    async with serving(config) as (session, _):
        for key in ("sk-a", "sk-a", "sk-b", "p-1", "p-2", "p-2"):
            _, answer = await complete(session, key, prompt=prompt, max_tokens=1)
            details = answer["usage"].get("prompt_tokens_details") or {}
            cached.append(details.get("cached_tokens", 0) > 0)

    assert cached == [False, True, is_shared, is_shared, is_shared, True]


async def test_one_keys_full_queue_and_many_prompts_keep_no_other_key_out(eventually: Eventually) -> None:
    config = Config(key=NAMED, limits=LimitsConfig(max_waiting=8))
    async with serving(config, max_num_seqs=2) as (session, backend):
        backend.gate = threading.Event()
        greedy = [asyncio.create_task(complete(session, "sk-a", prompt=["x"] * 16, max_tokens=30)) for _ in range(12)]
        assert await asyncio.to_thread(backend.has_begun.wait, PATIENCE_SECONDS)
        await eventually(lambda: sum(task.done() for task in greedy) >= 2)  # they were refused: the queue is full

        small = asyncio.create_task(complete(session, "sk-b", prompt="y", max_tokens=1))
        await asyncio.sleep(0.05)
        backend.gate.set()
        status, _ = await small
        num_open = sum(not task.done() for task in greedy)
        statuses = [status for status, _ in await asyncio.gather(*greedy)]

    assert status == 200
    assert num_open > 4  # it did not wait for them
    assert set(statuses) == {200, 429}


async def test_the_thread_that_encodes_is_shared_in_turns_and_work_that_nobody_waits_for_is_dropped() -> None:
    thread, gate, done = FairThread("test", lambda: NotReady("stopping")), threading.Event(), list[str]()

    def work(name: str) -> str:
        done.append(name)
        return name

    first = asyncio.create_task(thread.run("a", lambda: gate.wait(PATIENCE_SECONDS)))
    many = [asyncio.create_task(thread.run("a", lambda number=number: work(f"a{number}"))) for number in range(5)]
    other = asyncio.create_task(thread.run("b", lambda: work("b")))
    await asyncio.sleep(0)
    many[0].cancel()
    await asyncio.sleep(0)
    gate.set()
    await asyncio.gather(first, other, *many[1:])
    thread.close()

    assert done == ["a1", "b", "a2", "a3", "a4"]
    with pytest.raises(NotReady):
        await thread.run("a", lambda: None)


async def test_work_that_fails_after_the_close_ends_with_the_error_of_the_close() -> None:
    thread, gate = FairThread("test", lambda: NotReady("stopping")), threading.Event()

    def fail() -> None:
        gate.wait(PATIENCE_SECONDS)
        raise InvalidRequest("the child process was ended")

    failing = asyncio.create_task(thread.run("a", fail))
    await asyncio.sleep(0)
    thread.close()
    gate.set()

    with pytest.raises(NotReady, match="stopping"):
        await asyncio.wait_for(failing, PATIENCE_SECONDS)


async def test_where_the_system_gives_no_thread_the_work_fails_and_the_next_is_tried_again() -> None:
    thread = FairThread("test", lambda: NotReady("stopping"))
    before = threading.stack_size(2**46)  # more than there are addresses: no thread starts
    try:
        with pytest.raises(EngineError, match="no thread"):
            await asyncio.wait_for(thread.run("a", lambda: 1), PATIENCE_SECONDS)
    finally:
        threading.stack_size(before)

    answer = await asyncio.wait_for(thread.run("a", lambda: 2), PATIENCE_SECONDS)
    thread.close()

    assert answer == 2


async def test_a_long_text_is_encoded_under_its_key() -> None:
    async with serving(Config(key=NAMED)) as (session, _):
        body = {"model": "one", "prompt": "x" * (LONG_TEXT + 1)}
        async with session.post("/tokenize", json=body, headers=shown("sk-a")) as response:
            answer = await response.json()

    assert answer["count"] == LONG_TEXT + 1


async def test_the_queue_for_a_model_that_loads_is_shared_by_tenant() -> None:
    loading = LoadState("m")
    loading.check(2, "a")
    greedy = [asyncio.create_task(loading.wait(PATIENCE_SECONDS, "a")) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(QueueFull):
        loading.check(2, "a")

    loading.check(2, "b")
    other = asyncio.create_task(loading.wait(PATIENCE_SECONDS, "b"))
    await asyncio.sleep(0)
    with pytest.raises(QueueFull):
        loading.check(2, "b")
    loading.succeed()
    ends = await asyncio.gather(*greedy, other, return_exceptions=True)

    assert [type(end) for end in ends] == [type(None), QueueFull, type(None)]
    assert loading.num_waiting == 0


@pytest.mark.parametrize("num_turns", range(5))
async def test_a_wait_for_a_model_that_is_cancelled_as_the_load_ends_ends_as_cancelled(num_turns: int) -> None:
    loading = LoadState("m")
    wait = asyncio.create_task(loading.wait(PATIENCE_SECONDS))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    loading.succeed()
    for _ in range(num_turns):
        await asyncio.sleep(0)

    has_ended = not wait.cancel()
    await asyncio.wait([wait])

    assert wait.cancelled() is not has_ended
