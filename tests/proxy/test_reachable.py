"""What a server says of other servers' models: `/v1/models` lists those that can be reached, `/ready` counts."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
import openai
import pytest

from brlite.app import FORWARDER, create_app
from brlite.config.options import Config, KeyConfig, KeysConfig, ModelSpec, ProxyConfig, UpstreamConfig
from brlite.http.listen import HttpServer
from brlite.proxy.forwarder import Forwarder
from brlite.proxy.outcomes import Ending
from brlite.server.served_model import ModelTable, ServedModel
from tests.conftest import Eventually
from tests.proxy.get_server import GOOD, Answer, GetServer, model_list

LOCAL = ModelSpec(name="here", load="on_demand")
DOWN = Answer(503)


class Front:
    """The server that is asked: its models and what it forwards to."""

    def __init__(self, url: str, models: ModelTable, forwarder: Forwarder, session: aiohttp.ClientSession) -> None:
        self.url, self.models, self.forwarder = url, models, forwarder
        self._session = session

    async def get(self, path: str, key: str = "none") -> tuple[int, Any]:
        headers = {"Authorization": f"Bearer {key}"}
        async with self._session.get(self.url + path, headers=headers) as response:
            return response.status, await response.json()

    async def names(self, key: str = "none") -> list[str]:
        """What `/v1/models` lists."""
        _, answer = await self.get("/v1/models", key)
        return [card["id"] for card in answer["data"]]

    def is_up(self, name: str) -> bool:
        """Whether the upstream of that name is thought to be well."""
        return next(upstream.is_healthy for upstream in self.forwarder.table.upstreams if upstream.name == name)


Start = Callable[..., Awaitable[Front]]


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """`await start(upstream(…), …, model=(…), aliases={…})` starts a server in front of these upstreams."""
    async with AsyncExitStack() as stack:

        async def make(
            *upstreams: UpstreamConfig, model: tuple[ModelSpec, ...] = (), key: tuple[KeyConfig, ...] = (), **proxy: Any
        ) -> Front:
            settings = ProxyConfig(health_seconds=0.02, health_timeout_seconds=5, **proxy)
            config = Config(model=model, upstream=upstreams, key=key, proxy=settings, keys=KeysConfig(env="NO_KEY"))
            models = ModelTable([ServedModel(spec) for spec in model], settings)
            app = create_app(models, config)
            server = await stack.enter_async_context(HttpServer(app, "127.0.0.1", 0, config.limits, 0.2))
            session = await stack.enter_async_context(aiohttp.ClientSession())
            return Front(server.url, models, app[FORWARDER], session)

        yield make


def upstream(server: GetServer, name: str, *models: str, **options: Any) -> UpstreamConfig:
    return UpstreamConfig(url=server.url, name=name, models=models, **options)


async def test_models_here_and_elsewhere_and_aliases_are_listed(start: Start) -> None:
    async with GetServer() as one, GetServer() as two:
        front = await start(
            upstream(one, "one", "a", "both"), upstream(two, "two", "both", "b"), model=(LOCAL,), aliases={"gpt": "b"}
        )

        assert await front.names() == ["here", "a", "both", "b", "gpt"]


async def test_a_model_is_listed_as_long_as_one_of_its_servers_can_be_reached(
    start: Start, eventually: Eventually
) -> None:
    async with GetServer({"/health": DOWN}) as one, GetServer() as two:
        front = await start(upstream(one, "one", "a", "both"), upstream(two, "two", "both"), aliases={"alias": "a"})

        await eventually(lambda: not front.is_up("one"))
        without = await front.names()
        one.answers["/health"] = GOOD
        await eventually(lambda: front.is_up("one"))

        assert without == ["both"]
        assert await front.names() == ["a", "both", "alias"]


async def test_an_upstream_that_requests_have_failed_at_is_not_listed(start: Start) -> None:
    async with GetServer() as one:
        front = await start(upstream(one, "one", "a"), eject_failures=1)
        (failing,) = front.forwarder.table.upstreams
        now = front.forwarder.loop.time()

        ticket = failing.begin(now)
        failing.end(ticket, Ending.BROKEN, now)

        assert await front.names() == []


async def test_an_upstream_that_asked_for_a_pause_can_be_reached(start: Start) -> None:
    async with GetServer() as one:
        front = await start(upstream(one, "one", "a"))

        front.forwarder.table.upstreams[0].refuses_until = front.forwarder.loop.time() + 60

        assert await front.names() == ["a"]


async def test_a_card_says_what_the_upstream_lists_under_our_name(start: Start, eventually: Eventually) -> None:
    listed = model_list({"id": "org/m", "created": 7, "owned_by": "org", "max_model_len": 512, "root": "/secret"})
    async with GetServer({"/v1/models": listed}) as one:
        front = await start(upstream(one, "one", "m", rename={"m": "org/m"}), aliases={"gpt": "m"})
        await eventually(lambda: bool(front.forwarder.table.upstreams[0].listed))

        status, card = await front.get("/v1/models/gpt")

    assert status == 200
    assert card["id"] == "gpt"
    assert card["root"] == "m"
    assert (card["created"], card["owned_by"], card["max_model_len"]) == (7, "org", 512)


async def test_of_several_servers_the_shortest_context_is_said(start: Start, eventually: Eventually) -> None:
    lists = [model_list({"id": "m", "max_model_len": length}) for length in (512, 256)]
    async with GetServer({"/v1/models": lists[0]}) as one, GetServer({"/v1/models": lists[1]}) as two:
        front = await start(upstream(one, "one", "m"), upstream(two, "two", "m"))
        await eventually(lambda: all(each.listed for each in front.forwarder.table.upstreams))

        _, card = await front.get("/v1/models/m")

    assert card["max_model_len"] == 256


async def test_a_card_of_which_the_upstream_says_nothing_is_one_all_the_same(start: Start) -> None:
    async with GetServer() as one:
        front = await start(upstream(one, "one", "m"))

        async with openai.AsyncOpenAI(base_url=f"{front.url}/v1", api_key="none", max_retries=0) as client:
            card = await client.models.retrieve("m")

    assert card.id == "m"
    assert card.created > 0
    assert "max_model_len" not in card.to_dict()


async def test_a_key_sees_its_own_models_and_their_aliases_only(start: Start) -> None:
    keys = (KeyConfig(name="some", key="some", models=("a", "here")), KeyConfig(name="all", key="all"))
    async with GetServer() as one:
        front = await start(
            upstream(one, "one", "a", "b"), model=(LOCAL,), key=keys, aliases={"to-a": "a", "to-b": "b"}
        )

        assert await front.names("some") == ["here", "a", "to-a"]
        assert await front.names("all") == ["here", "a", "b", "to-a", "to-b"]
        assert (await front.get("/v1/models/to-a", "some"))[0] == 200
        assert (await front.get("/v1/models/to-b", "some"))[0] == 403


async def test_a_model_that_cannot_be_reached_is_a_404_that_says_so(start: Start, eventually: Eventually) -> None:
    async with GetServer({"/health": DOWN}) as one:
        front = await start(upstream(one, "one", "org/m"))
        await eventually(lambda: not front.is_up("one"))

        known, unknown = await front.get("/v1/models/org/m"), await front.get("/v1/models/none")

    assert (known[0], unknown[0]) == (404, 404)
    assert known[1]["error"]["code"] == unknown[1]["error"]["code"] == "model_not_found"
    assert "cannot be reached now" in known[1]["error"]["message"]
    assert "does not exist. Served here: org/m" in unknown[1]["error"]["message"]


async def test_a_proxy_is_ready_while_one_model_can_be_reached(start: Start, eventually: Eventually) -> None:
    async with GetServer({"/health": DOWN}) as one, GetServer() as two:
        front = await start(upstream(one, "one", "a", "both"), upstream(two, "two", "both"), aliases={"alias": "a"})
        await eventually(lambda: not front.is_up("one"))
        status, answer = await front.get("/ready")
        two.answers["/health"] = DOWN
        await eventually(lambda: not front.is_up("two"))

        later, unreachable = await front.get("/ready")

        assert status == 200
        assert answer == {
            "status": "ready",
            "models": [],
            "forwarded": [
                {"model": "a", "upstreams": 1, "available": 0},
                {"model": "both", "upstreams": 2, "available": 1},
            ],
        }
        assert (later, unreachable["status"]) == (503, "unreachable")
        assert await front.get("/health") == (200, {"status": "alive"})


@pytest.mark.parametrize(
    ("spec", "status", "word"), [(LOCAL, 200, "ready"), (ModelSpec(name="slow"), 503, "loading")], ids=["here", "slow"]
)
async def test_where_models_are_served_here_they_decide(
    start: Start, eventually: Eventually, spec: ModelSpec, status: int, word: str
) -> None:
    async with GetServer({"/health": DOWN}) as one:
        front = await start(upstream(one, "one", "a"), model=(spec,))
        await eventually(lambda: not front.is_up("one"))

        ready, answer = await front.get("/ready")

    assert (ready, answer["status"]) == (status, word)


async def test_a_server_that_drains_is_not_ready(start: Start) -> None:
    async with GetServer() as one:
        front = await start(upstream(one, "one", "a"))

        front.models.is_draining = True

        status, answer = await front.get("/ready")
    assert (status, answer["status"]) == (503, "stopping")


async def test_a_server_without_upstreams_says_nothing_of_any(start: Start) -> None:
    front = await start(model=(LOCAL,))

    _, answer = await front.get("/ready")

    assert "forwarded" not in answer
