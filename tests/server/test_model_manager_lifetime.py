"""The start and the end of the model manager: sizes, failures, draining, closing."""

from __future__ import annotations

import asyncio
import errno
import logging

import pytest

from brlite.config.options import EngineConfig, ModelSpec
from brlite.errors import ConfigError, ModelError
from brlite.server.model_manager import ASKING, GIB, QUEUED, ModelManager, OnProgress
from brlite.server.served_model import ModelTable, ServedModel
from tests.conftest import Eventually
from tests.limits import PATIENCE_SECONDS
from tests.server.conftest import FakeLoader, MakeHouse, on_demand


async def test_an_unexpected_error_of_the_manager_is_a_failure_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    models = ModelTable([ServedModel(ModelSpec(name="a", build_seq=64, idle_unload_seconds=0.05))])
    loader = FakeLoader({})
    monkeypatch.setattr(loader, "release_memory", lambda: 1 // 0)

    async with ModelManager(models, loader, EngineConfig()) as manager:
        await manager.start()
        error = await asyncio.wait_for(manager.failure(), PATIENCE_SECONDS)

    assert "division" in str(error)


async def test_draining_ends_loads_and_whoever_waits_for_them(make_house: MakeHouse, eventually: Eventually) -> None:
    house = await make_house(on_demand("a", "b"))
    house.loader.gates["a"] = asyncio.Event()
    asked = [house.asks("a"), house.asks("b"), asyncio.create_task(house.lines("a"))]
    await eventually(
        lambda: house.num_waiting("a") == 2 and house.num_waiting("b") == 1 and house.loader.loads["a"] == 1
    )

    house.models.is_draining = True
    house.manager.drain()
    (status, answer), (other, _), lines = await asyncio.gather(*asked)
    await house.manager.close()

    assert (status, other) == (503, 503)
    assert "the server is stopping" in answer["error"]["message"]
    assert "the server is stopping" in lines[-2]
    assert house.loader.cancelled == ["a"]


async def test_closing_waits_for_an_engine_that_is_closing_already(
    make_house: MakeHouse, eventually: Eventually
) -> None:
    house = await make_house(on_demand("a", "b"), sizes={"a": 6, "b": 6}, budget=10)
    await house.ask("a")
    gate = house.hold_closing("a")
    asked = house.asks("b")
    await eventually(lambda: house.models.find("a").engine is None)

    closed = asyncio.create_task(house.manager.close())
    status, _ = await asked
    gate.set()
    await closed

    assert (status, house.loader.backends["a"].is_closed) == (503, True)
    assert not house.loader.loads["b"]


@pytest.mark.parametrize("num_turns", range(4))
async def test_closing_is_not_lost_when_a_model_changes_just_before(num_turns: int) -> None:
    model = ServedModel(ModelSpec(name="a", build_seq=64, idle_unload_seconds=PATIENCE_SECONDS * 10))
    manager = ModelManager([model], FakeLoader({}), EngineConfig())
    await manager.start()
    for _ in range(4):
        await asyncio.sleep(0)  # the manager waits until the model is idle for too long

    with model.in_use(max_waiting=1):
        pass
    for _ in range(num_turns):
        await asyncio.sleep(0)
    _, still_open = await asyncio.wait([asyncio.create_task(manager.close())], timeout=PATIENCE_SECONDS)

    assert not still_open


@pytest.mark.parametrize(
    ("specs", "who"),
    [
        (on_demand("a", "huge"), "the model huge needs"),
        ([ModelSpec(name="a"), ModelSpec(name="b")], 'the models of load = "start" need together'),
    ],
    ids=["one that never fits", "too many at the start"],
)
async def test_what_can_never_fit_is_refused_before_anything_is_loaded(specs: list[ModelSpec], who: str) -> None:
    loader = FakeLoader({"a": 6 * GIB, "b": 6 * GIB, "huge": 11 * GIB})
    manager = ModelManager([ServedModel(spec) for spec in specs], loader, EngineConfig(memory_gib=10))

    with pytest.raises(ConfigError, match=rf"engine\.memory_gib = 10: {who} 1[12] GiB"):
        await manager.start()

    assert not loader.loads


async def test_what_is_known_not_to_fit_only_once_it_is_fetched_is_refused_then(
    make_house: MakeHouse, caplog: pytest.LogCaptureFixture
) -> None:
    house = await make_house(on_demand("a"), budget=10, prepare=lambda loader: loader.unknown.update(a=11))

    status, answer = await house.ask("a")

    assert (status, answer["error"]["code"]) == (503, "model_load_failed")
    assert "engine.memory_gib" in caplog.text
    assert not house.loader.loads


async def test_a_size_that_is_known_only_later_counts_too(make_house: MakeHouse) -> None:
    house = await make_house(
        on_demand("a", "b"), sizes={"a": 6}, budget=10, prepare=lambda loader: loader.unknown.update(b=6)
    )
    await house.ask("a")

    status, _ = await house.ask("b")

    assert status == 200
    assert await house.statuses() == {"a": "unloaded", "b": "ready"}


async def test_a_model_on_demand_on_a_drive_that_is_lost_does_not_end_the_start(make_house: MakeHouse) -> None:
    async def known_bytes(spec: ModelSpec) -> int:
        if spec.name == "b":
            raise OSError(errno.ESTALE, "Stale file handle", "/models/b")
        return 6

    house = await make_house(
        on_demand("a", "b"), budget=10, prepare=lambda loader: setattr(loader, "known_bytes", known_bytes)
    )

    assert (await house.ask("a"))[0] == 200


async def test_a_model_of_the_start_that_fails_ends_the_start(make_house: MakeHouse) -> None:
    def break_it(loader: FakeLoader) -> None:
        loader.errors["a"] = [ModelError("config.json is missing")]

    with pytest.raises(ModelError, match=r"config\.json is missing"):
        await make_house([ModelSpec(name="a"), *on_demand("b")], prepare=break_it)


@pytest.mark.parametrize("budget", [0, 20])
async def test_a_download_that_stalls_holds_no_other_model_back(
    make_house: MakeHouse, eventually: Eventually, budget: int
) -> None:
    def stall(loader: FakeLoader) -> None:
        loader.downloads["a"] = asyncio.Event()
        loader.unknown["a"] = 6

    house = await make_house(on_demand("a", "b"), sizes={"b": 6}, budget=budget, prepare=stall)
    waiting = house.asks("a")
    await eventually(lambda: "downloading 20%" in house.progress("a"))

    status, _ = await house.ask("b")
    meanwhile = await house.statuses()
    house.loader.downloads["a"].set()

    assert (status, meanwhile) == (200, {"a": "loading", "b": "ready"})
    assert (await waiting)[0] == 200


async def test_a_download_that_stalls_at_the_start_holds_no_other_model_back(eventually: Eventually) -> None:
    models = ModelTable([ServedModel(spec) for spec in (ModelSpec(name="a"), ModelSpec(name="b"), *on_demand("c"))])
    loader = FakeLoader({})
    loader.downloads["a"] = asyncio.Event()

    async with ModelManager(models, loader, EngineConfig()) as manager:
        starting = asyncio.create_task(manager.start())
        await eventually(lambda: models.find("b").engine is not None)
        with models.find("c").in_use(max_waiting=1):
            await models.find("c").loaded(PATIENCE_SECONDS)
        was_waiting = not starting.done()
        loader.downloads["a"].set()
        await starting

    assert was_waiting
    assert loader.loads == {"a": 1, "b": 1, "c": 1}


async def test_downloads_beyond_the_bound_wait_in_order_and_hold_back_no_local_model(
    eventually: Eventually, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "brlite.server.model_manager")
    models, loader = ModelTable([ServedModel(spec) for spec in on_demand("a", "b", "c", "here")]), FakeLoader({})
    loader.downloads = {name: asyncio.Event() for name in "abc"}
    fetch, stages = loader.fetch, []

    async def fetch_in_turn(spec: ModelSpec, report: OnProgress) -> None:
        stages.append(models.find(spec.name).loading.stage)
        await fetch(spec, report)

    loader.fetch = fetch_in_turn  # type: ignore[method-assign]

    async def use(name: str) -> None:
        with models.find(name).in_use(max_waiting=1):
            await models.find(name).loaded(PATIENCE_SECONDS)

    async with ModelManager(models, loader, EngineConfig(max_downloads=1)) as manager:
        await manager.start()
        waiting = {}
        for name, progress in (("a", "downloading 20%"), ("c", QUEUED), ("b", QUEUED)):
            waiting[name] = asyncio.create_task(use(name))
            await eventually(lambda: progress in models.find(name).loading.describe())  # noqa: B023
        await use("here")
        for name, after in (("a", "c"), ("c", "b")):
            loader.downloads[name].set()
            await waiting[name]
            await eventually(lambda: "downloading 20%" in models.find(after).loading.describe())  # noqa: B023
        loader.downloads["b"].set()
        await waiting["b"]

    assert list(loader.loads) == ["here", "a", "c", "b"]
    assert stages == [ASKING] * 3
    assert [line for line in caplog.messages if "engine.max_downloads" in line] == [
        f"model {name} waits for its turn to be downloaded: at most 1 at once (engine.max_downloads)" for name in "cb"
    ]


async def test_a_model_that_nobody_waits_for_any_more_gives_up_its_turn_to_be_downloaded(
    make_house: MakeHouse, eventually: Eventually
) -> None:
    def stall(loader: FakeLoader) -> None:
        loader.downloads = {name: asyncio.Event() for name in "ab"}

    house = await make_house(on_demand("a", "b"), max_downloads=1, prepare=stall)
    first, left = house.asks("a"), house.asks("b")
    await eventually(lambda: QUEUED in house.progress("b"))

    left.cancel()
    await eventually(lambda: house.num_waiting("b") == 0)
    house.loader.downloads["a"].set()
    status, _ = await first
    await eventually(lambda: house.models.find("b").status == "unloaded")
    given_up = house.progress("b")
    again = house.asks("b")
    await eventually(lambda: "downloading 20%" in house.progress("b"))
    house.loader.downloads["b"].set()

    assert (status, (await again)[0], house.loader.loads["b"]) == (200, 200, 1)
    assert QUEUED not in given_up


async def test_a_download_that_fails_refuses_those_who_wait_and_is_tried_again(
    make_house: MakeHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(spec: ModelSpec, report: object) -> None:
        raise ModelError("the hub cannot be reached")

    house = await make_house(on_demand("a"))
    house.loader.downloads["a"] = asyncio.Event()
    monkeypatch.setattr(house.loader, "fetch", fail)
    status, answer = await house.ask("a")
    monkeypatch.undo()
    house.loader.downloads["a"].set()
    house.time += 10

    assert (status, answer["error"]["code"]) == (503, "model_load_failed")
    assert (await house.ask("a"))[0] == 200


async def test_closing_ends_downloads_and_a_start_that_waits_for_them() -> None:
    model = ServedModel(ModelSpec(name="a"))
    loader = FakeLoader({})
    loader.downloads["a"] = asyncio.Event()
    manager = ModelManager([model], loader, EngineConfig())
    starting = asyncio.create_task(manager.start())
    await asyncio.sleep(0)

    await asyncio.wait_for(manager.close(), PATIENCE_SECONDS)

    with pytest.raises(asyncio.CancelledError):
        await starting
    assert not loader.loads


async def test_a_start_that_fails_ends_the_other_loads_and_downloads() -> None:
    models = [ServedModel(ModelSpec(name=name)) for name in "abc"]
    loader = FakeLoader({})
    loader.errors["a"] = [ModelError("config.json is missing")]
    loader.gates["b"] = loader.downloads["c"] = asyncio.Event()
    manager = ModelManager(models, loader, EngineConfig())

    with pytest.raises(ModelError):
        await manager.start()
    for _ in range(9):
        await asyncio.sleep(0)
    cancelled = list(loader.cancelled)
    await manager.close()

    assert cancelled == ["b"]


@pytest.mark.parametrize("error", [None, ModelError("config.json is missing")])
async def test_a_load_that_ends_as_the_start_is_cancelled_is_no_error(
    caplog: pytest.LogCaptureFixture, eventually: Eventually, error: ModelError | None
) -> None:
    loader = FakeLoader({})
    loader.gates["a"] = asyncio.Event()
    loader.errors["a"] = [] if error is None else [error]
    async with ModelManager([ServedModel(ModelSpec(name="a"))], loader, EngineConfig()) as manager:
        starting = asyncio.create_task(manager.start())
        await eventually(lambda: loader.loads["a"] == 1)

        loader.gates["a"].set()
        starting.cancel()
        await asyncio.wait([starting])

    assert starting.cancelled()
    assert not [record for record in caplog.records if record.exc_info]


async def test_a_model_whose_files_may_be_gone_is_fetched_anew(make_house: MakeHouse, eventually: Eventually) -> None:
    house = await make_house(on_demand("a", "b"), sizes={"a": 6, "b": 6}, budget=10)
    await house.ask("a")
    await house.ask("b")
    house.loader.downloads["a"] = asyncio.Event()

    waiting = house.asks("a")
    await eventually(lambda: "downloading 20%" in house.progress("a"))
    status, _ = await house.ask("b")
    house.loader.downloads["a"].set()

    assert status == 200
    assert (await waiting)[0] == 200
