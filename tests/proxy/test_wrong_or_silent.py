"""Upstreams that do not have a model, or do not answer their checks any more: what becomes of requests."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from brlite.config.options import ProxyConfig, UpstreamConfig
from tests.conftest import Eventually
from tests.limits import PATIENCE_SECONDS
from tests.proxy.proxies import Proxy, run_proxy
from tests.proxy.raw_client import Answer, Client, post
from tests.proxy.scripts import PLAIN, TOKENS

CHECKED_OFTEN = ProxyConfig(health_seconds=0.05, health_timeout_seconds=PATIENCE_SECONDS, choice="round_robin")
IMPATIENT = ProxyConfig(health_seconds=0.05, health_timeout_seconds=0.5)
NOT_FOUND = {
    "OpenAI": {"error": {"message": "The model `m` does not exist", "code": "model_not_found", "param": None}},
    "vLLM": {"error": {"message": "The model `m` does not exist.", "type": "NotFoundError", "param": "model"}},
    "vLLM 0.4": {"object": "error", "message": "The model `m` does not exist.", "type": "NotFoundError", "code": 404},
    "Ollama": {"error": {"message": 'model "m" not found, try pulling it first', "type": "not_found_error"}},
    "Ollama's own": {"error": "model 'm' not found"},
}


class Server:
    """A server of `models` that may stop answering its checks, and answers requests when it `may_answer`."""

    def __init__(self, *models: str, not_found: object = NOT_FOUND["OpenAI"]) -> None:
        self.models = models
        self.health = 200  # 0: never answers
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.num_asked = 0
        self.not_found = not_found
        self.url = ""

    async def _get(self, request: web.Request) -> web.StreamResponse:
        if not self.health:
            await asyncio.Event().wait()
        if request.path == "/health":
            return web.Response(status=self.health)
        return web.json_response({"data": [{"id": model} for model in self.models]})

    async def _post(self, request: web.Request) -> web.StreamResponse:
        self.num_asked += 1
        body = await request.json()
        if self.models and body["model"] not in self.models:
            return web.json_response(self.not_found, status=404)
        if not body.get("stream"):
            await self.may_answer.wait()
            return web.Response(body=PLAIN, content_type="application/json")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(TOKENS[0])
        if body.get("drip"):
            for _ in range(150):
                await asyncio.sleep(0.02)
                await response.write(TOKENS[0])
        else:
            await self.may_answer.wait()
        await response.write(TOKENS[3] + b"data: [DONE]\n\n")
        return response

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[Server]:
        app = web.Application()
        app.add_routes([web.get("/{path:.*}", self._get), web.post("/{path:.*}", self._post)])
        runner = web.AppRunner(app, shutdown_timeout=0, handler_cancellation=True)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield self
        finally:
            self.may_answer.set()
            await runner.cleanup()


async def ask(proxy: Proxy, **fields: object) -> Answer:
    client = await Client.connect(proxy.port)
    client.send(post({"model": "m", **fields}))
    try:
        return await asyncio.wait_for(client.answer(), PATIENCE_SECONDS)
    finally:
        client.leave()


def config(server: Server, name: str, health_path: str = "/health", **options: object) -> UpstreamConfig:
    return UpstreamConfig(url=server.url, name=name, models=("m",), health_path=health_path, **options)  # type: ignore[arg-type]


def told(caplog: pytest.LogCaptureFixture, text: str) -> list[str]:
    return [message for message in caplog.messages if text in message]


async def test_a_model_that_its_own_list_lacks_is_not_asked_of_it(
    caplog: pytest.LogCaptureFixture, eventually: Eventually
) -> None:
    caplog.set_level(logging.INFO)
    async with (
        Server("n").listening() as wrong,
        Server("m").listening() as right,
        run_proxy(config(wrong, "wrong"), config(right, "right"), proxy=CHECKED_OFTEN) as proxy,
    ):
        await eventually(lambda: bool(told(caplog, "does not list")))
        answers = [await ask(proxy) for _ in range(6)]
        num_asked = wrong.num_asked, right.num_asked
        wrong.models = ("m", "n")
        await eventually(lambda: bool(told(caplog, "lists the model m now")))
        answers += [await ask(proxy) for _ in range(4)]

    assert {answer.body for answer in answers} == {PLAIN}
    assert num_asked == (0, 6)
    assert wrong.num_asked == 2
    assert told(caplog, "does not list") == [
        "upstream wrong does not list the model m: it is tried only if no other upstream has the model"
    ]


@pytest.mark.parametrize("body", NOT_FOUND.values(), ids=NOT_FOUND)
@pytest.mark.parametrize("is_stream", [False, True], ids=["plain", "stream"])
async def test_after_a_404_for_the_model_another_is_asked_and_the_log_says_so_once(
    body: object, is_stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async with Server("n", not_found=body).listening() as wrong, Server("m").listening() as right:
        upstreams = config(wrong, "wrong", ""), config(right, "right", "")
        async with run_proxy(*upstreams, proxy=ProxyConfig(choice="round_robin")) as proxy:
            answers = [await ask(proxy, stream=is_stream) for _ in range(8)]

    assert {answer.status for answer in answers} == {200}
    assert (wrong.num_asked, right.num_asked) == (1, 8)
    assert told(caplog, "404") == [
        "upstream wrong answers 404 for the model m: it is tried only if no other upstream has the model"
    ]


async def test_where_all_lack_the_model_one_is_asked_all_the_same(eventually: Eventually) -> None:
    async with (
        Server("n").listening() as one,
        Server("n").listening() as two,
        run_proxy(config(one, "one"), config(two, "two"), proxy=CHECKED_OFTEN) as proxy,
    ):
        await eventually(lambda: all(upstream.missing for upstream in proxy.forwarder.table.upstreams))
        refused = await ask(proxy)

    assert (refused.status, refused.error["code"]) == (404, "model_not_found")


async def test_a_404_for_the_path_is_an_answer(caplog: pytest.LogCaptureFixture) -> None:
    body = {"detail": "Not Found"}
    async with (
        Server("n", not_found=body).listening() as one,
        Server("n", not_found=body).listening() as two,
        run_proxy(config(one, "one", ""), config(two, "two", "")) as proxy,
    ):
        refused = await ask(proxy)

    assert (refused.status, one.num_asked + two.num_asked) == (404, 1)
    assert told(caplog, "404") == []


@pytest.mark.parametrize("health", [0, 500], ids=["silent", "sick"])
@pytest.mark.parametrize("is_stream", [False, True], ids=["plain", "stream"])
async def test_who_waits_for_a_server_that_is_not_well_any_more_is_told_soon(
    is_stream: bool, health: int, eventually: Eventually
) -> None:
    async with Server("m").listening() as server, run_proxy(config(server, "one"), proxy=IMPATIENT) as proxy:
        server.may_answer.clear()
        request = asyncio.create_task(ask(proxy, stream=is_stream))
        await eventually(lambda: server.num_asked == 1)
        server.health = health
        answer = await request

    if is_stream:
        assert answer.body.startswith(TOKENS[0])
        assert b'data: {"error":' in answer.body
    else:
        assert (answer.status, answer.error["code"]) == (504, "upstream_timeout")
    assert b"health checks" in answer.body


async def test_a_stream_that_goes_on_is_left_alone_though_its_server_answers_no_checks(eventually: Eventually) -> None:
    proxy_config = ProxyConfig(health_seconds=2, health_timeout_seconds=0.05)
    server = Server("m")
    server.health = 0
    async with server.listening(), run_proxy(config(server, "one"), proxy=proxy_config) as proxy:
        await eventually(lambda: not proxy.forwarder.table.upstreams[0].is_healthy)

        answer = await ask(proxy, stream=True, drip=True)

    assert answer.body.endswith(TOKENS[3] + b"data: [DONE]\n\n")


async def test_a_server_that_is_ending_its_last_requests_may_end_them(eventually: Eventually) -> None:
    async with Server("m").listening() as server, run_proxy(config(server, "one"), proxy=CHECKED_OFTEN) as proxy:
        server.may_answer.clear()
        request = asyncio.create_task(ask(proxy))
        await eventually(lambda: server.num_asked == 1)
        server.health = 503
        await eventually(lambda: not proxy.forwarder.table.upstreams[0].is_healthy)
        await asyncio.sleep(0.5)  # ten times what a silent one would get
        server.may_answer.set()

        assert (await request).body == PLAIN
