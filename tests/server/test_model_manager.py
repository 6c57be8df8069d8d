"""Models that are loaded when requests need them: what the requests see of it, on a real socket."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
from collections import Counter
from typing import Any

import pytest

from brlite.config.options import EngineConfig, ModelSpec
from brlite.errors import ModelError
from brlite.server.load_state import RETRY_SECONDS
from brlite.server.model_manager import ModelManager
from brlite.server.served_model import ModelTable, ServedModel
from tests.conftest import Eventually
from tests.limits import PATIENCE_SECONDS
from tests.server.conftest import FakeLoader, MakeHouse, chat_body, completion_body, on_demand

CHAT = "/v1/chat/completions"


async def test_a_model_on_demand_is_listed_and_the_server_is_ready_without_it(make_house: MakeHouse) -> None:
    house = await make_house([ModelSpec(name="a", build_seq=64), *on_demand("b")])

    before, (ready, _) = await house.statuses(), await house.get("/ready")
    status, _ = await house.ask("b")
    after = await house.statuses()

    assert before == {"a": "ready", "b": "unloaded"}
    assert (ready, status) == (200, 200)
    assert after == {"a": "ready", "b": "ready"}


async def test_many_first_requests_load_it_once(make_house: MakeHouse, eventually: Eventually) -> None:
    house = await make_house(on_demand("a"))
    house.loader.gates["a"] = asyncio.Event()

    asked = [house.asks("a", content=str(number)) for number in range(8)]
    await eventually(lambda: house.num_waiting("a") == 8)
    loading = await house.statuses()
    house.loader.gates["a"].set()
    answers = await asyncio.gather(*asked)

    assert loading == {"a": "loading"}
    assert [status for status, _ in answers] == [200] * 8
    assert house.loader.loads["a"] == 1


async def test_a_model_is_loaded_and_unloaded_when_that_is_asked_for(
    make_house: MakeHouse, eventually: Eventually
) -> None:
    house = await make_house([ModelSpec(name="a", build_seq=64), *on_demand("b")])

    async def act(action: str, **body: str) -> tuple[int, dict[str, Any]]:
        async with house.session.post(f"/models/{action}", json=body) as response:
            return response.status, await response.json()

    loaded = await act("load", model="b")
    is_there = await house.statuses()
    unloading = await act("unload", model="b")
    await eventually(lambda: house.models.find("b").engine is None)
    again, unloaded = await act("unload", model="b"), await house.statuses()
    refused = [await act("unload", model="a"), await act("unload", model="c"), await act("load", modle="b")]

    assert loaded == (200, {"success": True, "model": "b", "status": "ready"})
    assert (is_there["b"], unloaded["b"], house.loader.loads["b"]) == ("ready", "unloaded", 1)
    assert unloading == (200, {"success": True, "model": "b", "status": "unloading"})
    assert again == (200, {"success": True, "model": "b", "status": "unloaded"})
    assert [status for status, _ in refused] == [400, 404, 400]
    assert refused[0][1]["error"]["code"] == "model_not_on_demand"


async def test_a_load_takes_back_an_unload_that_waits_for_requests(make_house: MakeHouse) -> None:
    house = await make_house(on_demand("a"))
    await house.asks("a")
    model = house.models.find("a")

    with model.in_use(max_waiting=1):
        for action in ("unload", "load"):
            async with house.session.post(f"/models/{action}", json={"model": "a"}) as response:
                assert response.status == 200
    status, _ = await house.asks("a")

    assert (status, model.num_unloads, house.loader.loads["a"]) == (200, 0, 1)


@pytest.mark.parametrize(
    ("path", "body"),
    [("/tokenize", {"prompt": "hi"}), ("/detokenize", {"tokens": [104]}), ("/v1/completions", completion_body())],
)
async def test_every_endpoint_waits_for_its_model(make_house: MakeHouse, path: str, body: dict[str, Any]) -> None:
    house = await make_house(on_demand("a"))

    async with house.session.post(path, json={**body, "model": "a"}) as response:
        status = response.status

    assert (status, house.loader.loads["a"]) == (200, 1)


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"n": 10**6}, "n"),
        ({"stop": ["x" * 999]}, "stop"),
        ({"tools": [1]}, "tools[0]"),
    ],
)
async def test_what_is_wrong_without_the_model_is_refused_without_loading_it(
    make_house: MakeHouse, fields: dict[str, Any], param: str, is_streamed: bool
) -> None:
    house = await make_house(on_demand("a"))

    status, answer = await house.ask("a", stream=is_streamed, **fields)

    assert (status, answer["error"]["param"]) == (400, param)
    assert not house.loader.loads


async def test_the_least_recently_used_model_makes_room(make_house: MakeHouse) -> None:
    house = await make_house(on_demand("a", "b", "c"), sizes={"a": 4, "b": 4, "c": 4}, budget=10)
    for name in ("a", "b", "a"):
        house.time += 1
        await house.ask(name)

    status, _ = await house.ask("c")

    assert status == 200
    assert await house.statuses() == {"a": "ready", "b": "unloaded", "c": "ready"}
    assert house.loader.backends["b"].is_closed


async def test_a_busy_model_is_waited_for(make_house: MakeHouse, eventually: Eventually) -> None:
    house = await make_house(on_demand("a", "b"), sizes={"a": 6, "b": 6}, budget=10)
    await house.ask("a")
    house.loader.backends["a"].gate = gate = threading.Event()

    running = house.asks("a", content="again")
    await asyncio.to_thread(house.loader.backends["a"].has_begun.wait, 10)
    waiting = house.asks("b")
    await eventually(lambda: "memory that busy models hold" in house.progress("b"))
    meanwhile = await house.statuses()
    gate.set()
    answers = await asyncio.gather(running, waiting)

    assert meanwhile["a"] == "ready"
    assert [status for status, _ in answers] == [200, 200]
    assert await house.statuses() == {"a": "unloaded", "b": "ready"}


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_ordinary_traffic_keeps_no_other_model_out(make_house: MakeHouse, is_streamed: bool) -> None:
    house = await make_house(on_demand("a", "b"), sizes={"a": 6, "b": 6}, budget=10)
    await house.ask("a")
    has_answered = asyncio.Event()
    num_answers = Counter[str]()

    async def keep_busy(number: int) -> None:
        while not has_answered.is_set():
            await (house.lines if is_streamed else house.ask)("a", content=str(number), max_tokens=30)
            num_answers["a"] += 1

    busy = [asyncio.create_task(keep_busy(number)) for number in range(4)]
    statuses = []
    for number in range(5):
        await asyncio.sleep(0)
        statuses.append((await house.ask("b", content=str(number)))[0])
        num_answers["b"] += 1
    has_answered.set()
    await asyncio.gather(*busy)

    assert statuses == [200] * 5
    assert num_answers["a"] >= 4  # they have had their turns in between
    assert house.loader.loads["b"] <= 5


async def test_a_turn_serves_all_that_waited_for_the_model(make_house: MakeHouse, eventually: Eventually) -> None:
    house = await make_house(on_demand("a", "b"), sizes={"a": 6, "b": 6}, budget=10)
    await house.ask("a")
    house.loader.backends["a"].gate = gate = threading.Event()
    running = house.asks("a")
    await asyncio.to_thread(house.loader.backends["a"].has_begun.wait, PATIENCE_SECONDS)

    asked = [house.asks("b", content="first")]
    await eventually(lambda: house.models.find("a").is_held_back)
    asked += [house.asks(name, content=str(number)) for number in range(6) for name in ("a", "b")]
    await eventually(lambda: house.num_waiting("a") == 7 and house.num_waiting("b") == 7)
    gate.set()
    answers = await asyncio.gather(running, *asked)

    assert [status for status, _ in answers] == [200] * 14
    assert house.loader.loads == {"a": 2, "b": 1}


async def test_three_models_in_memory_for_two_all_get_their_turns(make_house: MakeHouse) -> None:
    house = await make_house(on_demand("a", "b", "c"), sizes={"a": 4, "b": 4, "c": 4}, budget=10)
    statuses = Counter[tuple[str, int]]()

    async def ask(model: str, number: int) -> None:
        for turn in range(8):
            status, _ = await house.ask(model, content=f"{number} {turn}", max_tokens=20)
            statuses[model, status] += 1

    await asyncio.gather(*(ask(model, number) for model in "abc" for number in range(3)))

    assert statuses == {("a", 200): 24, ("b", 200): 24, ("c", 200): 24}


async def test_who_waits_behind_goes_on_when_the_other_wish_is_gone(
    make_house: MakeHouse, eventually: Eventually
) -> None:
    house = await make_house(on_demand("a", "b"), sizes={"a": 6, "b": 6}, budget=10)
    await house.ask("a")
    house.loader.backends["a"].gate = gate = threading.Event()
    running = house.asks("a")
    await asyncio.to_thread(house.loader.backends["a"].has_begun.wait, PATIENCE_SECONDS)
    wish = house.asks("b")
    await eventually(lambda: house.models.find("a").is_held_back)
    behind = house.asks("a", content="behind")
    leaving = house.asks("a", content="leaving")
    await eventually(lambda: house.num_waiting("a") == 3)

    wish.cancel()
    leaving.cancel()
    await eventually(lambda: house.num_waiting("a") == 2 and not house.models.find("a").is_held_back)
    gate.set()
    answers = await asyncio.gather(running, behind)

    assert [status for status, _ in answers] == [200, 200]
    assert house.loader.loads == {"a": 1}


async def test_a_wish_that_nobody_has_any_more_evicts_nobody(make_house: MakeHouse, eventually: Eventually) -> None:
    house = await make_house(on_demand("a", "b"), sizes={"a": 6, "b": 6}, budget=10)
    await house.ask("a")
    house.loader.backends["a"].gate = gate = threading.Event()
    running = house.asks("a", content="again")
    await eventually(lambda: house.num_waiting("a") == 1)
    waiting = house.asks("b")
    await eventually(lambda: house.num_waiting("b") == 1)

    waiting.cancel()
    await eventually(lambda: house.num_waiting("b") == 0)
    gate.set()
    await running
    await house.ask("a")

    assert house.loader.loads == {"a": 1}


async def test_waiting_has_an_end_but_loading_goes_on(make_house: MakeHouse, eventually: Eventually) -> None:
    house = await make_house(on_demand("a"), limits={"max_wait_seconds": 0.05})
    house.loader.gates["a"] = asyncio.Event()
    first = house.asks("a")
    await eventually(lambda: house.loader.loads["a"] == 1)

    status, answer = await house.ask("a")
    house.loader.gates["a"].set()
    await eventually(lambda: house.models.find("a").engine is not None)
    again, _ = await house.ask("a")

    assert ((await first)[0], status, again) == (503, 503, 200)
    assert int(answer["retry_after"]) > 0
    assert "was not loaded within 0.05 seconds: reading the weights, 40%" in answer["error"]["message"]
    assert house.loader.loads["a"] == 1


async def test_a_client_that_leaves_leaves_the_load_running(make_house: MakeHouse, eventually: Eventually) -> None:
    house = await make_house(on_demand("a"))
    house.loader.gates["a"] = asyncio.Event()
    asked = house.asks("a")
    await eventually(lambda: house.loader.loads["a"] == 1)

    asked.cancel()
    await eventually(lambda: house.num_waiting("a") == 0)
    house.loader.gates["a"].set()
    await eventually(lambda: house.models.find("a").engine is not None)

    assert not house.loader.cancelled
    assert await house.statuses() == {"a": "ready"}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, chat_body()),
        ("/v1/embeddings", {"input": "a"}),
        ("/v1/rerank", {"query": "a", "documents": ["b"]}),
        ("/v1/score", {"text_1": "a", "text_2": "b"}),
        ("/tokenize", {"prompt": "a"}),
        ("/detokenize", {"tokens": [97]}),
        ("/apply-template", chat_body()),
    ],
)
async def test_what_a_strict_server_refuses_loads_no_model(
    make_house: MakeHouse, path: str, body: dict[str, Any]
) -> None:
    house = await make_house(on_demand("a"), is_strict=True)

    async with house.session.post(path, json={**body, "model": "a", "frob": 1}) as response:
        answer = await response.json()

    assert (response.status, answer["error"]["code"]) == (400, "strict")
    assert not house.loader.loads


async def test_a_priority_that_a_strict_request_may_not_have_loads_no_model(make_house: MakeHouse) -> None:
    house = await make_house(on_demand("a"))

    status, answer = await house.ask("a", priority=-1, strict=True)

    assert (status, answer["error"]["code"]) == (400, "strict")
    assert not house.loader.loads


async def test_no_more_requests_wait_than_may_queue(make_house: MakeHouse, eventually: Eventually) -> None:
    house = await make_house(on_demand("a"), limits={"max_waiting": 1})
    house.loader.gates["a"] = asyncio.Event()
    waiting = house.asks("a")
    await eventually(lambda: house.loader.loads["a"] == 1)

    status, answer = await house.ask("a")
    house.loader.gates["a"].set()

    assert (status, answer["error"]["code"]) == (429, "queue_full")
    assert (await waiting)[0] == 200


@pytest.mark.parametrize("error", [ModelError("config.json is missing"), RuntimeError("something nobody foresaw")])
async def test_a_failed_load_is_answered_and_tried_again_later(make_house: MakeHouse, error: Exception) -> None:
    house = await make_house(on_demand("a", "b"))
    house.loader.errors["a"] = [error]

    failed, answer = await house.ask("a")
    at_once, _ = await house.ask("a")
    statuses, (ready, _), (other, _) = await house.statuses(), await house.get("/ready"), await house.ask("b")
    house.time += RETRY_SECONDS
    later, _ = await house.ask("a")

    assert (failed, answer["error"]["code"], int(answer["retry_after"])) == (503, "model_load_failed", RETRY_SECONDS)
    assert "tried again" in answer["error"]["message"]
    assert str(error) not in answer["error"]["message"]
    assert (at_once, statuses["a"], ready, other) == (503, "failed", 200, 200)
    assert later == 200
    assert house.loader.loads["a"] == 2


async def test_a_stream_tells_how_far_its_model_is_then_speaks(make_house: MakeHouse) -> None:
    house = await make_house(on_demand("a"), limits={"sse_comment_seconds": 0.02})
    house.loader.gates["a"] = asyncio.Event()

    body = {**chat_body(max_tokens=4), "model": "a", "stream": True}
    async with house.session.post(CHAT, json=body) as response:
        while await response.content.readuntil(b"\n\n") != b": loading reading the weights 40%\n\n":
            pass
        again = await response.content.readuntil(b"\n\n")
        house.loader.gates["a"].set()
        rest = await response.text()

    assert response.headers["Content-Type"].startswith("text/event-stream")
    assert again == b": loading reading the weights 40%\n\n"
    events = [line.removeprefix("data: ") for line in rest.splitlines() if line.startswith("data: ")]
    assert json.loads(events[0])["choices"][0]["delta"]["role"] == "assistant"
    assert "".join(json.loads(event)["choices"][0]["delta"].get("content", "") for event in events[:-1])
    assert events[-1] == "[DONE]"


@pytest.mark.parametrize(
    ("fields", "errors", "code", "param"),
    [
        ({}, [ModelError("broken")], "model_load_failed", None),
        ({"content": "x" * 100}, [], "context_length_exceeded", "messages"),
    ],
    ids=["the load fails", "the prompt is too long for the model"],
)
async def test_what_goes_wrong_after_a_stream_began_is_an_event_of_it(
    make_house: MakeHouse, fields: dict[str, Any], errors: list[Exception], code: str, param: str | None
) -> None:
    house = await make_house(on_demand("a"))
    house.loader.errors["a"] = list(errors)

    lines = await house.lines("a", **fields)

    error = json.loads(lines[-2].removeprefix("data: "))["error"]
    assert (error["code"], error["param"]) == (code, param)
    assert lines[-1] == "data: [DONE]"


async def test_a_stream_whose_model_is_loaded_is_refused_before_it_begins(make_house: MakeHouse) -> None:
    house = await make_house([ModelSpec(name="a", build_seq=64)])

    status, answer = await house.ask("a", content="x" * 100, stream=True)

    assert (status, answer["error"]["param"]) == (400, "messages")


async def test_an_idle_model_is_unloaded_and_comes_back_with_its_counters(
    make_house: MakeHouse, eventually: Eventually
) -> None:
    house = await make_house([ModelSpec(name="a", build_seq=64, idle_unload_seconds=60), *on_demand("b")])
    await house.ask("a", max_tokens=8)

    house.time += 60
    await house.ask("b")  # which makes it look at the clock, a fake one
    await eventually(lambda: house.loader.backends["a"].is_closed)
    idle, (ready, _) = await house.statuses(), await house.get("/ready")
    status, _ = await house.ask("a", max_tokens=8)

    assert (idle, ready, status) == ({"a": "unloaded", "b": "ready"}, 200, 200)
    assert house.loader.loads["a"] == 2
    async with house.session.get("/metrics") as response:
        metrics = await response.text()
    for line in (
        'vllm:generation_tokens_total{model_name="a"} 16.0',
        'brlite:model_loads_total{model_name="a"} 2.0',
        'brlite:model_unloads_total{model_name="a"} 1.0',
        'brlite:model_loaded{model_name="a"} 1.0',
    ):
        assert line in metrics


@pytest.mark.parametrize("is_in_cycle", [False, True])
async def test_the_collector_runs_only_for_an_engine_that_a_cycle_holds(
    make_house: MakeHouse, eventually: Eventually, monkeypatch: pytest.MonkeyPatch, is_in_cycle: bool
) -> None:
    collected = list[str]()
    house = await make_house(on_demand("a"))
    await house.ask("a", n=2, use_beam_search=True)
    await house.lines("a")
    monkeypatch.setattr(house.loader, "collect_garbage", lambda: collected.append("a"))
    gc.disable()
    try:
        if is_in_cycle:
            engine: Any = house.models.find("a").engine
            engine.itself = engine
            del engine

        house.models.find("a").dismiss()
        await eventually(lambda: house.models.find("a").status == "unloaded" and not house.manager._engines)
    finally:
        gc.enable()

    assert collected == ["a"] * is_in_cycle


async def test_the_clock_itself_unloads_what_is_idle(eventually: Eventually) -> None:
    models = ModelTable([ServedModel(ModelSpec(name="a", build_seq=64, idle_unload_seconds=0.05))])
    loader = FakeLoader({})

    async with ModelManager(models, loader, EngineConfig()) as manager:
        await manager.start()
        await eventually(lambda: models.find("a").engine is None)

    assert loader.backends["a"].is_closed


async def test_a_request_that_comes_while_its_model_is_unloaded_waits_for_the_next_load(
    make_house: MakeHouse, eventually: Eventually
) -> None:
    house = await make_house(on_demand("a", "b"), sizes={"a": 6, "b": 6}, budget=10)
    await house.ask("a")
    gate = house.hold_closing("a")

    other = house.asks("b")
    await eventually(lambda: house.models.find("a").engine is None)
    asked = house.asks("a")
    await eventually(lambda: house.num_waiting("a") == 1)
    num_loads = dict(house.loader.loads)
    gate.set()
    answers = await asyncio.gather(other, asked)

    assert num_loads == {"a": 1}  # b's load waits for the memory of a
    assert [status for status, _ in answers] == [200, 200]
    assert house.loader.loads == {"a": 2, "b": 1}
